"""The worker process: results, errors, cancelling, crash and restart; and that it ends with the server."""

import os
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import psutil
import pytest
from processes import wait_for

from pipelines.errors import InputError
from webui.inference_worker import InferenceError, InferenceWorker, launch

HERE = Path(__file__).parent
# A server that prints the id of its worker process, and waits.
SERVER = """
import time
from functools import partial
from webui.inference_worker import InferenceWorker, launch
worker = InferenceWorker(partial(launch, "small_jobs"))
print(worker.call("process_id"), flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def jobs_can_be_imported(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))


@pytest.fixture
def worker():
    worker = InferenceWorker(partial(launch, "small_jobs"))
    yield worker
    worker.stop()


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


def test_all_requests_run_in_one_process_that_is_not_this_one(worker):
    first, second = worker.call("process_id"), worker.call("process_id")
    assert first == second != os.getpid()


def test_an_error_of_the_user_is_passed_on_and_any_other_is_named(worker, capfd):
    with pytest.raises(InputError, match="Choose another one"):
        worker.call("refuse", "Choose another one.")
    with pytest.raises(InferenceError, match="The job fail failed with KeyError"):
        worker.call("fail")
    with pytest.raises(InferenceError, match="unpicklable"):
        worker.call("unpicklable")
    assert "no such thing" in capfd.readouterr().err


def test_a_stream_yields_its_events_and_jobs_of_one_lane_run_one_after_another(worker, log):
    events = worker.stream("steps", 50, log)
    assert next(events) == 0
    other = threading.Thread(target=worker.call, args=("append", log, "other"))
    other.start()
    # Requests of another lane, and for files, do not wait.
    assert worker.call("answer", "at once") == "at once"
    assert worker.call("process_id")
    assert "other" not in log.read_text()
    assert list(events) == list(range(1, 50))
    other.join()
    assert log.read_text().split() == [*map(str, range(50)), "other"]


def test_closing_a_stream_cancels_within_one_event_and_the_next_request_works(worker, log):
    events = worker.stream("steps", 10_000, log)
    assert next(events) == 0
    events.close()
    worker.call("append", log, "next")
    numbers = log.read_text().split()
    assert numbers[-1] == "next"
    assert len(numbers) < 100


def test_a_request_that_waits_for_the_device_is_cancelled_by_another_thread(worker, log):
    events, waiting = worker.stream("steps", 50, log), worker.stream("steps", 50, log)
    assert next(events) == 0
    ended = threading.Thread(target=list, args=(waiting,))
    ended.start()
    waiting.close()
    ended.join()
    assert list(events) == list(range(1, 50))
    worker.call("append", log, "end")
    assert log.read_text().split() == [*map(str, range(50)), "end"]


def test_a_killed_process_costs_the_requests_in_flight_and_the_next_one_starts_another(worker, log, caplog):
    before = worker.call("process_id")
    events = worker.stream("steps", 10_000, log)
    assert next(events) == 0
    os.kill(before, signal.SIGKILL)
    with pytest.raises(InputError, match=r"The process that runs the models has ended.*Try again"):
        list(events)
    assert worker.call("process_id") not in (before, os.getpid())
    assert wait_for(lambda: "has ended with exit code -9" in caplog.text)


def test_the_process_of_a_gpu_ends_after_the_requests_in_flight_and_any_other_stays(worker, log, monkeypatch):
    before = worker.call("process_id")
    worker.free_gpu()
    assert worker.call("process_id") == before
    monkeypatch.setenv("ON_GPU", "1")
    worker.stop()
    on_gpu = worker.call("process_id")
    events = worker.stream("steps", 20, log)
    assert next(events) == 0
    worker.free_gpu()
    assert worker.call("process_id") not in (before, on_gpu)
    assert list(events) == list(range(1, 20))
    assert wait_for(lambda: not psutil.pid_exists(on_gpu))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_process_ends_with_the_server_also_if_that_is_killed(number):
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    child = int(server.stdout.readline())
    assert psutil.pid_exists(child)
    server.send_signal(number)
    server.communicate()
    assert wait_for(lambda: not psutil.pid_exists(child))


def test_ctrl_c_in_the_servers_terminal_does_not_reach_the_process(worker):
    # A terminal sends it to all processes of the server's session.
    assert os.getsid(worker.call("process_id")) != os.getsid(0)
