"""The worker's loop in a thread of this process: the same jobs, messages and cancelling, without the start of a process."""

import threading
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from webui import inference_jobs
from webui.inference_worker import serve


class ServingThread(threading.Thread):
    """Has the interface of a process."""

    def wait(self) -> int:
        """Wait for its end."""
        self.join()
        return 0


def launch_thread() -> tuple[Connection, ServingThread]:
    """In place of `webui.inference_worker.launch`."""
    ours, theirs = Pipe()
    thread = ServingThread(target=serve, args=(theirs, inference_jobs), daemon=True)
    thread.start()
    return ours, thread
