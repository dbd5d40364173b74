"""The app context: when each screen is refreshed, and what the page's address opens."""

import warnings
from collections import Counter

import gradio as gr
import pytest
from run_folders import end_processes, run_in

from webui.page import SCREENS, build_page
from webui.workspace import Settings, Workspace


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


def test_a_change_of_a_run_refreshes_only_the_open_screen(page, workspace):
    (button,) = [number for number, block in page.blocks.items() if getattr(block, "elem_id", None) == "refresh"]
    assert len([fn for fn in page.fns.values() if (button, "click") in fn.targets]) == 1
    run_in(workspace.runs / "a")
    for front in SCREENS:
        now, *refresh_triggers = listener(page, "refresh").fn(front, None)
        assert now == [["a", "running"]]
        assert beating(refresh_triggers) == [front]


def test_the_page_opens_with_the_active_run_else_the_newest(page, workspace):
    come_back = listener(page, "open_address", of="_follow_address")
    assert come_back.fn("", None)[0].value is None
    run_in(workspace.runs / "a", "running")
    run_in(workspace.runs / "b", "done")
    run, tabs = come_back.fn("?tab=nowhere&run=../b", None)
    assert (run.value, tabs) == ("a", gr.skip())
    assert [run_id for _, run_id in run.choices] == ["b", "a"]


def test_the_page_opens_with_the_run_and_the_screen_of_its_address(page, workspace):
    run_in(workspace.runs / "a", "running")
    run_in(workspace.runs / "b", "done")
    run, tabs = listener(page, "open_address", of="_follow_address").fn("?tab=judge&run=b", None)
    assert (run.value, tabs.selected) == ("b", "judge")
