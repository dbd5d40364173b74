"""The worker's loop in a thread of this process: the same jobs, messages and cancelling, without the start of a process."""

import socket
import threading

import pytest

from webui import inference_jobs
from webui.inference_worker import WORKER, Launched, serve


def launch_thread() -> Launched:
    """In place of `webui.inference_worker.launch`."""
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=serve, args=(theirs, inference_jobs), daemon=True)
    thread.start()
    return ours, lambda: thread.join() or 0


def run_jobs_in_this_process(patch: pytest.MonkeyPatch) -> None:
    """Have the page's jobs run in a thread of this process, until `patch` is undone."""
    patch.setattr(WORKER, "launch", launch_thread)
    patch.setattr(WORKER, "_started", None)
