"""What all screens share: the run that is looked at, the tabs, and the clock that ticks while something is at work."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import gradio as gr

from webui.errors import in_plain_words
from webui.settings import Settings
from webui.views import ACTIVE, RunView, views
from webui.workspace import Workspace

POLL_SECONDS = 1.5
QUIET = {"api_visibility": "private", "show_progress": "hidden"}
EMPTY_DRAFT = {"set": None, "preset": "Balanced", "options": {}}


def followed(component: gr.components.Component) -> gr.State:
    """A state that holds what `component` does: what several are to listen to.

    Gradio answers a component's change that comes while a listener of the last one is at work by calling all of its listeners
    once more, and without end where two of them are to have the last word. A state calls each by itself.
    """
    state = gr.State()
    component.change(_as_it_is, component, state, trigger_mode="always_last", **QUIET)
    return state


@dataclass(frozen=True)
class AppContext:
    """What all screens share.

    Args:
        page: the page.
        settings: what the server was started with.
        run: the id of the run that Train, Judge and Use are about.
        picked: the same, to listen to.
        step: which of its steps Use draws with; Use places and fills it, Judge sets it.
        chosen: the run and the step that were chosen by hand, on Use or on Judge; None where the suggested step stands.
        tabs: all screens, by the ids of `webui.page.SCREENS`.
        draft: the settings of the next run, stored by the browser: {"set": id of its images or None, "options": the values that
            differ from the defaults, by group, "preset": its name}. Never the settings of a run that was started.
        draft_changed: a copy of `draft` whose change event follows it.
        class_draft: as `draft`, for the next classifier.
        clock: ticks every `POLL_SECONDS` while a run of the user's is at work, and stands still otherwise.
        active_tab: the name of the open screen.
        refresh_triggers: by screen, a state that changes whenever that screen is open and should read the run's files again.
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
    clock: gr.Timer
    active_tab: gr.State
    refresh_triggers: dict[str, gr.State]

    @property
    def outputs(self) -> list[gr.Dropdown | gr.Tabs | gr.Timer]:
        """What `show` sets, in its order."""
        return [self.run, self.tabs, self.clock]

    def show(self, workspace: Workspace, run_id: str | None = None, tab: str | None = None) -> list[dict[str, object]]:
        """Updates of `outputs`: all runs of the workspace to choose from, `run_id` chosen, and the screen `tab` open.

        Args:
            run_id: None for the one at work, else the newest.
            tab: None for the one that is there.
        """
        runs = views(workspace)
        at_work = [view for view in runs if view.is_active]
        if run_id not in [view.id for view in runs]:
            run_id = next((view.id for view in [*at_work, *runs]), None)
        in_front = gr.skip() if tab is None else gr.Tabs(selected=tab)
        return [gr.Dropdown(choices=_choices(runs), value=run_id), in_front, gr.Timer(active=bool(at_work))]

    def keep_time(self, opened: Mapping[str, gr.Tab]) -> None:
        """Have the open screen look again when it opens, when another run is chosen, and at every tick.

        The others look when they are opened: however many screens there are, a tick asks the server for one of them.

        Args:
            opened: the tabs, by their screens' names.
        """
        known_runs = gr.State([])
        refresh_triggers = list(self.refresh_triggers.values())

        @in_plain_words
        def refresh(active_tab: str, before: list[list[str]], request: gr.Request) -> list[Any]:
            now = self._states(request)
            # One tick after the last run has ended, so that whoever is looking sees how.
            clock = gr.Timer(active=False) if now == before and not _any_active(now) else gr.skip()
            return [now, clock, *self._refresh_triggers_of(active_tab)]

        @in_plain_words
        def come_to_front(name: str, request: gr.Request) -> list[Any]:
            now = self._states(request)
            return [now, gr.Timer(active=True) if _any_active(now) else gr.skip(), *self._refresh_triggers_of(name)]

        @in_plain_words
        def name_anew(request: gr.Request) -> gr.Dropdown:
            return gr.Dropdown(choices=_choices(views(self.settings.workspace(request))))

        self.clock.tick(
            refresh,
            [self.active_tab, known_runs],
            [known_runs, self.clock, *refresh_triggers],
            trigger_mode="always_last",
            **QUIET,
        )
        for name, tab in opened.items():
            tab.select(partial(_name, name), None, self.active_tab, **QUIET)
        for begun in (self.page.load, self.picked.change, self.active_tab.change):
            begun(come_to_front, self.active_tab, [known_runs, self.clock, *refresh_triggers], **QUIET)
        # By itself: as an output of each look the list of runs would say each time that it has changed, and call for another.
        known_runs.change(name_anew, None, self.run, **QUIET)

    def _states(self, request: gr.Request) -> list[list[str]]:
        """The id and the state of every run."""
        return [[view.id, view.state] for view in views(self.settings.workspace(request))]

    def _refresh_triggers_of(self, active_tab: str) -> list[Any]:
        return [time.time() if name == active_tab else gr.skip() for name in self.refresh_triggers]


def _name(name: str) -> str:
    return name


def _as_it_is(value: Any) -> Any:
    return value


def _any_active(states: list[list[str]]) -> bool:
    return any(state in ACTIVE for _, state in states)


def _choices(runs: list[RunView]) -> list[tuple[str, str]]:
    return [(view.title, view.id) for view in runs]
