"""What the screens share: the selected run, the tabs, the drafts and the refreshes; and errors as sentences."""

from __future__ import annotations

import html
import logging
import secrets
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import gradio as gr
from markupsafe import Markup

from pipelines.errors import InputError
from pipelines.fewshot.sources import ImageFile
from webui.draft import Draft
from webui.render import render, tile
from webui.runs import RunView, views
from webui.workspace import Settings, Workspace

logger = logging.getLogger(__name__)


class Page(gr.Blocks):
    """Blocks whose events show their errors as one sentence.

    An InputError is an error of the user and names the remedy. Any other error is logged under a short number that the page
    shows.
    """

    async def call_function(self, *arguments: Any, **named: Any) -> dict[str, Any]:
        """The result of a function, or the next one of a generator, as in gr.Blocks."""
        try:
            return await super().call_function(*arguments, **named)
        except InputError as error:
            sentence, title = html.escape(str(error), quote=False), "That does not work yet"
            raise gr.Error(sentence, title=title, print_exception=False) from error
        except gr.Error:
            raise
        except Exception as error:
            # The browser must not see a traceback.
            number = secrets.token_hex(3)
            logger.exception("error %s", number)
            sentence = f"Internal error {number}. Your runs and images are not affected. The server's log has the details."
            raise gr.Error(sentence, title="Error", print_exception=False) from error


# By default, Gradio runs each listener for one page at a time, and users would wait for the image checks of others.
QUIET = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": 8}
# Of events that add files: large ones of one user do not hold up those of others.
SAVING = QUIET | {"show_progress": "minimal", "concurrency_limit": 4}
# A list of runs: each is a button. A menu closes when the focus leaves it.
CHOOSING = """
element.addEventListener('click', event => {
  const chosen = event.target.closest('button[data-run]');
  if (chosen) trigger('select', {run: chosen.dataset.run});
});
element.addEventListener('focusout', event => {
  for (const menu of element.querySelectorAll('details'))
    if (!menu.contains(event.relatedTarget)) menu.open = false;
});
"""
REFRESH, RELIST = "() => noraVision.refresh()", "() => document.getElementById('relist').click()"


def followed(component: gr.components.Component) -> gr.State:
    """A state with a copy of the value of `component`, for several listeners.

    If a component changes while a listener is running, Gradio calls all its listeners again, endlessly if two of them have the
    trigger mode "always_last". A state calls each listener independently.
    """
    state = gr.State()
    component.change(_identity, component, state, trigger_mode="always_last", **QUIET)
    return state


def take_files(event: Callable[..., Any], field: gr.components.Component, taken: gr.File) -> None:
    """At the `event` of an upload into `field`, move its files to the hidden field `taken` with several files.

    Gradio breaks an upload off when the server empties its field, and ignores one that ends while the files of another are added.
    """
    event(None, [field], [field, taken], js="files => [null, [files ?? []].flat()]", **QUIET)


class AppContext:
    """The components that the screens share, put into the open page.

    Args:
        page: the page.
        settings: the settings of the server.
        screens: the ids of all screens; the first one is open.
    """

    def __init__(self, page: gr.Blocks, settings: Settings, screens: Sequence[str]) -> None:
        self.page, self.settings = page, settings
        # The runs with their images, to choose from.
        self.picker = gr.HTML(js_on_load=CHOOSING, elem_id="run")
        # The ids of the subject run that Judge and Use show, of the classifier that Classify shows, of the arena that its screen
        # shows, and of the run of any kind that Train shows.
        self.run, self.class_run, self.arena, self.train_run = (gr.State(None) for _ in range(4))
        # The step whose adapter Use generates with; Use renders and fills it, Judge sets it.
        self.step = gr.Dropdown(label="Step", elem_id="use-step", interactive=True, render=False)
        # The run and the step that the user selected on Use or Judge; None for the recommended step.
        self.chosen = gr.State(None)
        # All screens, by their ids.
        self.tabs = gr.Tabs(elem_id="screens", overflow_behavior="wrap")
        # The settings of the next runs of both tasks, stored by the browser; never those of a run that was started. They are not
        # secret, and a key of this server process would lose them on a restart.
        keys = ("nora-vision-draft", "nora-vision-classify")
        self.draft, self.class_draft = (gr.BrowserState(Draft().to_browser(), storage_key=key, secret=key) for key in keys)
        # Before all other listeners, which then have what the user has entered last.
        for task, draft in (("subject", self.draft), ("classify", self.class_draft)):
            draft.change(None, [draft], [draft], js=f"draft => window.withLastEdit?.(draft, '{task}')", **QUIET)
        # A copy of `draft` whose change event several screens listen to.
        self.draft_changed = followed(self.draft)
        # The tabs that were put into `tabs`, by screen.
        self.opened: dict[str, gr.Tab] = {}
        # By screen, a hidden button that is clicked when that screen is open and should read the run's files again.
        self.refreshes = {name: gr.Button(visible="hidden", elem_id=f"refresh-{name}") for name in screens}
        # A hidden button that page.js clicks when a run has begun or ended.
        self.relist = gr.Button(visible="hidden", elem_id="relist")

    @property
    def outputs(self) -> list[gr.components.Component | gr.Tabs]:
        """The outputs of `show`."""
        return [self.run, self.class_run, self.arena, self.train_run, self.tabs]

    def show(self, workspace: Workspace, run_id: str | None = None, tab: str | None = None) -> list[Any]:
        """Updates of `outputs`: select `run_id` on Train and on the screens of its task, and open the screen `tab`.

        Args:
            run_id: if it is None or does not exist, the active run of each kind, else the newest.
            tab: None to leave the open one.
        """
        runs = views(workspace)
        opened = gr.skip() if tab is None else gr.Tabs(selected=tab)
        selected = next((view for view in runs if view.id == run_id), None)
        if selected is not None:
            by_task = {"subject": gr.skip(), "classify": gr.skip(), "arena": gr.skip(), selected.task: selected.id}
            return [*by_task.values(), selected.id, opened]
        return [_default([view for view in runs if view.task == "subject"]), gr.skip(), gr.skip(), _default(runs), opened]

    def show_while_open(
        self, screen: str, update: Callable[..., Any], draft: gr.BrowserState, outputs: Sequence[Any], *changed: gr.State
    ) -> None:
        """Show what `update` returns for `draft` when the user opens `screen`, and at a change of `changed` while it is open."""

        @wraps(update)
        def update_if_open(stored: dict[str, Any] | None, request: gr.Request) -> Any:
            return gr.skip() if stored is None else update(stored, request)

        # Asked in the page: if the server kept it, two quick choices of tabs could reach it in the wrong order.
        js = f"draft => [document.getElementById('screen-{screen}').checkVisibility() ? draft : null]"
        showing = {"fn": update_if_open, "inputs": [draft], "outputs": outputs, "js": js, **QUIET}
        self.opened[screen].select(trigger_mode="multiple", **showing)
        gr.on([state.change for state in changed], trigger_mode="always_last", **showing)

    def attach_refreshes(self) -> None:
        """Refresh the open screen when another run is selected; page.js does so when it opens and when a run has changed."""

        def choose(event: gr.EventData, request: gr.Request) -> list[Any]:
            workspace = self.settings.workspace(request)
            return self.show(workspace, workspace.run(event._data.get("run")).path.name)

        def listed(run_id: str | None, train_id: str | None, request: gr.Request) -> Markup:
            return pickers(views(self.settings.workspace(request)), run_id, train_id)

        def relist(run_id: str | None, train_id: str | None, request: gr.Request) -> list[Any]:
            ids = self.settings.workspace(request).run_ids()
            if all(chosen is None or chosen in ids for chosen in (run_id, train_id)) and (train_id is not None or not ids):
                return [gr.skip()] * len(self.outputs)
            # A run was deleted in another window, or the first one has begun.
            return self.show(self.settings.workspace(request), run_id if run_id in ids else None)

        chosen = [self.run, self.train_run]
        self.picker.select(choose, None, self.outputs, **QUIET)
        self.relist.click(relist, chosen, self.outputs, **QUIET).then(listed, chosen, self.picker, **QUIET)
        for state in chosen:
            state.change(listed, chosen, self.picker, **QUIET)
        for state in (*chosen, self.arena):
            state.change(None, js=REFRESH, **QUIET)


def pickers(runs: Sequence[RunView], run_id: str | None, train_id: str | None) -> Markup:
    """The runs to choose from, with the selected one: all of them for Train, subject runs for Judge and Use."""
    by_id = {view.id: view for view in runs}
    subjects = [view for view in runs if view.task == "subject"]
    menus = [("on-train", runs, by_id.get(train_id)), ("on-subject", subjects, by_id.get(run_id))]
    return render("pickers.html", menus=menus, face=face)


def face(view: RunView) -> Markup:
    """The image of a run."""
    path = view.face
    return Markup('<span class="none"></span>') if path is None else tile(ImageFile(path.name, path.parent), "")


def _default(runs: Sequence[RunView]) -> str | None:
    """The active run, else the newest; None without runs."""
    active = [view for view in runs if view.is_active]
    return next((view.id for view in [*active, *runs]), None)


def _identity(value: Any) -> Any:
    return value
