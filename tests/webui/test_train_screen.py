"""The screen Train: it shows the content of the run's files in every state, and a refresh is cheap."""

import json
import os
import re
import time

import gradio as gr
import pytest
from run_folders import PROMPTS, add_checkpoint, add_samples, end_processes, finished_run, measure, run_in

from training.runs.record import RunRecord
from training.runs.run_log import LOG
from webui.page import build_page
from webui.render import LazyUpdate, updates
from webui.runs import RunView, duration, plain_error, view_of
from webui.screens.train import BUTTONS, contents, current_part, losses
from webui.workspace import Settings, Workspace

STATES = ["queued", "starting", "running", "interrupted", "stopped", "failed", "done"]


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """An empty workspace; the processes of its runs are killed at the end."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))
    yield Workspace(tmp_path / "runs", tmp_path / "sets", is_local=True)
    end_processes()


def view(run):
    return RunView(RunRecord(run.path))


def shown(found):
    """The names of the visible buttons."""
    return {name for name in BUTTONS if found[name].key[0]}


@pytest.mark.parametrize("state", STATES)
def test_the_buttons_depend_on_the_state(workspace, state):
    look = view(run_in(workspace.runs / "a", state, steps=5, error="ValueError: no" if state == "failed" else None))
    found = contents(look)
    assert shown(found) == {*look.actions, *(("next",) if state == "done" else ())} & set(BUTTONS)
    assert f'data-state="{state}"' in found["state"].key


def test_without_a_run_and_after_its_deletion_the_screen_says_what_to_do(workspace):
    assert view_of(workspace, None) is None
    assert view_of(workspace, "gone") is None
    assert view_of(workspace, "../..") is None
    found = contents(None)
    assert "Add a few photos" in found["state"].key
    assert shown(found) == set()
    assert found.keys() == contents(view(run_in(workspace.runs / "a"))).keys()


def test_one_bar_shows_the_share_of_the_whole_run_and_the_total_time_left(workspace):
    now = {"heartbeat": time.time(), "share": 0.34, "seconds_left": 182.0}
    shown = contents(view(run_in(workspace.runs / "a", steps=25, total=100, **now)))["state"].key
    assert 'aria-valuenow="34"' in shown
    assert "scaleX(0.34)" in shown
    assert "34% · step 25 of 100 · 3 minutes left" in shown


def test_a_run_whose_share_is_unknown_has_a_bar_without_a_value(workspace):
    for state, phase in (("starting", None), ("running", "calibrating")):
        shown = contents(view(run_in(workspace.runs / state, state, phase=phase, total=None)))["state"].key
        assert 'class="bar ' + state + ' unknown"' in shown
        assert "aria-valuenow" not in shown
        assert "scaleX" not in shown
    assert "Calibrating: measuring" in shown


def test_the_plan_of_a_run_shows_what_is_done_and_what_follows(workspace):
    names = ["loading", "sampling", "dry run", "cross_validation", "cross_validation", "training", "exporting", "comparing"]
    plan = [{"name": name, "number": None, "seconds": 1.0} for name in names]
    run = run_in(workspace.runs / "a", phase="cross_validation", fold=2, folds=4, total=None, plan=plan)
    part = run_in(run.path / "folds" / "1", steps=30, total=60)
    found = contents(view(run))
    assert "Cross-validation, fold 2 of 4" in found["state"].key
    marks = re.findall(r'<li class="(\w+)"[^>]*>([^<]+)', found["state"].key)
    assert marks == [
        ("done", "Preparing"), ("now", "Cross-validation"), ("later", "Training"), ("later", "Export"), ("later", "Scoring"),
    ]  # fmt: skip
    assert found["loss"].key == contents(view(part))["loss"].key
    assert found["loss"].key is not None


def test_a_stopped_run_has_at_least_the_steps_of_its_newest_checkpoint(workspace):
    run = run_in(workspace.runs / "a", "stopped", steps=25, total=160)
    add_checkpoint(run, 26)
    shown = contents(view(run))["state"].key
    assert "26 of 160 steps were done" in shown
    assert "Everything up to step 26 is saved." in shown


def test_a_classifier_plots_its_current_training(workspace):
    trial = "trials/16-shots/seed-1/nora"
    run = run_in(workspace.runs / "a", phase="fitting nora, 16 shots, seed 1", step=3, total=4, trial=trial)
    (run.path / "options.json").write_text(json.dumps({"target_layers": {}}))
    run_in(run.path / trial, steps=10, total=20)
    assert view(run).headline == "Training NoRA, 16 images per class, seed 1"
    assert view(run).progress.startswith("training 3 of 4")
    assert len(losses(view(run))["loss"].series["each step"]) == 10


@pytest.mark.parametrize("trial", ["../../other", "/etc"])
def test_a_trial_outside_of_the_run_s_folder_is_not_read(workspace, trial):
    run_in(workspace.runs / "other", steps=3)
    look = view(run_in(workspace.runs / "a" / "b", trial=trial))
    assert current_part(look) == look.record


def test_an_ended_run_shows_the_reason_and_where_resume_continues(workspace):
    run = run_in(workspace.runs / "a", "interrupted", steps=70)
    assert "No checkpoint was saved. Resume starts again" in contents(view(run))["state"].key
    add_checkpoint(run, 50)
    head = contents(view(run))["state"].key
    assert "70 of 100 steps were done" in head
    assert "Perhaps the machine was switched off. Everything up to step 50 is saved. Resume continues from there." in head


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ("InputError: The folder is empty. Add photos.", "The folder is empty. Add photos."),
        ("NotFiniteError: The loss of step 3 is nan.", "The loss of step 3 is nan."),
        ("DiskFullError: The disk of 'x' is full; use --resume_from_checkpoint", "The disk is full. Free some space"),
        ("OutOfMemoryError: CUDA out of memory. Tried", "Out of memory. Lower the batch size"),
        ("RuntimeError: CUDA error: out of memory", "Out of memory."),
        ("KeyError: 'x'", "Error: KeyError 'x'. Press Resume to try again"),
        (None, "The run ended without an error message. Press Resume"),
    ],
)
def test_errors_are_shown_with_the_remedy_and_without_flags(error, told):
    assert plain_error(error).startswith(told)
    assert "--" not in plain_error(error)


def test_user_input_and_errors_are_escaped(workspace):
    run = run_in(workspace.runs / "a", "failed", steps=3, error="InputError: <script>alert(1)</script>")
    add_samples(run, 0)
    (run.path / LOG).write_text("<img src=x onerror=alert(1)>\n")
    found = contents(view(run), log_open=True)
    page = "".join(found[name].make().value for name in ("state", "samples", "log"))
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "<b>in the snow" not in page
    assert "&lt;b&gt;in the snow" in page


def test_samples_are_in_the_order_of_the_training_as_copies_in_the_cache(workspace, tmp_path):
    run = run_in(workspace.runs / "a", steps=60)
    assert "Sample images appear here" in contents(view(run))["samples"].make().value
    for step in (0, 20, 40):
        add_samples(run, step)
    made = contents(view(run))["samples"].make().value
    places = [made.index(words) for words in ("Before training", "After step 20", "After step 40", "Training images")]
    assert places == sorted(places)
    assert made.count("<img") == 3 * len(PROMPTS) + 1
    assert str(run.path) not in made
    assert made.count(f"gradio_api/file={tmp_path / 'cache'}") == made.count("<img")


def test_small_images_are_not_smoothed_and_large_ones_are_downscaled(workspace):
    run = run_in(workspace.runs / "a", steps=60)
    add_samples(run, 20, side=64)
    add_samples(run, 40, side=1024)
    made = contents(view(run))["samples"].make().value
    assert made.count('class="pixel"') == len(PROMPTS)
    assert made.count(".webp") == len(PROMPTS) + 1


def test_images_that_gradio_deleted_from_its_cache_are_copied_again(workspace, tmp_path):
    run = run_in(workspace.runs / "a", steps=60)
    add_samples(run, 20)
    first = contents(view(run))["samples"].make().value
    for copy in (tmp_path / "cache").rglob("*.png"):
        copy.unlink()
    assert contents(view(run))["samples"].make().value == first
    assert list((tmp_path / "cache").rglob("*.png"))


def test_costs_and_curves_have_the_values_of_the_files(workspace):
    run = run_in(workspace.runs / "a", steps=40)
    measure(run)
    report = {"seconds_per_step": 0.25, "seconds": 100.0, "peak_memory": 2.5e9, "disk": 3e6, "trained_numbers": 54_272}
    report |= {"checkpoint": 1e6, "disk_free": 1e9, "memory_limit": None}
    (run.path / "dry_run.json").write_text(json.dumps(report))
    found = contents(view(run))
    assert all(
        words in found["facts"].key for words in ("about 2 minutes", "0.25 s a step", "2.5 GB", "3 MB", "54,272 trainable")
    )
    assert "left out" not in found["facts"].key
    status = json.loads((run.path / "status.json").read_text())
    (run.path / "status.json").write_text(json.dumps({**status, "expected_left_out": 0.789}))
    assert "about 79% of the weight change is expected to be left out" in contents(view(run))["facts"].key
    (table,) = [part for part in found["values"].key.split("<table")[1:] if "<th>validation loss" in part]
    assert "<td>40</td><td>1</td>" in table, "the least of the curve"


@pytest.mark.parametrize(
    ("seconds", "words"), [(3, "5 seconds"), (42, "40 seconds"), (86, "85 seconds"), (190, "3 minutes"), (9000, "2.5 hours")]
)
def test_durations_are_rounded(seconds, words):
    assert duration(seconds) == words


def refreshing(tmp_path):
    """The listener that refreshes the screen; it returns the updates by component, and the next state."""
    page = build_page(Settings(runs_dir=tmp_path / "runs", sets_dir=tmp_path / "sets"))
    (found, *_) = [fn for fn in page.fns.values() if "train-state" in [getattr(one, "elem_id", None) for one in fn.outputs]]

    def refresh(seen):
        sent = found.fn("a", seen, False, None)
        (state,) = [each for each in sent if isinstance(each, gr.State)]
        return sent, sent.pop(state)

    return refresh


def test_a_refresh_with_500_points_sends_only_the_changed_curves(workspace, tmp_path):
    run = run_in(workspace.runs / "a", steps=500, total=1000)
    measure(run)
    for step in (0, 100, 200, 300):
        add_samples(run, step)
    refresh = refreshing(tmp_path)
    _, seen = refresh({})
    for step in range(501, 504):
        run.log(step, loss=1.0, lr=1e-3)
        sent, seen = refresh(seen)
        assert {type(each) for each in sent} <= {gr.LinePlot, gr.HTML}
        assert [each.elem_id for each in sent if isinstance(each, gr.HTML) and each.elem_id] == []
    assert refresh(seen) == ({}, seen)


def test_the_log_is_sent_only_if_it_is_open(workspace):
    run = run_in(workspace.runs / "a", steps=5)
    (run.path / LOG).write_text("one\ntwo\n")
    assert contents(view(run))["log"].key == ""
    assert "one\ntwo" in contents(view(run), log_open=True)["log"].key


def test_showing_a_run_writes_nothing_to_its_directory(workspace):
    run = finished_run(workspace.runs / "a")
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    for part in contents(view(run), log_open=True).values():
        part.make()
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before


def test_an_update_is_made_only_if_its_key_changed():
    def fails():
        raise AssertionError

    same = {name: part.key for name, part in contents(None).items()}
    unmade = {name: LazyUpdate(key, fails) for name, key in same.items()}
    sees, one = gr.State(), gr.HTML()
    assert updates(unmade, same, {}, sees) == {sees: same}
    changed = {"state": LazyUpdate("other", lambda: "new")}
    assert updates(unmade | changed, same, {"state": one}, sees) == {one: "new", sees: {**same, "state": "other"}}


def test_the_newest_contact_sheet_is_shown_if_there_are_no_single_samples(workspace):
    run = run_in(workspace.runs / "a", steps=5)
    add_samples(run, 1)
    sheet = next(run.samples_at(1).glob("*.png"))
    os.replace(sheet, run.samples / "step-0000003.png")
    for left in run.samples_at(1).iterdir():
        left.unlink()
    run.samples_at(1).rmdir()
    assert 'alt="sample images"' in contents(view(run))["samples"].make().value
