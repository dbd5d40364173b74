"""One run at a time on a device, in the order they came, whatever is killed meanwhile."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from training.runs.record import RunRecord, update_status
from training.runs.run_files import RunStatus
from training.runs.waiting import LOCK, QUEUE, Ticket, device_key, runs_before, tickets

ROOT = Path(__file__).parents[2]
PATIENCE = 300


def wait_for(what):
    """Wait until `what()` is true; returns it."""
    began = time.monotonic()
    while not (found := what()):
        assert time.monotonic() - began < PATIENCE
        time.sleep(0.02)
    return found


class Queue:
    """Runs in a folder, each a command that says when it begins and works until it is asked to end."""

    def __init__(self, runs):
        self.runs, self.started = runs, []

    def start(self, name, command=None, runs=None, **environment):
        run = (runs or self.runs) / name
        run.mkdir(parents=True, exist_ok=True)
        work = f"import pathlib, time; run = pathlib.Path({str(run)!r}); (run / 'began').touch()\n"
        work += "while not (run / 'end').exists(): time.sleep(0.02)\n(run / 'ended').touch()"
        words = [sys.executable, "-m", "training.runs.waiting", str(run), "--queue", str(self.runs / QUEUE), "--"]
        own = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
        process = subprocess.Popen([*words, *(command or [sys.executable, "-c", work])], env=own, stderr=subprocess.PIPE)
        self.started.append(process)
        wait_for(lambda: process.poll() is not None or self.has_place(run, process.pid))
        return run, process

    def has_place(self, run, pid):
        """Whether the process has taken its place in the queue, or is past that."""
        status = RunRecord(run).status()
        return status.pid == pid and (status.state == "starting" or runs_before(self.runs / QUEUE, run) is not None)

    def state(self, run):
        return RunRecord(run).status().state


@pytest.fixture
def queue(tmp_path):
    queue = Queue(tmp_path / "runs")
    yield queue
    for process in queue.started:
        process.kill()
        process.communicate()


def begins(run, after=None):
    """Wait until it begins; not before the file `after` was there."""
    wait_for((run / "began").exists)
    assert after is None or (run / "began").stat().st_mtime_ns >= after.stat().st_mtime_ns


def waits(run):
    """Whether it is its turn to wait; that it did not begin meanwhile, `begins` checks afterwards."""
    return RunRecord(run).status().state == "queued" and not (run / "began").exists()


def test_the_first_run_in_the_queue_starts_at_once_in_the_same_process(queue):
    run, process = queue.start("a")
    begins(run)
    status = RunRecord(run).status()
    assert (status.state, status.pid) == ("starting", process.pid)
    assert RunRecord(run).has_live_process()
    assert tickets(queue.runs / QUEUE / "cpu") == []
    (run / "end").touch()
    assert process.wait(PATIENCE) == 0


def test_runs_start_in_the_order_of_the_queue(queue):
    runs = [queue.start(name) for name in "abc"]
    begins(runs[0][0])
    assert waits(runs[1][0])
    assert waits(runs[2][0])
    assert [runs_before(queue.runs / QUEUE, run) for run, _ in runs] == [None, 1, 2]
    ended = None
    for place, (run, process) in enumerate(runs):
        begins(run, after=ended)
        assert all(not (later / "began").exists() for later, _ in runs[place + 1 :])
        (run / "end").touch()
        assert process.wait(PATIENCE) == 0
        ended = run / "ended"


def test_a_run_whose_process_begins_later_than_that_of_the_next_one_is_still_first(queue):
    (queue.runs / "first").mkdir(parents=True)
    RunStatus(state="queued", heartbeat=time.time()).write(queue.runs / "first")
    second, _ = queue.start("second")
    first, _ = queue.start("first")
    begins(first)
    assert waits(second)
    (first / "end").touch()
    begins(second, after=first / "ended")


def test_a_killed_waiting_process_is_skipped_and_its_ticket_is_deleted(queue):
    (first, _), (second, killed), (third, _) = (queue.start(name) for name in "abc")
    begins(first)
    killed.kill()
    killed.wait()
    assert not RunRecord(second).has_live_process()
    assert runs_before(queue.runs / QUEUE, third) == 1
    (first / "end").touch()
    begins(third, after=first / "ended")
    assert not (second / "began").exists()
    assert tickets(queue.runs / QUEUE / "cpu") == []


def test_a_killed_launcher_lets_the_next_run_start(queue):
    (first, killed), (second, _) = (queue.start(name) for name in "ab")
    begins(first)
    assert waits(second)
    (first / "killed").touch()
    killed.kill()
    killed.wait()
    begins(second, after=first / "killed")


def test_the_next_run_waits_for_runs_without_a_launcher_and_for_runs_from_a_terminal(queue):
    other = queue.runs / "from-a-terminal"
    other.mkdir(parents=True)
    work = "import sys, time, pathlib; from training.runs.record import RunRecord, update_status\n"
    work += "update_status(RunRecord(pathlib.Path(sys.argv[1])), state='running'); sys.stdin.read()"
    at_work = subprocess.Popen(
        [sys.executable, "-c", work, str(other)], stdin=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    wait_for(RunRecord(other).is_at_work)
    elsewhere, _ = queue.start("elsewhere", CUDA_VISIBLE_DEVICES="7")
    begins(elsewhere)
    run, _ = queue.start("a")
    assert waits(run)
    (other / "ending").touch()
    at_work.communicate()
    begins(run, after=other / "ending")


def test_users_wait_for_each_other(queue):
    anna, _ = queue.start("one", runs=queue.runs / "anna")
    begins(anna)
    ben, _ = queue.start("two", runs=queue.runs / "ben")
    assert waits(ben)
    (anna / "end").touch()
    begins(ben, after=anna / "ended")


def test_devices_have_queues_of_their_own(queue):
    runs = [queue.start(name, CUDA_VISIBLE_DEVICES=name)[0] for name in ("0", "1", "")]
    for run in runs:
        begins(run)


@pytest.mark.parametrize(("devices", "key"), [(None, "cpu"), ("", "cpu"), ("0,1", "0-1"), ("../GPU-7", "GPU-7")])
def test_the_name_of_a_queues_folder_comes_from_the_devices(devices, key):
    assert device_key({} if devices is None else {"CUDA_VISIBLE_DEVICES": devices}) == key


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_while_it_waits_never_starts(queue, number):
    (first, _), (second, asked), (third, _) = (queue.start(name) for name in "abc")
    begins(first)
    asked.send_signal(number)
    assert asked.wait(PATIENCE) == 128 + number
    assert queue.state(second) == "stopped"
    (first / "end").touch()
    begins(third, after=first / "ended")
    assert not (second / "began").exists()


def test_a_missing_command_fails_and_lets_the_next_run_start(queue):
    run, process = queue.start("a", ["no-such-command"])
    assert process.wait(PATIENCE) == 1
    status = RunRecord(run).status()
    assert status.state == "failed"
    assert "No such file" in status.error
    begins(queue.start("b")[0])


def test_a_run_fails_with_a_message_if_the_status_of_another_run_is_of_a_newer_version(queue):
    (queue.runs / "newer").mkdir(parents=True)
    (queue.runs / "newer" / "status.json").write_text('{"version": 9, "state": "running"}')
    run, process = queue.start("a")
    assert process.wait(PATIENCE) == 1
    assert queue.state(run) == "failed"
    assert "status.json has version 9" in RunRecord(run).status().error


def test_a_resumed_run_clears_the_error_of_its_last_process_but_not_its_progress(queue):
    begins(queue.start("a")[0])
    run = queue.runs / "b"
    run.mkdir()
    update_status(RunRecord(run), state="failed", error="ValueError: no", step=3, total=8, seconds_left=2.0, phase="training")
    queue.start("b")
    status = RunRecord(run).status()
    assert [getattr(status, name) for name in ("state", "error", "phase", "seconds_left", "step", "total")] == [
        "queued", None, None, None, 3, 8,
    ]  # fmt: skip


def test_a_ticket_names_its_run_and_process(tmp_path):
    ticket = Ticket.take(tmp_path / "queue", tmp_path / "run")
    assert ticket.is_live
    assert tickets(tmp_path / "queue") == [ticket]
    assert not (tmp_path / "queue" / LOCK).exists()


def test_without_a_command_the_usage_is_an_error(tmp_path):
    words = [sys.executable, "-m", "training.runs.waiting", str(tmp_path)]
    finished = subprocess.run(words, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert "the command is missing" in finished.stderr


def test_waiting_loads_no_model_library():
    code = "import sys, training.runs.waiting; print(sorted({'torch', 'accelerate', 'transformers', 'numpy'} & set(sys.modules)))"
    words = [sys.executable, "-c", code]
    finished = subprocess.run(words, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"
