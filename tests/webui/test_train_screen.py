"""The screen Train: it shows the content of the run's files in every state, and a refresh is cheap."""

import json
import os

import gradio as gr
import pytest
from run_folders import PROMPTS, add_checkpoint, add_samples, end_processes, finished_run, measure, run_in

from training.runs.record import RunRecord
from training.runs.run_log import LOG
from webui import progress
from webui.context import updates
from webui.page import build_page
from webui.progress import duration, plain_error
from webui.runs import RunView
from webui.screens.train import BUTTONS, parts, view_of
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
    found = parts(look)
    assert shown(found) == set(look.actions) & set(BUTTONS)
    assert found["next"].key == (state == "done", "Judge the result")
    assert state in found["head"].key


def test_without_a_run_and_after_its_deletion_the_screen_says_what_to_do(workspace):
    assert view_of(workspace, None) is None
    assert view_of(workspace, "gone") is None
    assert view_of(workspace, "../..") is None
    found = parts(None)
    assert "Add a few photos" in found["empty"].key
    assert shown(found) == set()


def test_training_shows_steps_remaining_time_and_a_progress_bar(workspace):
    bar = parts(view(run_in(workspace.runs / "a", steps=25, total=100)))["bar"].key
    assert 'aria-valuenow="25"' in bar
    assert "width:25.0%" in bar
    assert "25 of 100 steps, 40 seconds left" in bar


def test_a_phase_of_unknown_length_has_a_progress_bar_without_a_value(workspace):
    found = parts(view(run_in(workspace.runs / "a", phase="calibrating", total=None)))
    assert "aria-valuenow" not in found["bar"].key
    assert "Calibrating: measuring" in found["head"].key


def test_the_progress_of_a_cross_validation_fold_is_read_from_its_folder(workspace):
    run = run_in(workspace.runs / "a", phase="cross_validation", fold=2, total=None)
    part = run_in(run.path / "folds" / "1", steps=30, total=60)
    found = parts(view(run))
    assert "without photo 2" in found["head"].key
    assert "step 30 of 60" in found["bar"].key
    assert found["loss"].key == progress.losses(view(part)) != ""


def test_a_classifier_shows_its_trainings_and_plots_the_current_one(workspace):
    trial = "trials/16-shots/seed-1/nora"
    run = run_in(workspace.runs / "a", phase="fitting nora, 16 shots, seed 1", step=3, total=4, trial=trial)
    (run.path / "options.json").write_text(json.dumps({"target_layers": {}}))
    run_in(run.path / trial, steps=10, total=20)
    found = parts(view(run))
    assert "Training nora, 16 shots, seed 1" in found["head"].key
    assert "width:87.5%" in found["bar"].key
    assert "Training loss" in found["loss"].key
    assert found["next"].key[1] == "See the classifier"


@pytest.mark.parametrize("trial", ["../../other", "/etc", 3, "trials/none"])
def test_a_trial_outside_of_the_run_s_folder_is_not_read(workspace, trial):
    run_in(workspace.runs / "other", steps=3)
    look = view(run_in(workspace.runs / "a" / "b", trial=trial))
    assert progress.current_part(look) == look.record


def test_an_ended_run_shows_the_reason_and_where_resume_continues(workspace):
    run = run_in(workspace.runs / "a", "interrupted", steps=70)
    assert "No checkpoint was saved. Resume starts again" in parts(view(run))["head"].key
    add_checkpoint(run, 50)
    head = parts(view(run))["head"].key
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
    found = parts(view(run), log_open=True)
    page = "".join(found[name].make().value for name in ("head", "bar", "loss", "samples", "log"))
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "<b>in the snow" not in page
    assert "&lt;b&gt;in the snow" in page


def test_samples_are_shown_newest_first_as_copies_in_the_cache(workspace, tmp_path):
    run = run_in(workspace.runs / "a", steps=60)
    assert "Sample images appear here" in parts(view(run))["samples"].make().value
    for step in (0, 20, 40):
        add_samples(run, step)
    made = parts(view(run))["samples"].make().value
    places = [made.index(words) for words in ("After step 40", "After step 20", "Before training", "Your photos")]
    assert places == sorted(places)
    assert made.count("<img") == 3 * len(PROMPTS) + 1
    assert str(run.path) not in made
    assert made.count(f"gradio_api/file={tmp_path / 'cache'}") == made.count("<img")


def test_small_images_are_not_smoothed_and_large_ones_are_downscaled(workspace):
    run = run_in(workspace.runs / "a", steps=60)
    add_samples(run, 20, side=64)
    add_samples(run, 40, side=1024)
    made = parts(view(run))["samples"].make().value
    assert made.count('class="pixel"') == len(PROMPTS)
    assert made.count(".webp") == len(PROMPTS) + 1


def test_images_that_gradio_deleted_from_its_cache_are_copied_again(workspace, tmp_path):
    run = run_in(workspace.runs / "a", steps=60)
    add_samples(run, 20)
    first = parts(view(run))["samples"].make().value
    for copy in (tmp_path / "cache").rglob("*.png"):
        copy.unlink()
    assert parts(view(run))["samples"].make().value == first
    assert list((tmp_path / "cache").rglob("*.png"))


def test_costs_and_curves_have_the_values_of_the_files(workspace):
    run = run_in(workspace.runs / "a", steps=40)
    measure(run)
    report = {"seconds_per_step": 0.25, "seconds": 100.0, "peak_memory": 2.5e9, "disk": 3e6, "trained_numbers": 54_272}
    report |= {"checkpoint": 1e6, "disk_free": 1e9, "memory_limit": None}
    (run.path / "dry_run.json").write_text(json.dumps(report))
    found = parts(view(run))
    assert all(words in found["cost"].key for words in ("about 2 minutes", "0.25 s a step", "2.5 GB", "3 MB", "54,272 trainable"))
    assert "left out" not in found["cost"].key
    status = json.loads((run.path / "status.json").read_text())
    (run.path / "status.json").write_text(json.dumps({**status, "expected_left_out": 0.789}))
    assert "about 79% of the weight change is expected to be left out" in parts(view(run))["cost"].key
    (table,) = [part for part in found["loss"].key.split("<table")[1:] if "<th>validation loss" in part]
    assert "<td>40</td><td>1</td>" in table, "the least of the curve"


@pytest.mark.parametrize(("seconds", "words"), [(3, "5 seconds"), (42, "40 seconds"), (61, "1 minute"), (9000, "2.5 hours")])
def test_durations_are_rounded(seconds, words):
    assert duration(seconds) == words


def handler(tmp_path):
    """The listener that refreshes the screen."""
    page = build_page(Settings(runs_dir=tmp_path / "runs", sets_dir=tmp_path / "sets"))
    (found, *_) = [
        fn for fn in page.fns.values() if "train-phase" in [output.elem_id for output in fn.outputs if hasattr(output, "elem_id")]
    ]
    return found


def test_a_refresh_with_500_points_sends_only_the_changed_curves(workspace, tmp_path):
    run = run_in(workspace.runs / "a", steps=500, total=1000)
    measure(run)
    for step in (0, 100, 200, 300):
        add_samples(run, step)
    refresh = handler(tmp_path).fn
    *_, seen = refresh("a", {}, False, None)
    for step in range(501, 504):
        run.log(step, loss=1.0, lr=1e-3)
        *sent, seen = refresh("a", seen, False, None)
        changed = [each for each in sent if each != gr.skip()]
        assert [each.elem_id for each in changed if each.elem_id] == []
        assert len(changed) == 1, "the curves alone"
        assert len(changed[0].value) < 25_000
    *sent, _ = refresh("a", seen, False, None)
    assert all(each == gr.skip() for each in sent)


def test_the_log_is_sent_only_if_it_is_open(workspace):
    run = run_in(workspace.runs / "a", steps=5)
    (run.path / LOG).write_text("one\ntwo\n")
    assert parts(view(run))["log"].key == ""
    assert "one\ntwo" in parts(view(run), log_open=True)["log"].key


def test_showing_a_run_writes_nothing_to_its_directory(workspace):
    run = finished_run(workspace.runs / "a")
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    for part in parts(view(run), log_open=True).values():
        part.make()
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before


def test_an_update_is_made_only_if_its_key_changed():
    def fails():
        raise AssertionError

    found = parts(None)
    same = {name: part.key for name, part in found.items()}
    unmade = {name: type(part)(part.key, fails) for name, part in found.items()}
    assert updates(unmade, same, found) == [gr.skip()] * len(found)


def test_the_newest_contact_sheet_is_shown_if_there_are_no_single_samples(workspace):
    run = run_in(workspace.runs / "a", steps=5)
    add_samples(run, 1)
    sheet = next(run.samples_at(1).glob("*.png"))
    os.replace(sheet, run.samples / "step-0000003.png")
    for left in run.samples_at(1).iterdir():
        left.unlink()
    run.samples_at(1).rmdir()
    assert 'alt="sample images"' in parts(view(run))["samples"].make().value
