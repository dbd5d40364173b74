"""The worker process, which alone imports torch and keeps the models loaded, and the page's side of it.

Each public function of `webui.inference_jobs` is a job. The process is started again by the first request after its end.
"""

from __future__ import annotations

import itertools
import logging
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import SimpleQueue
from types import ModuleType
from typing import Any, Literal

from pipelines.built_in import import_path
from pipelines.errors import InputError

logger = logging.getLogger(__name__)
ENDED = (
    "The process that runs the models has ended, perhaps because the memory was full. Try again: it starts anew. "
    "If it ends again, generate smaller images, or stop other programs."
)
# Requests for files, such as image checks, do not wait for a model.
FILE_THREADS = 2
# The number of the reply that the process sends when its libraries are loaded: whether its models are on a GPU.
READY = -1
# A connection to a process, and a function that waits for its end and returns its exit code.
Launched = tuple[Connection, Callable[[], int]]


class InferenceError(RuntimeError):
    """A job failed with an error that is not the user's; the server's log has the details."""


class Cancelled(Exception):
    """Raised by the next report of a job that the page has cancelled."""


@dataclass(frozen=True)
class Request:
    """A job to run; the number of an earlier request with no job's name cancels that one."""

    number: int
    name: str | None = None
    arguments: tuple[Any, ...] = ()
    is_stream: bool = False


@dataclass(frozen=True)
class Reply:
    """An event of a streaming job, or the result or the error of a job, by the number of its request."""

    number: int
    kind: Literal["event", "result", "error"]
    value: Any


def launch(jobs: str = "webui.inference_jobs") -> Launched:
    """Start the worker process in a session of its own, where no Ctrl-C reaches it. It ends when the connection is closed.

    Args:
        jobs: the module that it runs, with the descriptor of the connection as argument.
    """
    ours, theirs = Pipe()
    with theirs:
        command, fds = [sys.executable, "-P", "-m", jobs, str(theirs.fileno())], [theirs.fileno()]
        environment = os.environ | import_path()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment, pass_fds=fds, start_new_session=True)
    return ours, process.wait


class _Started:
    """A process that was started, and the requests in flight."""

    def __init__(self, connection: Connection, wait: Callable[[], int]) -> None:
        self.on_gpu, self.has_ended, self._wait = False, False, wait
        self._connection, self._lock = connection, threading.Lock()
        self._replies: dict[int, SimpleQueue[Reply]] = {}
        threading.Thread(target=self._receive, daemon=True, name="worker replies").start()

    def send(self, request: Request) -> SimpleQueue[Reply]:
        """Send a request; returns the queue of its replies. Raises: OSError if the process has ended."""
        replies: SimpleQueue[Reply] = SimpleQueue()
        with self._lock:
            if self.has_ended:
                raise BrokenPipeError
            # Before the request is sent, since the reply may be faster than this thread.
            self._replies[request.number] = replies
            self._connection.send(request)
        return replies

    def cancel(self, number: int) -> None:
        """Drop further replies to a request, which is cancelled if it is in flight."""
        with self._lock, suppress(OSError):
            if self._replies.pop(number, None) is not None and not self.has_ended:
                self._connection.send(Request(number))

    def finish(self) -> None:
        """Let the process end after the requests in flight."""
        with self._lock, suppress(OSError):
            self._connection.send(None)

    def _receive(self) -> None:
        """Pass the replies on until the process ends, which fails the requests in flight."""
        try:
            with suppress(EOFError, OSError):
                while True:
                    self._pass_on(self._connection.recv())
        finally:
            with self._lock:
                self.has_ended = True
                for number, replies in self._replies.items():
                    replies.put(Reply(number, "error", InputError(ENDED)))
                self._connection.close()
        if code := self._wait():
            logger.warning("The worker process has ended with exit code %s; the next request starts another one", code)

    def _pass_on(self, reply: Reply) -> None:
        if reply.number == READY:
            self.on_gpu = reply.value
            return
        replies = self._replies.get(reply.number) if reply.kind == "event" else self._replies.pop(reply.number, None)
        # There is none after the request was cancelled.
        if replies is not None:
            replies.put(reply)


class Stream(Iterator[Any]):
    """The events of a streaming job. `close` may be called by any thread: it ends the iteration and cancels the job."""

    def __init__(self, started: _Started, number: int, replies: SimpleQueue[Reply]) -> None:
        self._started, self._number, self._replies = started, number, replies

    def __next__(self) -> Any:
        """The next event. Raises: as `InferenceWorker.call`."""
        reply = self._replies.get()
        if reply.kind == "event":
            return reply.value
        self._replies.put(Reply(self._number, "result", None))
        if reply.kind == "error":
            raise reply.value
        raise StopIteration

    def close(self) -> None:
        """End the iteration, and cancel the job before it starts or at its next event."""
        self._started.cancel(self._number)
        self._replies.put(Reply(self._number, "result", None))


class InferenceWorker:
    """The page's side of the worker process.

    Args:
        launch: starts a process.
    """

    def __init__(self, launch: Callable[[], Launched] = launch) -> None:
        self.launch, self._lock = launch, threading.Lock()
        self._numbers, self._started = itertools.count(), None

    def start(self) -> _Started:
        """Start the process unless it runs, so that its libraries load before the first request."""
        with self._lock:
            if self._started is None or self._started.has_ended:
                self._started = _Started(*self.launch())
            return self._started

    def call(self, name: str, *arguments: Any) -> Any:
        """The result of the job `name`. Raises: InputError of the job, or because the process ended; InferenceError."""
        _, replies = self._sent(Request(next(self._numbers), name, arguments))
        reply = replies.get()
        if reply.kind == "error":
            raise reply.value
        return reply.value

    def stream(self, name: str, *arguments: Any) -> Stream:
        """The events of the job `name`, whose first argument is the function that it reports them with."""
        request = Request(next(self._numbers), name, arguments, is_stream=True)
        started, replies = self._sent(request)
        return Stream(started, request.number, replies)

    def stop(self) -> None:
        """Let the process end after the requests in flight, which frees the device; the next request starts another one."""
        with self._lock:
            started, self._started = self._started, None
        if started is not None:
            started.finish()

    def free_gpu(self) -> None:
        """Stop the process if its models are on a GPU."""
        if self._started is not None and self._started.on_gpu:
            self.stop()

    def _sent(self, request: Request) -> tuple[_Started, SimpleQueue[Reply]]:
        """The process that has received the request, started again if it has ended before, and the queue of the replies."""
        started = self.start()
        with suppress(OSError):
            return started, started.send(request)
        with self._lock:
            self._started = None if self._started is started else self._started
        started = self.start()
        return started, started.send(request)


@dataclass(frozen=True)
class CheckedImage:
    """The result of the checks of one image: a verdict, one of `webui.screens.photos.CHIPS`, and a sentence per finding."""

    verdict: str
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class CheckedImages:
    """The results of the image checks by file, and sentences about the whole dataset."""

    images: dict[str, CheckedImage]
    together: tuple[str, ...]


@dataclass(frozen=True)
class Crop:
    """An image as the model sees it.

    Args:
        address: the first variant as a data URL.
        size: the height and width that the model sees, in pixels.
        variants: the number of crops and mirror images of this image.
    """

    address: str
    size: tuple[int, int]
    variants: int


@dataclass(frozen=True)
class ZeroShotAccuracy:
    """The accuracy of the built-in CLIP from the class names alone.

    Args:
        right, count: the numbers of correctly classified images and of all images.
        by_class: the same numbers for each class, by its key.
    """

    right: int
    count: int
    by_class: dict[str, tuple[int, int]]


WORKER = InferenceWorker()


class _Serving:
    """The worker's side of a connection: one thread for the jobs of each lane, and some for the other jobs."""

    def __init__(self, connection: Connection, jobs: ModuleType) -> None:
        self._connection, self._jobs, self._lock = connection, jobs, threading.Lock()
        self._cancelled: set[int] = set()
        self._lanes = {lane: ThreadPoolExecutor(1, lane) for lane in set(jobs.LANES.values())}
        self._files = ThreadPoolExecutor(FILE_THREADS, "files")

    def run(self) -> None:
        """Run jobs until the page's side closes the connection or asks for the end, and then wait for those in flight."""
        self._send(pickle.dumps(Reply(READY, "result", self._jobs.on_gpu())))
        while (request := self._connection.recv()) is not None:
            if request.name is None:
                self._cancelled.add(request.number)
            else:
                pool = self._lanes.get(self._jobs.LANES.get(request.name), self._files)
                pool.submit(self._result, request).add_done_callback(partial(self._finish, request))
        for pool in (*self._lanes.values(), self._files):
            pool.shutdown()

    def _send(self, content: bytes) -> None:
        with self._lock:
            self._connection.send_bytes(content)

    def _result(self, request: Request) -> bytes:
        def report(event: Any) -> None:
            if request.number in self._cancelled:
                raise Cancelled
            self._send(pickle.dumps(Reply(request.number, "event", event)))

        if request.number in self._cancelled:
            raise Cancelled
        job = getattr(self._jobs, request.name)
        result = job(report, *request.arguments) if request.is_stream else job(*request.arguments)
        return pickle.dumps(Reply(request.number, "result", None if request.is_stream else result))

    def _finish(self, request: Request, future: Future[bytes]) -> None:
        error = future.exception()
        if error is None:
            self._send(future.result())
        elif isinstance(error, InputError):
            self._send(pickle.dumps(Reply(request.number, "error", InputError(str(error)))))
        elif not isinstance(error, Cancelled):
            logger.error("The job %s failed", request.name, exc_info=error)
            failed = InferenceError(f"The job {request.name} failed with {type(error).__name__}.")
            self._send(pickle.dumps(Reply(request.number, "error", failed)))
        self._cancelled.discard(request.number)


def serve(connection: Connection, jobs: ModuleType) -> None:
    """Run the jobs of the page's side until it closes the connection or asks for the end.

    Args:
        jobs: a module whose functions are the jobs. LANES has the lane of those that use a model: the jobs of one lane run one
            after another. `on_gpu` tells whether the models are on a GPU. A streaming job has a function to report events with
            as its first argument.
    """
    with suppress(EOFError, ConnectionError):
        _Serving(connection, jobs).run()
