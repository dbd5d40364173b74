"""RunView: derived from the run's files, whatever happened to its process, and cheap to read."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from statistics import median

import psutil
import pytest
from PIL import Image
from run_folders import add_report, add_samples, finished_run, measure, process_of, run_in

from pipelines.fewshot.metric_values import Interval
from training.options.data import SAMPLE_SUBJECT
from training.runs import run_requests
from training.runs.naming import set_title
from training.runs.record import RunRecord
from training.runs.run_files import Launch, RunStatus
from training.runs.run_log import LOG, ended_by, last_error
from training.runs.snapshot import ACTIONS
from training.runs.waiting import QUEUE, Ticket
from webui.render import render
from webui.runs import RunView, series, views
from webui.screens import judge
from webui.screens.runs import cards, contents
from webui.screens.train import losses
from webui.workspace import Workspace

KILLED = "subprocess.CalledProcessError: Command '[...]' died with <Signals.SIGKILL: 9>.\n"


@pytest.fixture
def workspace(tmp_path):
    """An empty workspace; the processes of its runs are killed at the end."""
    yield Workspace(tmp_path / "runs", tmp_path / "sets", is_local=True)
    for child in psutil.Process().children():
        if child.name() == "sleep":
            child.kill()
            child.wait()


def view(run):
    return RunView(RunRecord(run.path))


def train_state(look):
    return render("train.html", view=look)


@pytest.mark.parametrize("told", ["queued", "starting", "running", "stopped", "failed", "done"])
def test_the_state_is_that_of_the_status_if_the_process_is_alive_or_reported_its_end(workspace, told):
    run = run_in(workspace.runs / "a", told, error="ValueError: no" if told == "failed" else None)
    assert view(run).state == told
    assert view(run).is_active == (told in ("queued", "starting", "running"))
    assert view(run).actions == ACTIONS[told]


@pytest.mark.parametrize("told", ["queued", "starting", "running"])
def test_a_run_whose_process_ended_silently_was_interrupted_or_stopped_on_request(workspace, told):
    run = run_in(workspace.runs / "a", "interrupted")
    replace(run.status(), state=told).write(run.path)
    assert view(run).state == "interrupted"
    assert view(run).reason == "Its process ended without reporting an error. Perhaps the machine was switched off."
    (run.path / LOG).write_text(f"$ accelerate launch\n{KILLED}")
    assert view(run).reason == "Its process was killed, probably by the system because memory ran out."
    run_requests.ask(run, run_requests.STOP)
    assert (view(run).state, view(run).reason) == ("stopped", "You stopped it.")


def test_another_process_with_the_same_id_is_not_the_run_s_process(workspace):
    run = run_in(workspace.runs / "a", "running")
    replace(run.status(), pid_started=12.5).write(run.path)
    assert view(run).state == "interrupted"


def test_a_zombie_does_not_count_as_alive(workspace):
    run = run_in(workspace.runs / "a", "interrupted")
    child = subprocess.Popen([sys.executable, "-c", ""])
    started = psutil.Process(child.pid).create_time()
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    (run.path / "status.json").write_text(json.dumps({"state": "running", "pid": child.pid, "pid_started": started}))
    assert view(run).state == "interrupted"
    child.wait()


def test_a_run_without_a_status_is_starting_for_some_seconds(workspace):
    path = workspace.new_run()
    Launch("subject", created=time.time()).write(path)
    assert RunView(workspace.run(path.name)).state == "starting"
    Launch("subject", created=time.time() - 60).write(path)
    assert RunView(workspace.run(path.name)).state == "interrupted"


@pytest.mark.parametrize(
    ("log", "error"),
    [
        ("dreambooth_nora.py: error: rank must be at least 1, got 0.\n" + KILLED, "InputError: rank must be at least 1, got 0."),
        ("error: 'x' holds a run.\nTraceback (most recent call last):\n" + KILLED, "InputError: 'x' holds a run."),
        ("Traceback\n  File\nModuleNotFoundError: No module named 'x'\n" + KILLED, "ModuleNotFoundError: No module named 'x'"),
        ("torch.OutOfMemoryError: CUDA\ntorch.distributed.elastic.x.ChildFailedError: y\n", "torch.OutOfMemoryError: CUDA"),
    ],
)
def test_a_run_that_fails_before_it_opens_its_directory_has_the_error_of_the_log(workspace, log, error):
    run = run_in(workspace.runs / "a", "interrupted")
    (run.path / "status.json").write_text(json.dumps({"state": "starting", **process_of("done")}))
    (run.path / LOG).write_text(f"$ accelerate\nerror: of the start before\n$ accelerate\n{log}")
    assert (view(run).state, view(run).error) == ("failed", error)
    assert view(run).reason in (error, error.partition(": ")[2])
    assert last_error(run) == error


def test_a_start_without_an_error_in_the_log_was_interrupted(workspace):
    run = run_in(workspace.runs / "a", "interrupted")
    (run.path / "status.json").write_text(json.dumps({"state": "starting", **process_of("done")}))
    (run.path / LOG).write_text(f"$ accelerate\nerror: of the start before\n$ accelerate\nloading\n{KILLED}")
    assert (view(run).state, ended_by(run)) == ("interrupted", "SIGKILL")


def test_samples_and_checkpoints_can_be_requested_only_from_a_training_subject_run(workspace):
    assert view(run_in(workspace.runs / "a", "running")).actions == ("stop", "sample", "save")
    assert view(run_in(workspace.runs / "b", "running", phase="loading")).actions == ("stop",)
    run = run_in(workspace.runs / "c", "running")
    (run.path / "options.json").write_text(json.dumps({"target_layers": {}}))
    assert (view(run).task, view(run).actions) == ("classify", ("stop",))


def test_a_queued_run_counts_the_runs_of_all_users_ahead_of_it(tmp_path):
    root = tmp_path / "runs"
    workspace = Workspace(root / "ben", tmp_path / "sets" / "ben", "ben")
    run = run_in(workspace.runs / "a", "queued")
    assert view(run).runs_before is None
    for path in (root / "anna" / "x", run.path.absolute()):
        Ticket.take(root / QUEUE / "cpu", path)
    assert view(run).runs_before == 2
    assert view(run_in(workspace.runs / "b", "running")).runs_before is None


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"state": "strange"}', "\ud800"])
def test_a_run_with_malformed_files_does_not_hide_others(workspace, text):
    run = run_in(workspace.runs / "a", "done")
    other = run_in(workspace.runs / "b", "done")
    for name in ("status.json", "options.json", "launch.json", "suggestion.json", "report.json", "metrics.jsonl"):
        (run.path / name).write_bytes(text.encode(errors="surrogatepass"))
    assert {each.id: each.state for each in views(workspace)}["b"] == "done"
    shown = cards(views(workspace), other.path.name)
    assert 'data-run="a"' in shown
    assert 'data-run="b" aria-pressed="true"' in shown


def test_a_run_is_named_after_its_words_or_classes_until_it_has_a_title(workspace):
    run = run_in(workspace.runs / "a", "done")
    assert view(run).title == "sks toy"
    (run.path / "options.json").write_text(json.dumps({"target_layers": {}, "data": {"class_names": ["c0=cat", "c1=dog"]}}))
    assert view(run).title == "cat, dog"
    set_title(run.path, "My pets")
    assert view(run).title == "My pets"
    assert view(run).label.startswith("My pets · ")
    assert view(run).file_stem(40) == "My-pets-step40"


def test_the_face_of_a_run_is_its_first_training_image_from_the_start(workspace, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    (tmp_path / "a.txt").write_text("no image")
    run = run_in(workspace.runs / "a", "queued")
    assert view(run).face == SAMPLE_SUBJECT / "00.jpg"
    (run.path / "options.json").write_text(json.dumps({"data": {"instance_data_dir": str(tmp_path)}}))
    assert view(run).face == tmp_path / "b.png"
    (run.path / "options.json").write_text(json.dumps({"data": {"instance_data_dir": str(tmp_path / "gone")}}))
    assert view(run).face is None
    add_samples(run, 0)
    assert view(run).face == run.subject / "0.png"


def test_the_list_shows_the_values_of_the_files(workspace):
    run = finished_run(workspace.runs / "a")
    step = json.loads((run.path / "suggestion.json").read_text())["step"]
    found = dict(view(run).figures)
    assert (found["Method"], found["Steps"], found["Recommended checkpoint"]) == ("NoRA", "100 of 100", str(step))
    assert found["Lowest validation loss"] == "1.000"
    assert view(run).share == 1.0


def test_a_classifier_shows_its_accuracies_once_there_is_a_report(workspace):
    run = run_in(workspace.runs / "a", "running", step=1, total=3)
    (run.path / "options.json").write_text(json.dumps({"target_layers": {}, "method": {"method": ["zeroshot", "nora"]}}))
    assert view(run).figures == [("Methods", "Zero-shot, NoRA"), ("Trainings", "1 of 3")]
    add_report(run, "nora", Interval(0.5, -0.01, 0.61))
    assert ("NoRA", "50% (0% to 61%)") in view(run).figures


def test_a_repeated_step_counts_once_and_a_truncated_line_not_at_all(workspace):
    run = run_in(workspace.runs / "a", "running")
    run.log(1, loss=1.0)
    run.log(2, loss=2.0)
    run.log(2, loss=3.0)
    with (run.path / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 3, "lo')
    assert series(view(run)) == {"loss": [(1, 1.0), (2, 3.0)]}


def test_a_run_that_is_deleted_while_it_is_read_has_no_values(workspace, tmp_path):
    run = run_in(workspace.runs / "a", "done")
    read = view(run)
    run.path.rename(tmp_path / "gone")
    assert (read.status, read.options, series(read)) == (RunStatus(), {}, {})


def test_user_input_is_escaped_in_the_list(workspace):
    nasty = "<img src=x onerror=alert(1)>\"'&"
    run = run_in(workspace.runs / "a", "failed", error=f"InputError: {nasty}")
    (run.path / "options.json").write_text(json.dumps({"data": {"instance_prompt": nasty}, "adapter": {"method": nasty}}))
    shown = cards(views(workspace), "a")
    assert "<img src=x" not in shown
    assert "&lt;img src=x onerror=alert(1)&gt;" in shown


def test_showing_a_run_with_500_logged_points_takes_less_than_50_ms(workspace):
    run = run_in(workspace.runs / "a", "running", steps=500, total=800)
    measure(run)
    for step in (0, 40, 100):
        add_samples(run, step)
    for place in range(4):
        finished_run(workspace.runs / f"other{place}")
    seconds = []
    for place in range(7):
        run.log(501 + place, loss=1.0)
        began = time.process_time()
        contents(workspace, "a")
        seconds.append(time.process_time() - began)
    assert median(seconds) < 0.05


def test_the_page_says_that_files_were_written_by_a_newer_version(workspace):
    run = finished_run(workspace.runs / "a")
    for name in ("suggestion.json", "certificate.json", "launch.json"):
        (run.path / name).write_text(json.dumps({"version": 9}))
    with (run.path / "metrics.jsonl").open("a") as lines:
        lines.write("damaged\n")
    listed, shown = cards([view(run)], None), train_state(view(run))
    for name in ("suggestion.json", "launch.json"):
        message = f"{name} has version 9; this version of NoRA Vision reads versions up to "
        assert message in listed
        assert message in shown
    assert "metrics.jsonl has a line that cannot be read" in shown
    assert "metrics.jsonl has a line that cannot be read" in judge.measurements(view(run))
    assert not any(plot.lines for plot in losses(view(run)).values())
    assert "suggestion.json has version 9" in judge.recommendation(view(run))


def test_a_status_of_a_newer_version_is_the_reason_why_the_state_of_a_run_is_unknown(workspace):
    run = run_in(workspace.runs / "a", "running")
    (run.path / "status.json").write_text(json.dumps({"version": 9, "state": "running"}))
    assert view(run).state == "interrupted"
    assert view(run).reason.startswith("status.json has version 9")
    assert "status.json has version 9" in train_state(view(run))
