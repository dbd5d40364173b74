"""The worker's loop in a thread of this process: the same jobs, messages and cancelling, without the start of a process."""

import socket
import threading

from webui import inference_jobs
from webui.inference_worker import Launched, serve


def launch_thread() -> Launched:
    """In place of `webui.inference_worker.launch`."""
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=serve, args=(theirs, inference_jobs), daemon=True)
    thread.start()
    return ours, lambda: thread.join() or 0
