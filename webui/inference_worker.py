"""The worker process, which alone imports torch and keeps the models loaded, and the page's side of it.

Each public function of `webui.inference_jobs` is a job. The process is started again by the first request after its end.

Every request has a connection of its own: the page makes it, and passes its other end through the control socket. The process
answers with the events of the job, and at last with an exception: that of the job, or StopIteration. The page closes the
connection to cancel the request, and the death of the process closes it too.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from functools import partial
from itertools import islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any, NamedTuple

from pipelines.built_in import import_path
from pipelines.errors import InputError

logger = logging.getLogger(__name__)
ENDED = (
    "The process that runs the models has ended, perhaps because the memory was full. Try again: it starts anew. "
    "If it ends again, generate smaller images, or stop other programs."
)
# Jobs of no lane, such as image checks, do not wait for a model.
FILE_THREADS = 2
# The byte that the process sends when its libraries are loaded, if its models are on a GPU.
ON_GPU = b"\1"
# The control socket of a process, and a function that waits for its end and returns its exit code.
Launched = tuple[socket.socket, Callable[[], int]]


class InferenceError(RuntimeError):
    """A job failed with an error that is not the user's; the server's log has the details."""


class Request(NamedTuple):
    """A job to run. A streaming job reports events by its first argument; the only event of another one is its result."""

    name: str
    arguments: tuple[Any, ...]
    is_stream: bool


def launch(jobs: str = "webui.inference_jobs") -> Launched:
    """Start the worker process in a session of its own, where no Ctrl-C reaches it. It ends when the socket is closed.

    Args:
        jobs: the module that it runs, with the descriptor of the control socket as argument.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        command, fds = [sys.executable, "-P", "-m", jobs, str(theirs.fileno())], [theirs.fileno()]
        environment = os.environ | import_path()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment, pass_fds=fds, start_new_session=True)
    return ours, process.wait


class Stream(Iterator[Any]):
    """The events of a job, and its connection. `close`, which any thread may call, ends the iteration and cancels the job."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._is_closed = connection, False

    def __next__(self) -> Any:
        """The next event. Raises: as `InferenceWorker.call`."""
        try:
            event = StopIteration() if self._is_closed else self._connection.recv()
        except (EOFError, OSError):
            event = StopIteration() if self._is_closed else InputError(ENDED)
        if isinstance(event, Exception):
            self.close()
            raise event
        return event

    def every(self, seconds: float) -> Iterator[Any]:
        """The events, and None whenever there was none for `seconds`, so that its consumer can be closed meanwhile."""
        while not self._is_closed:
            if self._connection.poll(seconds):
                yield from islice(self, 1)
            else:
                yield None

    def close(self) -> None:
        """End the iteration; the job is cancelled before it starts or at its next event."""
        self._is_closed = True
        with socket.socket(fileno=os.dup(self._connection.fileno())) as duplicate, suppress(OSError):
            duplicate.shutdown(socket.SHUT_RDWR)


class _Process:
    """The page's side of a process that was started."""

    def __init__(self, control: socket.socket, wait: Callable[[], int]) -> None:
        self.on_gpu, self.has_ended, self._control = False, False, control
        threading.Thread(target=self._watch, args=[wait], daemon=True, name="worker's end").start()

    def send(self, request: Request) -> Stream:
        """Send a request; returns its events. Raises: OSError if the process has ended."""
        ours, theirs = Pipe()
        with theirs:
            socket.send_fds(self._control, [b" "], [theirs.fileno()])
        ours.send(request)
        return Stream(ours)

    def finish(self) -> None:
        """Let the process end after the requests in flight."""
        self.has_ended = True
        with suppress(OSError):
            self._control.shutdown(socket.SHUT_WR)

    def _watch(self, wait: Callable[[], int]) -> None:
        with suppress(ConnectionError):
            self.on_gpu = self._control.recv(1) == ON_GPU
        code = wait()
        self.has_ended = True
        if code:
            logger.warning("The worker process has ended with exit code %s; the next request starts another one", code)


class InferenceWorker:
    """The page's side of the worker process.

    Args:
        launch: starts a process.
    """

    def __init__(self, launch: Callable[[], Launched] = launch) -> None:
        self.launch, self._lock, self._started = launch, threading.Lock(), None

    def start(self) -> _Process:
        """Start the process unless it runs, so that its libraries load before the first request."""
        with self._lock:
            if self._started is None or self._started.has_ended:
                self._started = _Process(*self.launch())
            return self._started

    def call(self, name: str, *arguments: Any) -> Any:
        """The result of the job `name`. Raises: InputError of the job, or because the process ended; InferenceError."""
        with closing(self._send(Request(name, arguments, is_stream=False))) as events:
            return next(events)

    def stream(self, name: str, *arguments: Any) -> Stream:
        """The events of the job `name`, whose first argument is the function that it reports them with."""
        return self._send(Request(name, arguments, is_stream=True))

    def stop(self) -> None:
        """Let the process end after the requests in flight, which frees the device; the next request starts another one."""
        with self._lock:
            if self._started is not None:
                self._started.finish()

    def free_gpu(self) -> None:
        """Stop the process if its models are on a GPU."""
        if self._started is not None and self._started.on_gpu:
            self.stop()

    def _send(self, request: Request) -> Stream:
        with suppress(OSError):
            return self.start().send(request)
        # It has ended a moment ago.
        self.stop()
        return self.start().send(request)


WORKER = InferenceWorker()


def serve(control: socket.socket, jobs: ModuleType) -> None:
    """Run the jobs of the page's side until it shuts the control socket down, and then wait for those in flight.

    Args:
        jobs: a module whose functions are the jobs. LANES has the lane of those that use a model: the jobs of one lane run one
            after another. `on_gpu` tells whether the models are on a GPU.
    """
    files = ThreadPoolExecutor(FILE_THREADS, "files")
    lanes = {lane: ThreadPoolExecutor(1, lane) for lane in set(jobs.LANES.values())}
    with suppress(ConnectionError):
        control.send(ON_GPU if jobs.on_gpu() else b"\0")
        while descriptors := socket.recv_fds(control, 1, 1)[1]:
            connection = Connection(descriptors[0])
            with suppress(EOFError, ConnectionError):
                request = connection.recv()
                pool = lanes.get(jobs.LANES.get(request.name), files)
                future = pool.submit(_run, connection, request, getattr(jobs, request.name))
                future.add_done_callback(partial(_finish, connection, request.name))
    for pool in (files, *lanes.values()):
        pool.shutdown()


def _run(connection: Connection, request: Request, job: Callable[..., Any]) -> None:
    # The page sends nothing else, so this is the end of a request that was cancelled while it waited.
    if connection.poll():
        raise ConnectionAbortedError
    if request.is_stream:
        job(connection.send, *request.arguments)
    else:
        connection.send(job(*request.arguments))


def _finish(connection: Connection, name: str, future: Future[None]) -> None:
    error = future.exception()
    with connection, suppress(ConnectionError):
        if connection.poll():
            return
        if error is None:
            connection.send(StopIteration())
        elif isinstance(error, InputError):
            connection.send(InputError(str(error)))
        else:
            logger.error("The job %s failed", name, exc_info=error)
            connection.send(InferenceError(f"The job {name} failed with {type(error).__name__}."))


class CheckedImage(NamedTuple):
    """The result of the checks of one image: its verdict, for which photos.html has a colour, and a sentence per finding."""

    verdict: str
    sentences: tuple[str, ...]


class CheckedImages(NamedTuple):
    """The results of the image checks by file, and sentences about the whole dataset."""

    images: dict[str, CheckedImage]
    together: tuple[str, ...]


class Crop(NamedTuple):
    """An image as the model sees it: its name; the first variant, small, as a data URL; height and width; number of variants."""

    name: str
    address: str
    size: tuple[int, int]
    variants: int


class ZeroShotAccuracy(NamedTuple):
    """The numbers of images that the built-in CLIP classifies correctly by the class names alone, of all, and of each class."""

    right: int
    count: int
    by_class: dict[str, tuple[int, int]]
