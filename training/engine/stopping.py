"""Stopping a run by a signal at the end of a step, and the exit codes of a recipe."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType

import psutil

from pipelines.errors import InputError
from training.runs.durable import DiskFullError

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# How long a signal that came during an import waits until it is sent again.
IMPORT_SECONDS = 0.2


class TrainingInterrupted(KeyboardInterrupt):
    """A signal has stopped the run.

    Args:
        signal_number: of the signal.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.exit_code = 128 + signal_number


class NotFiniteError(FloatingPointError):
    """A loss or gradient is not finite."""


def launcher() -> int | None:
    """The process id of the `accelerate launch` that this process runs under; None without one."""
    parent = psutil.Process().parent()
    try:
        words = [] if parent is None else parent.cmdline()
    except psutil.Error:
        # It has ended, or belongs to another user.
        return None
    return parent.pid if any("accelerate" in Path(word).name for word in words[:4]) else None


class StopRequests:
    """A context that records SIGTERM and SIGINT in `noted`; a second SIGINT interrupts at once.

    `accelerate launch` does not forward signals, so its end counts as SIGTERM. Python handles signals in the main thread only; in
    other threads nothing is recorded.
    """

    def __init__(self) -> None:
        self._noted = 0
        self._launcher = launcher()
        self._before: dict[int, object] = {}

    @property
    def noted(self) -> int:
        """The signal that was received; 0 if there was none."""
        if self._noted == 0 and self._launcher is not None and os.getppid() != self._launcher:
            self._noted = signal.SIGTERM
        return self._noted

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._noted and number == signal.SIGINT:
            raise TrainingInterrupted(number)
        self._noted = number


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """A context in which SIGTERM and SIGINT raise `TrainingInterrupted`, so that the status records how the run ended.

    During an import they do so at its end: extension modules would drop the exception, or make an ImportError of it.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        if not _is_importing(frame):
            raise TrainingInterrupted(number)
        again = threading.Timer(IMPORT_SECONDS, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


@contextmanager
def exit_codes() -> Iterator[None]:
    """A context for recipes: errors that the user can fix exit with one line and code 1, signals with 128 + signal."""
    try:
        with stopping_at_once():
            yield
    except (InputError, NotFiniteError, DiskFullError) as error:
        raise SystemExit(f"error: {error}") from None
    except TrainingInterrupted as error:
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
