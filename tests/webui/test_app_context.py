"""The app context: what every screen shows of the runs, and when it is refreshed."""

import asyncio
import json
import warnings
from collections import Counter

import gradio as gr
import pytest
from gradio.state_holder import StateHolder
from processes import apart
from run_folders import end_processes, run_in

from webui.context import AppContext, pickers
from webui.page import MAX_CLOSED_SESSIONS, SCREENS, UnreadResponses, build_page
from webui.runs import views
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
        target
        for fn in page.fns.values()
        for target in fn.targets
        # What follows another event is called alone.
        if fn.trigger_mode == "always_last" and fn.fn is not None and target[0] is not None
    )
    several = {(type(page.blocks.get(number)), event) for (number, event), count in last.items() if count > 1}
    assert several == {(gr.State, "change")}


def test_the_oldest_sessions_of_closed_pages_are_forgotten_with_their_unread_responses(page):
    """Also if one stays open; Gradio calls the listener whenever a page is closed or reloaded."""
    sessions, queue = StateHolder(), page._queue
    sessions.set_blocks(page)
    for number in range(MAX_CLOSED_SESSIONS + 2):
        sessions[str(number)].is_closed = number != 0
        queue.pending_messages_per_session[str(number)] = asyncio.Queue()
        queue.pending_messages_per_session[str(number)].put_nowait("unread")
    (forget,) = [fn.fn for fn in page.fns.values() if (None, "unload") in fn.targets]
    apart(forget())
    remembered = ["0", *map(str, range(2, MAX_CLOSED_SESSIONS + 2))]
    assert list(sessions.session_data) == list(sessions.time_last_used) == remembered
    assert [name for name, messages in queue.pending_messages_per_session.items() if messages.qsize()] == remembered
    # Gradio does so for each event stream of a session that is cut off, and the other streams fail if there is no queue.
    for _ in range(2):
        del queue.pending_messages_per_session["2"]
    assert queue.pending_messages_per_session["2"].empty()


def test_the_responses_of_the_oldest_sessions_are_forgotten():
    responses = UnreadResponses(2)
    for session in "abc":
        responses[session] = asyncio.Queue()
    assert list(responses) == ["b", "c"]


@pytest.fixture
def context(workspace):
    """The context of the page."""
    with gr.Blocks() as page:
        return AppContext(page, Settings(runs_dir=workspace.runs, sets_dir=workspace.sets), list(SCREENS))


def listener(page, name, of):
    (found,) = {fn.fn for fn in page.fns.values() if getattr(fn.fn, "__qualname__", "") == f"{of}.<locals>.{name}"}
    return found


def test_a_change_of_a_run_refreshes_only_the_open_screen_by_one_event(page):
    buttons = {block.elem_id: number for number, block in page.blocks.items() if str(block.elem_id or "").startswith("refresh-")}
    assert set(buttons) == {f"refresh-{name}" for name in SCREENS}
    asked = [fn for fn in page.fns.values() if (buttons["refresh-train"], "click") in fn.targets]
    assert len(asked) == 1


def test_the_page_opens_with_the_active_run_else_the_newest(context, workspace, page):
    open_address = listener(page, "open_address", "_follow_address")
    assert open_address("", None, None)[0] is None
    run_in(workspace.runs / "a", "running")
    run_in(workspace.runs / "b", "done")
    run_id, *_, train_id, tabs = open_address("?tab=nowhere&run=../b", None, None)
    assert (run_id, train_id, tabs) == ("a", "a", gr.skip())
    listed = pickers(views(workspace), run_id, train_id)
    assert listed.index('data-run="b" aria-pressed="false"') < listed.index('data-run="a" aria-pressed="true"')


def test_the_page_opens_with_the_run_of_its_address_and_leaves_the_screen_to_the_browser(workspace, page):
    run_in(workspace.runs / "a", "running")
    run_in(workspace.runs / "b", "done")
    run_id, *_, tabs = listener(page, "open_address", "_follow_address")("?tab=judge&run=b", None, None)
    assert (run_id, tabs) == ("b", gr.skip())


def test_a_classifier_is_shown_on_train_and_classify_and_leaves_the_subject_run_selected(context, workspace, page):
    run_in(workspace.runs / "a", "done")
    run = run_in(workspace.runs / "digits", "running")
    (run.path / "options.json").write_text(json.dumps({"target_layers": {}}))
    run_id, class_run, _, train_id, tabs = context.show(workspace, "digits", "classify")
    assert (run_id, class_run, train_id) == (gr.skip(), "digits", "digits")
    assert tabs.selected == "classify"
    run_id, *_, train_id, _ = context.show(workspace)
    assert (run_id, train_id) == ("a", "digits")
    open_address = listener(page, "open_address", "_follow_address")
    assert open_address("?tab=judge&run=digits", None, None)[:4] == ["a", "digits", gr.skip(), "digits"]
    assert open_address("?tab=judge&run=digits", "b", None)[:4] == [gr.skip(), "digits", gr.skip(), "digits"]
    of_train, of_subject = str(pickers(views(workspace), "a", "digits")).split("on-subject")
    assert 'data-run="digits"' in of_train
    assert "digits" not in of_subject


def test_a_run_deleted_in_another_window_is_replaced_by_another_one(context, workspace, page):
    run_in(workspace.runs / "a", "done")
    assert context.show(workspace, "gone")[0] == "a"
    relist = listener(page, "relist", "AppContext.attach_refreshes")
    assert relist("gone", "gone", None)[0] == "a"
    assert relist("a", "a", None) == [gr.skip()] * len(context.outputs)
