"""What the screens share: the selected run, the tabs and the drafts; errors as sentences; updates sent once."""

from __future__ import annotations

import functools
import html
import inspect
import logging
import secrets
import time
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ParamSpec, TypeVar

import gradio as gr

from pipelines.errors import InputError
from webui.runs import RunView, views
from webui.workspace import Settings, Workspace

Arguments, Result = ParamSpec("Arguments"), TypeVar("Result")
logger = logging.getLogger(__name__)


def show_errors(handler: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Wrap an event handler (a function, generator or coroutine), so that the page shows its errors as one sentence.

    An InputError is an error of the user and names the remedy. Any other error is logged under a short number that the page
    shows. A generator that is closed, for example by a cancelled event, ends as it would without the wrapper.
    """
    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def wrapped(*arguments: Arguments.args, **named: Arguments.kwargs) -> Generator:
            with _plain_errors():
                return (yield from handler(*arguments, **named))

    elif inspect.iscoroutinefunction(handler):

        @functools.wraps(handler)
        async def wrapped(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
            with _plain_errors():
                return await handler(*arguments, **named)

    else:

        @functools.wraps(handler)
        def wrapped(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
            with _plain_errors():
                return handler(*arguments, **named)

    return wrapped


@contextmanager
def _plain_errors() -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise gr.Error(html.escape(str(error), quote=False), title="That does not work yet", print_exception=False) from error
    except gr.Error:
        raise
    except Exception as error:
        # The browser must not see a traceback.
        number = secrets.token_hex(3)
        logger.exception("error %s", number)
        sentence = f"Internal error {number}. Your runs and images are not affected. The server's log has the details."
        raise gr.Error(sentence, title="Error", print_exception=False) from error


@dataclass(frozen=True)
class LazyUpdate:
    """The update of one component, made only when needed.

    Args:
        key: differs whenever the content differs.
        make: returns the update.
    """

    key: Hashable
    make: Callable[[], Any]


def text(value: str) -> LazyUpdate:
    """HTML, hidden if empty."""
    return LazyUpdate(value, lambda: gr.HTML(value=value, visible=bool(value)))


def lazy_text(key: Hashable, make: Callable[[], str]) -> LazyUpdate:
    """HTML that is slow to make, hidden if empty."""

    def update() -> gr.HTML:
        value = make()
        return gr.HTML(value=value, visible=bool(value))

    return LazyUpdate(key, update)


def button(visible: bool, label: str | None = None) -> LazyUpdate:
    """A button, visible or hidden."""
    return LazyUpdate(
        (visible, label), lambda: gr.Button(visible=visible) if label is None else gr.Button(label, visible=visible)
    )


def frame(visible: bool) -> LazyUpdate:
    """An accordion, visible or hidden."""
    return LazyUpdate(visible, lambda: gr.Accordion(visible=visible))


def updates(now: Mapping[str, LazyUpdate], seen: Mapping[str, Hashable], names: Iterable[str]) -> list[Any]:
    """The updates of the outputs `names`; `gr.skip()` for those that the page shows already.

    Args:
        now: the current content.
        seen: the keys of what was sent before.
    """
    return [gr.skip() if name in seen and seen[name] == now[name].key else now[name].make() for name in names]


def keys(now: Mapping[str, LazyUpdate]) -> dict[str, Hashable]:
    """The keys of the current content, stored only to send less."""
    return {name: update.key for name, update in now.items()}


QUIET = {"api_visibility": "private", "show_progress": "hidden"}


def followed(component: gr.components.Component) -> gr.State:
    """A state with a copy of the value of `component`, for several listeners.

    If a component changes while a listener is running, Gradio calls all its listeners again, endlessly if two of them have the
    trigger mode "always_last". A state calls each listener independently.
    """
    state = gr.State()
    component.change(_identity, component, state, trigger_mode="always_last", **QUIET)
    return state


@dataclass(frozen=True)
class AppContext:
    """The components that the screens share.

    Args:
        page: the page.
        settings: the settings of the server.
        run: the id of the run that Train, Judge and Use show.
        picked: a copy of `run` whose change event several screens listen to.
        step: the step whose adapter Use generates with; Use renders and fills it, Judge sets it.
        chosen: the run and the step that the user selected on Use or Judge; None for the recommended step.
        tabs: all screens, by the ids of `webui.page.SCREENS`.
        draft: the settings of the next runs, stored by the browser; see `Draft`. Never the settings of a run that was started.
        draft_changed: a copy of `draft` whose change event several screens listen to.
        class_draft: the same as `draft` for the next classifier.
        refresh: a hidden button that page.js clicks when a run has changed.
        active_tab: the name of the open screen.
        refresh_triggers: by screen, a state that changes when that screen is open and should read the run's files again.
    """

    page: gr.Blocks
    settings: Settings
    run: gr.Dropdown
    picked: gr.State
    step: gr.Dropdown
    chosen: gr.State
    tabs: gr.Tabs
    draft: gr.BrowserState
    draft_changed: gr.State
    class_draft: gr.BrowserState
    refresh: gr.Button
    active_tab: gr.State
    refresh_triggers: dict[str, gr.State]

    @property
    def outputs(self) -> list[gr.Dropdown | gr.Tabs]:
        """The outputs of `show`."""
        return [self.run, self.tabs]

    def show(self, workspace: Workspace, run_id: str | None = None, tab: str | None = None) -> list[dict[str, object]]:
        """Updates of `outputs`: lists all runs of the workspace, selects `run_id` and opens the screen `tab`.

        Args:
            run_id: None for the active run, else the newest.
            tab: None to leave the open one.
        """
        runs = views(workspace)
        if run_id not in [view.id for view in runs]:
            active = [view for view in runs if view.is_active]
            run_id = next((view.id for view in [*active, *runs]), None)
        opened = gr.skip() if tab is None else gr.Tabs(selected=tab)
        return [gr.Dropdown(choices=_choices(runs), value=run_id), opened]

    def attach_refreshes(self, opened: Mapping[str, gr.Tab]) -> None:
        """Refresh the open screen when it opens, when another run is selected, and when a run has changed.

        Only the open screen is refreshed, so this costs the same whatever the number of screens.

        Args:
            opened: the tabs by screen name.
        """
        known_runs = gr.State([])

        @show_errors
        def refresh(active_tab: str, request: gr.Request) -> list[Any]:
            runs = views(self.settings.workspace(request))
            return [[[view.id, view.state] for view in runs], *self._refresh_triggers_of(active_tab)]

        @show_errors
        def update_choices(request: gr.Request) -> gr.Dropdown:
            return gr.Dropdown(choices=_choices(views(self.settings.workspace(request))))

        for name, tab in opened.items():
            tab.select(partial(_name, name), None, self.active_tab, **QUIET)
        begun = [self.page.load, self.refresh.click, self.picked.change, self.active_tab.change]
        gr.on(begun, refresh, self.active_tab, [known_runs, *self.refresh_triggers.values()], trigger_mode="always_last", **QUIET)
        # A separate listener: as an output of each refresh, the list of runs would change and trigger another one.
        known_runs.change(update_choices, None, self.run, **QUIET)

    def _refresh_triggers_of(self, active_tab: str) -> list[Any]:
        return [time.time() if name == active_tab else gr.skip() for name in self.refresh_triggers]


def _name(name: str) -> str:
    return name


def _identity(value: Any) -> Any:
    return value


def _choices(runs: list[RunView]) -> list[tuple[str, str]]:
    return [(view.title, view.id) for view in runs]
