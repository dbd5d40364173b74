"""The page: a header, and a tab for each screen. Building it loads no model library, so it opens within seconds."""

from __future__ import annotations

from types import ModuleType

import gradio as gr

from webui import event_streams
from webui.api import build_api
from webui.class_runs import EMPTY_DRAFT as EMPTY_CLASS_DRAFT
from webui.context import EMPTY_DRAFT, POLL_SECONDS, AppContext, followed, show_errors
from webui.screens import check, classify, judge, photos, runs, train, use
from webui.settings import Settings

HEADER = '<header class="brand"><h1>NoRA Vision</h1><p>Adapt a large vision model from a handful of images.</p></header>'
SCREENS: dict[str, tuple[str, ModuleType]] = {
    "photos": ("1 Photos", photos),
    "check": ("2 Check", check),
    "train": ("3 Train", train),
    "judge": ("4 Judge", judge),
    "use": ("5 Use", use),
    "classify": ("Classify", classify),
    "runs": ("Runs", runs),
}


def build_page(settings: Settings) -> gr.Blocks:
    """The app as one page."""
    with gr.Blocks(title="NoRA Vision", analytics_enabled=False, fill_width=False, delete_cache=(3600, 86400)) as page:
        event_streams.build()
        gr.HTML(HEADER)
        context = _context(page, settings)
        # Before the screens, because a handler of the same name would take the endpoint's name, and outside of the tabs, which
        # count their children.
        build_api(context)
        opened = {}
        with context.tabs:
            for name, (title, screen) in SCREENS.items():
                with gr.Tab(title, id=name, elem_id=f"screen-{name}") as opened[name]:
                    screen.build(context)
        context.attach_refreshes(opened)

        @show_errors
        def on_load(request: gr.Request) -> list[dict[str, object]]:
            return context.show(settings.workspace(request))

        page.load(on_load, outputs=context.outputs, api_visibility="private")
    return page


def _context(page: gr.Blocks, settings: Settings) -> AppContext:
    """The components that the screens share, put into the open page."""
    run = gr.Dropdown(label="Run", info="The run shown on Train, Judge and Use.", elem_id="run", interactive=True)
    # The drafts are not secret. A key of this server process would lose them on a restart.
    draft = gr.BrowserState(EMPTY_DRAFT, storage_key="nora-vision-draft", secret="nora-vision-draft")
    return AppContext(
        page,
        settings,
        run=run,
        picked=followed(run),
        step=gr.Dropdown(label="Step", elem_id="use-step", interactive=True, render=False),
        chosen=gr.State(None),
        tabs=gr.Tabs(elem_id="screens"),
        draft=draft,
        draft_changed=followed(draft),
        class_draft=gr.BrowserState(EMPTY_CLASS_DRAFT, storage_key="nora-vision-classify", secret="nora-vision-classify"),
        clock=gr.Timer(POLL_SECONDS, active=False),
        active_tab=gr.State(next(iter(SCREENS))),
        refresh_triggers={name: gr.State(0.0) for name in SCREENS},
    )
