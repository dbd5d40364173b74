"""How a run ends before its end: asked to by a signal, at the end of a step; and the exit code of each ending."""

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


class TrainingInterrupted(KeyboardInterrupt):
    """The run was asked to stop by a signal.

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
        # It has gone meanwhile, or is another user's.
        return None
    return parent.pid if any("accelerate" in Path(word).name for word in words[:3]) else None


class StopRequests:
    """While entered, SIGTERM and SIGINT are noted rather than acted on; the second SIGINT interrupts at once.

    `accelerate launch` does not pass signals on: when it has gone, that counts as SIGTERM. Only a process's main thread can
    be told of signals: elsewhere none is ever noted.
    """

    def __init__(self) -> None:
        self._noted = 0
        self._launcher = launcher()
        self._before: dict[int, object] = {}

    @property
    def noted(self) -> int:
        """The signal that asks for the end; 0 for none."""
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
    """While entered, SIGTERM raises `TrainingInterrupted` as Ctrl-C does, so that the run's status says how it ended."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TrainingInterrupted(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def exit_codes() -> Iterator[None]:
    """For a recipe's last lines: errors that are the user's to mend end in one line and exit code 1, signals in 128 + signal."""
    try:
        with stopping_at_once():
            yield
    except (InputError, NotFiniteError, DiskFullError) as error:
        raise SystemExit(f"error: {error}") from None
    except TrainingInterrupted as error:
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
