"""Starting, stopping, resuming and deleting runs: runs outlive the server, and only the user's runs are affected."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from processes import kill_all_naming, standing_for_accelerate, wait_for

from pipelines.errors import InputError
from training.runs import run_requests
from training.runs.record import RunRecord, update_status
from training.runs.run_files import Launch
from training.runs.run_log import LOG, last_error, log_tail
from webui import launching
from webui.form_schema import validated
from webui.inference_worker import WORKER
from webui.runs import RunView
from webui.workspace import Workspace

ROOT = Path(__file__).parents[2]
QUICK = {"optimisation": {"max_train_steps": 8}, "adapter": {"rank": 4, "inner_r": 2}}


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A workspace with a stand-in for training; runs that are still active at the end are killed."""
    monkeypatch.setattr(launching, "_with_launcher", standing_for_accelerate)
    workspace = Workspace(tmp_path / "runs", tmp_path / "sets", is_local=True)
    yield workspace
    kill_all_naming(tmp_path)


def view(workspace, run_id):
    return RunView(workspace.run(run_id))


def state(workspace, run_id):
    return view(workspace, run_id).state


def trains(workspace, run_id):
    """Wait until the run is training."""
    wait_for(lambda: state(workspace, run_id) == "running")


def end(workspace, run_id):
    """Let the run finish."""
    (workspace.run(run_id).path / "end").touch()
    wait_for(lambda: state(workspace, run_id) == "done")


def test_a_run_starts_the_displayed_command_after_the_worker_was_asked_to_free_the_gpu(workspace, monkeypatch):
    freed = []
    monkeypatch.setattr(WORKER, "free_gpu", lambda: freed.append(True))
    run_id = launching.start(workspace, "subject", QUICK)
    trains(workspace, run_id)
    path = workspace.run(run_id).path
    assert freed == [True]
    launch = Launch.read(path)
    words = f"accelerate launch training/dreambooth_nora.py --max_train_steps 8 --rank 4 --inner_r 2 --output_dir {path}"
    assert shlex.join(launch.command) == words
    assert shlex.split(words) == launching.command("subject", QUICK, path)
    assert (path / "began").read_text() == words.removeprefix("accelerate ")
    assert (launch.task, launch.options) == ("subject", QUICK)
    assert (path / LOG).read_text().startswith(f"$ {words}\n")
    end(workspace, run_id)


def test_a_run_that_cannot_start_leaves_no_files(workspace):
    wrong = [{"adapter": {"rank": 0}}, {"output": {"validation_prompt": ["a", "--output_dir=x"]}}, {"data": {"folder": "x"}}]
    for options in wrong:
        with pytest.raises(InputError):
            launching.start(workspace, "subject", options)
    assert not workspace.runs.exists()


def test_the_command_uses_the_launcher_of_this_environment(tmp_path):
    words = launching._with_launcher(["accelerate", "launch", "--help"])
    ended = subprocess.run(words, cwd=tmp_path, env={"PATH": ""}, capture_output=True, text=True, check=True)
    assert "training_script" in ended.stdout


def test_an_ended_run_leaves_no_zombie(workspace):
    # An earlier test may have started a browser.
    before = set(psutil.Process().children())
    run_id = launching.start(workspace, "subject", QUICK)
    trains(workspace, run_id)
    assert set(psutil.Process().children()) - before
    end(workspace, run_id)
    wait_for(lambda: not set(psutil.Process().children()) - before)


@pytest.mark.slow(8)
def test_a_run_survives_a_killed_server(workspace, tmp_path):
    code = (
        "import sys, time, pathlib; sys.path.insert(0, sys.argv[1]); from processes import standing_for_accelerate\n"
        "from webui import launching; from webui.workspace import Workspace\n"
        "launching._with_launcher = standing_for_accelerate; folder = pathlib.Path(sys.argv[2])\n"
        "workspace = Workspace(folder / 'runs', folder / 'sets', is_local=True)\n"
        "for _ in range(2): print(launching.start(workspace, 'subject', {}), flush=True)\n"
        "time.sleep(600)"
    )
    words = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    first, second = (server.stdout.readline().strip() for _ in range(2))
    trains(workspace, first)
    server.kill()
    server.communicate()
    time.sleep(0.5)
    assert (state(workspace, first), state(workspace, second)) == ("running", "queued")
    end(workspace, first)
    trains(workspace, second)
    end(workspace, second)


def test_runs_wait_in_a_queue_and_report_their_position(workspace):
    ids = [launching.start(workspace, "subject", QUICK) for _ in range(3)]
    trains(workspace, ids[0])
    wait_for(lambda: [view(workspace, run_id).runs_before for run_id in ids] == [None, 1, 2])
    assert view(workspace, ids[1]).actions == ("stop",)
    launching.stop(workspace, ids[1])
    wait_for(lambda: state(workspace, ids[1]) == "stopped")
    end(workspace, ids[0])
    trains(workspace, ids[2])
    assert not (workspace.run(ids[1]).path / "began").exists()
    launching.resume(workspace, ids[1])
    assert state(workspace, ids[1]) == "queued"
    end(workspace, ids[2])
    trains(workspace, ids[1])


def test_a_run_is_shown_as_queued_at_once_and_can_be_stopped_before_its_process_has_begun(workspace):
    run_id = launching.start(workspace, "subject", QUICK)
    assert view(workspace, run_id).state == "queued"
    assert view(workspace, run_id).status.pid is None
    launching.stop(workspace, run_id)
    # Its process begins later, and ends itself; a second one must not begin meanwhile.
    assert (state(workspace, run_id), view(workspace, run_id).actions) == ("stopped", ())
    before = view(workspace, run_id).version
    wait_for(lambda: "resume" in view(workspace, run_id).actions)
    assert view(workspace, run_id).version != before
    assert not (workspace.run(run_id).path / "began").exists()
    launching.resume(workspace, run_id)
    assert state(workspace, run_id) == "queued"
    trains(workspace, run_id)


def test_a_training_run_stops_on_request_and_can_be_resumed(workspace):
    run_id = launching.start(workspace, "subject", QUICK)
    trains(workspace, run_id)
    launching.stop(workspace, run_id)
    wait_for(lambda: state(workspace, run_id) == "stopped")
    with pytest.raises(InputError, match=r"The run is not active. The run is stopped"):
        launching.stop(workspace, run_id)
    launching.resume(workspace, run_id)
    trains(workspace, run_id)
    path = workspace.run(run_id).path
    assert (path / "began").read_text().endswith(f"--output_dir {path} --resume_from_checkpoint latest")
    with pytest.raises(InputError, match=r"can be resumed. The run is running"):
        launching.resume(workspace, run_id)
    end(workspace, run_id)


def test_a_run_that_is_stopped_while_it_loads_leaves_no_process(workspace, monkeypatch):
    monkeypatch.setenv("LOADS", "600")
    run_id = launching.start(workspace, "subject", QUICK)
    wait_for((workspace.run(run_id).path / "began").exists)
    assert state(workspace, run_id) == "starting"
    launcher = workspace.run(run_id).process()
    at_work = [launcher, *launcher.children(recursive=True)]
    assert len(at_work) == 2
    launching.stop(workspace, run_id)
    assert not psutil.wait_procs(at_work, 30)[1]
    wait_for(lambda: state(workspace, run_id) == "stopped")


def test_a_killed_run_is_interrupted_and_can_be_resumed(workspace):
    run_id = launching.start(workspace, "subject", QUICK)
    trains(workspace, run_id)
    workspace.run(run_id).process().kill()
    wait_for(lambda: state(workspace, run_id) == "interrupted")
    wait_for(lambda: "memory" in RunView(workspace.run(run_id)).reason)
    launching.resume(workspace, run_id)
    trains(workspace, run_id)
    end(workspace, run_id)


def test_a_killed_queued_run_is_interrupted_and_can_be_queued_again(workspace):
    first, second = (launching.start(workspace, "subject", QUICK) for _ in range(2))
    trains(workspace, first)
    # The second may write its first status later than the first one starts to train.
    wait_for(workspace.run(second).process).kill()
    wait_for(lambda: state(workspace, second) == "interrupted")
    launching.resume(workspace, second)
    assert state(workspace, second) == "queued"


def test_a_run_that_fails_before_it_writes_a_status_has_the_error_of_the_log(workspace, monkeypatch):
    monkeypatch.setenv("FAILS", "1")
    run_id = launching.start(workspace, "subject", QUICK)
    wait_for(lambda: state(workspace, run_id) == "failed")
    found = view(workspace, run_id)
    assert found.reason == "rank must be at least 1, got 0."
    assert found.error == last_error(workspace.run(run_id)) == "InputError: rank must be at least 1, got 0."
    assert found.actions == ("resume", "duplicate", "delete")
    monkeypatch.delenv("FAILS")
    launching.resume(workspace, run_id)
    trains(workspace, run_id)
    workspace.run(run_id).process().kill()
    wait_for(lambda: state(workspace, run_id) == "interrupted")


def test_another_process_with_the_run_s_process_id_is_not_stopped(workspace):
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    path = workspace.new_run()
    status = {"state": "running", "pid": stranger.pid, "pid_started": psutil.Process(stranger.pid).create_time() - 100}
    (path / "status.json").write_text(json.dumps(status))
    assert state(workspace, path.name) == "interrupted"
    with pytest.raises(InputError, match="not active"):
        launching.stop(workspace, path.name)
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()


def test_requests_to_a_training_run_are_files_in_its_directory(workspace):
    run_id = launching.start(workspace, "subject", QUICK)
    trains(workspace, run_id)
    launching.ask(workspace, run_id, "sample")
    assert run_requests.was_asked(workspace.run(run_id), "sample")
    with pytest.raises(InputError, match=r"must be one of sample, save, got '\.\./x'"):
        launching.ask(workspace, run_id, "../x")
    end(workspace, run_id)
    with pytest.raises(InputError, match=r"while a run trains. The run is done"):
        launching.ask(workspace, run_id, "save")


def test_a_training_classifier_accepts_only_a_stop_request(workspace):
    run_id = launching.start(workspace, "classify", {"data": {"seeds": [0]}})
    trains(workspace, run_id)
    assert view(workspace, run_id).actions == ("stop",)
    assert "training/fewshot_nora.py --seeds 0" in (workspace.run(run_id).path / "began").read_text()
    launching.stop(workspace, run_id)
    wait_for(lambda: state(workspace, run_id) == "stopped")


def test_a_duplicate_starts_from_the_options_without_the_directory(workspace):
    run_id = launching.start(workspace, "subject", QUICK)
    assert launching.duplicate(workspace, run_id) == QUICK
    again = launching.start(workspace, "subject", launching.duplicate(workspace, run_id))
    assert again != run_id


def test_a_run_from_a_terminal_is_duplicated_and_resumed_from_its_recorded_options(workspace):
    path = workspace.new_run()
    options = validated(workspace, "subject", QUICK)[1].to_dict()
    options["output"]["output_dir"] = str(path)
    (path / "options.json").write_text(json.dumps(options))
    (path / "status.json").write_text(json.dumps({"state": "stopped", "processes": 2}))
    assert launching.duplicate(workspace, path.name) == QUICK
    launching.resume(workspace, path.name)
    trains(workspace, path.name)
    recipe = f"{ROOT}/training/dreambooth_nora.py --options_file {path}/options.json --output_dir {path}"
    assert (path / "began").read_text() == f"launch --num_processes 2 {recipe} --resume_from_checkpoint latest"
    assert not (path / Launch.NAME).exists()


def test_a_terminal_run_without_recorded_options_cannot_be_resumed_or_duplicated(workspace):
    path = workspace.new_run()
    (path / "status.json").write_text(json.dumps({"state": "failed"}))
    with pytest.raises(InputError, match="before it recorded its options"):
        launching.resume(workspace, path.name)
    with pytest.raises(InputError, match="not recorded"):
        launching.duplicate(workspace, path.name)


def test_a_run_whose_images_are_missing_cannot_be_resumed(workspace):
    guest = Workspace(workspace.runs, workspace.sets, None, is_local=False)
    own = guest.new_image_set()
    data = {"instance_data_dir": str(own), "instance_prompt": "a photo of sks dog"}
    run_id = launching.start(guest, "subject", {"data": data})
    trains(guest, run_id)
    launching.stop(guest, run_id)
    wait_for(lambda: state(guest, run_id) == "stopped")
    shutil.rmtree(own)
    with pytest.raises(InputError, match="These images no longer exist"):
        launching.resume(guest, run_id)
    assert state(guest, run_id) == "stopped"


def test_two_simultaneous_requests_resume_a_run_once(workspace):
    path = workspace.new_run()
    Launch("subject", [], 0.0, QUICK).write(path)
    record = workspace.run(path.name)
    with launching._locked(record), pytest.raises(InputError, match="starting or deleting this run"):
        launching.resume(workspace, path.name)
    launching.resume(workspace, path.name)
    with pytest.raises(InputError, match="can be resumed"):
        launching.resume(workspace, path.name)


def test_deleting_a_run_leaves_the_targets_of_its_links_alone(workspace, tmp_path):
    kept = tmp_path / "elsewhere"
    kept.mkdir()
    (kept / "photo.png").write_text("x")
    path, other = workspace.new_run(), workspace.new_run()
    for run in (path, other):
        update_status(RunRecord(run), state="done")
    (path / "link").symlink_to(kept)
    (path / "file").symlink_to(kept / "photo.png")
    launching.delete(workspace, path.name)
    assert workspace.run_ids() == [other.name]
    assert [one.name for one in workspace.runs.iterdir()] == [other.name]
    assert (kept / "photo.png").exists()


def test_active_runs_and_other_users_runs_cannot_be_deleted(workspace, tmp_path):
    run_id = launching.start(workspace, "subject", QUICK)
    trains(workspace, run_id)
    with pytest.raises(InputError, match="active run cannot be deleted"):
        launching.delete(workspace, run_id)
    other = tmp_path / "other" / "20260101-000000-abcdef"
    other.mkdir(parents=True)
    (other / "status.json").write_text('{"state": "done"}')
    (workspace.runs / "link").symlink_to(other)
    wrong = ("..", ".", "", "/", str(other), f"../other/{other.name}", "link", run_id + "/..", "none", ".queue", None, "a\0")
    for name in wrong:
        with pytest.raises(InputError, match="This run does not exist"):
            launching.delete(workspace, name)
    assert other.exists()
    assert state(workspace, run_id) == "running"


def test_the_log_is_shown_as_a_terminal_would(workspace):
    path = workspace.new_run()
    (path / "status.json").write_text("{}")
    (path / LOG).write_text("one\ntraining:  1%\rtraining:  2%\rtraining: 3%\n\x1b[31mred\x1b[0m\n" + "line\n" * 500)
    shown = log_tail(workspace.run(path.name)).splitlines()
    assert len(shown) == 199
    (path / LOG).write_text("one\ntraining:  1%\rtraining:  2%\rtraining: 3%\n\x1b[31mred\x1b[0m")
    assert log_tail(workspace.run(path.name)) == "one\ntraining: 3%\nred"
