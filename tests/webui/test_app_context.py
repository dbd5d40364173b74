"""The app context: when each screen is refreshed, and that no requests are sent while no run is active."""

import warnings
from collections import Counter

import gradio as gr
import pytest
from run_folders import end_processes, run_in

from webui.page import SCREENS, build_page
from webui.settings import Settings
from webui.workspace import Workspace


@pytest.fixture
def workspace(tmp_path):
    """An empty workspace; the processes of its runs are killed at the end."""
    yield Workspace(tmp_path / "runs", tmp_path / "sets", is_local=True)
    end_processes()


@pytest.fixture
def page(workspace):
    """The page of the workspace."""
    return build_page(Settings(runs_dir=workspace.runs, sets_dir=workspace.sets))


def test_building_the_page_causes_no_warning_of_gradio(workspace):
    """For example, a component between tabs counts as a tab, and the active tab then exists twice."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        build_page(Settings(runs_dir=workspace.runs, sets_dir=workspace.sets))


def test_no_event_has_two_listeners_in_the_mode_always_last(page):
    """Gradio would call them in turn endlessly (see `webui.context.followed`)."""
    last = Counter(
        target for fn in page.fns.values() if fn.trigger_mode == "always_last" for target in fn.targets if fn.fn is not None
    )
    several = {(type(page.blocks.get(number)), event) for (number, event), count in last.items() if count > 1}
    assert several == {(gr.State, "change")}


def listener(page, name, of="AppContext.attach_refreshes"):
    found, *_ = [fn for fn in page.fns.values() if getattr(fn.fn, "__qualname__", "") == f"{of}.<locals>.{name}"]
    return found


def beating(updates):
    """The screens whose refresh trigger changed."""
    return [name for name, update in zip(SCREENS, updates, strict=True) if update != gr.skip()]


def test_a_tick_sends_one_request_and_refreshes_only_the_open_screen(page, workspace):
    ticking = [fn for fn in page.fns.values() if any(event == "tick" for _, event in fn.targets) and fn.name == "refresh"]
    assert len(ticking) == 1
    run_in(workspace.runs / "a")
    for front in SCREENS:
        _, clock, *refresh_triggers = listener(page, "refresh").fn(front, [["a", "running"]], None)
        assert beating(refresh_triggers) == [front]
        assert clock == gr.skip()


def test_the_clock_stops_one_tick_after_the_last_run_has_ended(page, workspace):
    run_in(workspace.runs / "a", "done")
    refresh = listener(page, "refresh").fn
    now, clock, *refresh_triggers = refresh("judge", [["a", "running"]], None)
    assert (now, clock, beating(refresh_triggers)) == ([["a", "done"]], gr.skip(), ["judge"])
    assert refresh("judge", now, None)[1].active is False


@pytest.mark.parametrize(("state", "goes"), [("queued", True), ("running", True), ("interrupted", False), ("done", False)])
def test_opening_a_screen_refreshes_it_and_starts_the_clock_if_a_run_is_active(page, workspace, state, goes):
    run_in(workspace.runs / "a", state)
    now, clock, *refresh_triggers = listener(page, "refresh_opened").fn("runs", None)
    assert now == [["a", state]]
    assert beating(refresh_triggers) == ["runs"]
    assert (clock != gr.skip() and clock.active) is goes


def test_the_page_opens_with_the_active_run_else_the_newest(page, workspace):
    come_back = listener(page, "on_load", of="build_page")
    assert come_back.fn(None)[0].value is None
    run_in(workspace.runs / "a", "running")
    run_in(workspace.runs / "b", "done")
    run, _, clock = come_back.fn(None)
    assert run.value == "a"
    assert [run_id for _, run_id in run.choices] == ["b", "a"]
    assert clock.active is True
