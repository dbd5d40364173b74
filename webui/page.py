"""The page: a frame, and one screen a tab. It is built without loading any model library, so that it is up in seconds."""

from __future__ import annotations

from types import ModuleType

import gradio as gr

from webui.api import build_api
from webui.app_context import EMPTY_DRAFT, POLL_SECONDS, AppContext, followed
from webui.class_runs import EMPTY_DRAFT as EMPTY_CLASS_DRAFT
from webui.errors import in_plain_words
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
    """The whole app as one page."""
    with gr.Blocks(title="NoRA Vision", analytics_enabled=False, fill_width=False, delete_cache=(3600, 86400)) as page:
        gr.HTML(HEADER)
        run = gr.Dropdown(label="Run", info="Train, Judge and Use show this run.", elem_id="run", interactive=True)
        step = gr.Dropdown(label="Step", elem_id="use-step", interactive=True, render=False)
        chosen = gr.State(None)
        # Not secret; under a key of this server alone the draft would be lost when it starts again.
        draft = gr.BrowserState(EMPTY_DRAFT, storage_key="nora-vision-draft", secret="nora-vision-draft")
        class_draft = gr.BrowserState(EMPTY_CLASS_DRAFT, storage_key="nora-vision-classify", secret="nora-vision-classify")
        clock = gr.Timer(POLL_SECONDS, active=False)
        active_tab, refresh_triggers = gr.State(next(iter(SCREENS))), {name: gr.State(0.0) for name in SCREENS}
        tabs = gr.Tabs(elem_id="screens")
        context = AppContext(
            page,
            settings,
            run=run,
            picked=followed(run),
            step=step,
            chosen=chosen,
            tabs=tabs,
            draft=draft,
            draft_changed=followed(draft),
            class_draft=class_draft,
            clock=clock,
            active_tab=active_tab,
            refresh_triggers=refresh_triggers,
        )
        # First, since a screen's handler of the same name would take the endpoint's name; and not within the tabs, which
        # count all that they hold.
        build_api(context)
        opened = {}
        with tabs:
            for name, (title, screen) in SCREENS.items():
                with gr.Tab(title, id=name, elem_id=f"screen-{name}") as opened[name]:
                    screen.build(context)
        context.keep_time(opened)

        @in_plain_words
        def come_back(request: gr.Request) -> list[dict[str, object]]:
            return context.show(settings.workspace(request))

        page.load(come_back, outputs=context.outputs, api_visibility="private")
    return page
