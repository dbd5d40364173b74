"""The page: its look, a header, and a tab for each screen. Building it loads no model library, so it opens within seconds."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import parse_qs

import gradio as gr
from gradio.utils import LRUCache

from webui.api import build_api
from webui.context import QUIET, AppContext, Page
from webui.screens import arena, check, classify, judge, photos, runs, train, use
from webui.workspace import Settings

HERE = Path(__file__).parent
STYLE, FAVICON = HERE / "style.css", HERE / "favicon.svg"
# The image of the page on social networks.
CARD = HERE / "card.png"
SCRIPT = (HERE / "page.js").read_text()
# System fonts, so that nothing is loaded from other servers.
SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
# The theme's variables that differ from the default: in light mode, and in dark mode if that differs too. Everything else is in
# style.css, which the sign-in page does not have. Texts have a contrast of at least 4.5 to 1, as WCAG AA requires.
LOOK: dict[str, tuple[str, ...]] = {
    "body_background_fill": ("*neutral_50", "*neutral_950"),
    "background_fill_primary": ("*neutral_50", "*neutral_950"),
    "background_fill_secondary": ("*neutral_50", "*neutral_950"),
    "body_text_color_subdued": ("*neutral_500", "*neutral_400"),
    "color_accent": ("*primary_700",),
    "link_text_color": ("*primary_700", "*primary_300"),
    "link_text_color_hover": ("*primary_800", "*primary_200"),
    "link_text_color_visited": ("*primary_700", "*primary_300"),
    "block_background_fill": ("white", "*neutral_900"),
    "block_label_background_fill": ("transparent", "transparent"),
    "block_title_text_weight": ("600",),
    "button_primary_background_fill": ("*primary_700", "*primary_700"),
    "button_primary_background_fill_hover": ("*primary_800", "*primary_800"),
    "button_cancel_background_fill": ("white", "*neutral_900"),
    "button_cancel_background_fill_hover": ("#fef2f2", "#450a0a"),
    "button_cancel_border_color": ("#dc2626", "#f87171"),
    "button_cancel_text_color": ("#b91c1c", "#fca5a5"),
    "button_border_width": ("1px",),
    "input_border_width": ("1px",),
    "input_background_fill": ("white", "*neutral_800"),
    "input_border_color": ("*neutral_300", "*neutral_600"),
}
TITLE, SUMMARY = "NoRA Vision", "Adapt a large vision model from a handful of images."
# Of the sessions of closed pages, so many are kept: a page that only lost its connection may come back.
MAX_CLOSED_SESSIONS = 20
# Gradio's own limit: the responses of so many sessions are kept until their pages read them.
MAX_UNREAD = 2000
# Gradio's loading screen counts its seconds at every frame and goes on when it is gone, which keeps the processor busy.
HEAD = f"""<link rel="icon" href="favicon.ico" type="image/svg+xml"><meta name="description" content="{SUMMARY}">
<meta property="og:type" content="website"><meta property="og:title" content="{TITLE}">
<meta property="og:description" content="{SUMMARY}"><meta property="og:image" content="{{origin}}card.png">
<meta name="twitter:card" content="summary_large_image">
<script>{{
  const request = window.requestAnimationFrame.bind(window), isStopwatch = /performance\\.now\\(\\) *- *[^;]+\\/ *1e3/;
  window.requestAnimationFrame = (callback) => (isStopwatch.test(callback) ? 0 : request(callback));
}}
{SCRIPT}</script>"""
HEADER = f"""<header class="brand"><h1>{TITLE}</h1><p>{SUMMARY}</p></header>
<p id="activity" role="status" hidden>
  <a href="?tab=train"></a> <span></span> <button type="button">Notify me at the end</button>
</p>"""
SCREENS: dict[str, tuple[str, ModuleType]] = {
    "photos": ("1 Photos", photos),
    "check": ("2 Check", check),
    "train": ("3 Train", train),
    "judge": ("4 Judge", judge),
    "use": ("5 Use", use),
    "classify": ("Classify", classify),
    "arena": ("Arena", arena),
    "runs": ("Runs", runs),
}


class UnreadResponses(LRUCache[str, asyncio.Queue[Any]]):
    """The responses that pages have not read, by session.

    Gradio removes a session's with each of its event streams that is cut off. A page may have two when it is left, and the other
    one fails if there is no queue.
    """

    def __delitem__(self, session: str) -> None:
        """Remove those of a session, but not its queue: events that go on write to it, and another stream may read it."""
        unread = self.get(session, asyncio.Queue())
        while not unread.empty():
            unread.get_nowait()


def theme() -> gr.themes.Base:
    """The theme: one accent colour, plain surfaces, the same contrast in light and dark mode."""
    hues = {"primary_hue": "teal", "secondary_hue": "slate", "neutral_hue": "slate"}
    look = {f"{name}{mode}": value for name, values in LOOK.items() for mode, value in zip(("", "_dark"), values, strict=False)}
    return gr.themes.Base(**hues, radius_size="md", text_size="md", font=SANS, font_mono=MONO).set(**look)


def build_page(settings: Settings) -> gr.Blocks:
    """The app as one page."""
    with Page(title=TITLE, analytics_enabled=False, fill_width=False, delete_cache=(3600, 86400)) as page:
        reopens_event_stream()
        page._queue.pending_messages_per_session = UnreadResponses(MAX_UNREAD)
        page.unload(partial(forget_closed_sessions, page))
        gr.HTML(HEADER)
        context = AppContext(page, settings, list(SCREENS))
        # Before the screens, because a handler of the same name would take the endpoint's name, and outside of the tabs, which
        # count their children.
        build_api(context)
        with context.tabs:
            for name, (title, screen) in SCREENS.items():
                with gr.Tab(title, id=name, elem_id=f"screen-{name}") as context.opened[name]:
                    # The first of its listeners: Gradio calls each when the one before it has ended.
                    context.opened[name].select(None, js=f"() => noraVision.selected('{name}')", **QUIET)
                    screen.build(context)
        context.attach_refreshes()
        _follow_address(context)
        for listener in page.fns.values():
            # The busy line shows progress. Each component that an event marks as loading would be updated at all later events.
            listener.show_progress_on = listener.show_progress_on or []
    return page


def reopens_event_stream() -> None:
    """Put the button that page.js clicks to open a new event stream into the open page."""
    gr.Button(visible="hidden", elem_id="reopen-event-stream").click(lambda: None, trigger_mode="multiple", **QUIET)


async def forget_closed_sessions(page: gr.Blocks) -> None:
    """Forget the sessions of closed pages but the `MAX_CLOSED_SESSIONS` last used, which Gradio would not forget.

    Gradio keeps the state of each and the responses that its page has not read. This runs in the event loop, as the queue does.
    """
    sessions = page.state_holder
    with sessions.lock:
        closed = [name for name, session in sessions.session_data.items() if session.is_closed]
        closed.sort(key=sessions.time_last_used.__getitem__)
        for name in closed[:-MAX_CLOSED_SESSIONS]:
            del sessions.session_data[name], sessions.time_last_used[name]
            del page._queue.pending_messages_per_session[name]


def _follow_address(context: AppContext) -> None:
    """Select the run that the page's address names, and let page.js open the screen that it names and change the address."""
    query = gr.Textbox(visible=False)

    def open_address(query: str, run_id: str | None, request: gr.Request) -> list[object]:
        named = parse_qs((query or "").removeprefix("?")).get("run", [None])
        workspace = context.settings.workspace(request)
        run, *others = context.show(workspace, named[-1])
        # A classifier leaves the subject run as it is, but a page that was just opened has none yet.
        return [context.show(workspace)[0] if run == gr.skip() and run_id is None else run, *others]

    named = "async () => { await noraVision.opening(); return [location.search, null]; }"
    loaded = context.page.load(open_address, [query, context.run], context.outputs, js=named, **QUIET)
    loaded.then(None, js="() => noraVision.opened()", **QUIET)
    button = gr.Button(visible="hidden", elem_id="open-address")
    last = {"js": "() => [location.search, null]", "trigger_mode": "always_last"}
    button.click(open_address, [query, context.run], context.outputs, **last, **QUIET)
    context.picker.change(None, js="() => noraVision.showsRun()", trigger_mode="multiple", **QUIET)
