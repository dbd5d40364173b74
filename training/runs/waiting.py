"""Wait in the queue of a device, then become the command of the run.

A device runs one training at a time, first come first served.

    python -m training.runs.waiting RUN_DIR --queue DIR -- accelerate launch training/dreambooth_nora.py ...

There is no scheduler, and a killed process needs no repair: the command inherits a file lock, which ends with it, and tickets of
processes that have ended are skipped.
"""

from __future__ import annotations

import fcntl
import os
import re
import signal
import sys
import time
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import psutil

from pipelines.errors import InputError
from pipelines.run_file import RunFile
from training.runs import run_requests
from training.runs.record import RunRecord, live_process, update_status
from training.runs.run_files import RunStatus

QUEUE, LOCK = ".queue", "lock"
DEVICES, CPU = "CUDA_VISIBLE_DEVICES", "cpu"
POLL_SECONDS = 0.25
# The longest time from the start of a process that waits to its first status.
BEGINNING_SECONDS = 20.0
# Fields that the last process of a resumed run has written.
CLEARED = {"error": None, "phase": None, "seconds_left": None}


class Cancelled(Exception):
    """The run was stopped while it waited."""


def device_key(environment: dict[str, str]) -> str:
    """The name of the queue's folder: runs with the same name must not run at the same time."""
    return re.sub(r"[^A-Za-z0-9]+", "-", environment.get(DEVICES, "")).strip("-") or CPU


@dataclass(frozen=True)
class Ticket(RunFile):
    """A position in the queue, as a file of the queue's folder.

    Args:
        run: the directory of the run that waits.
        pid, pid_started: the process that waits.
        path: of the file; not stored in it. Sorted names are in the order of the queue.
    """

    NAME: ClassVar[str] = ".ticket"

    run: str
    pid: int
    pid_started: float
    path: Path = Path()

    @classmethod
    def take(cls, queue: Path, run: Path, since: float | None = None) -> Ticket:
        """Add this process to `queue`, behind those that wait longer than since `since`; by default since now."""
        queue.mkdir(parents=True, exist_ok=True)
        process = psutil.Process()
        path = queue / f"{round((since or time.time()) * 1e9):020d}-{process.pid}{cls.NAME}"
        ticket = cls(str(run), process.pid, process.create_time(), path)
        ticket.write(queue, path.name)
        return ticket

    def to_json(self) -> dict[str, Any]:
        """The fields but the path."""
        return {name: value for name, value in super().to_json().items() if name != "path"}

    @property
    def is_live(self) -> bool:
        """Whether the process still runs."""
        return live_process(self.pid, self.pid_started) is not None


def tickets(queue: Path) -> list[Ticket]:
    """All tickets of `queue` in order, those of processes that have ended included."""
    paths = sorted(queue.glob(f"[!.]*{Ticket.NAME}"))
    return [replace(ticket, path=path) for path in paths if (ticket := Ticket.read(queue, path.name)) is not None]


def runs_before(root: Path, run: Path) -> int | None:
    """The number of runs ahead of `run`, including the active one; None if it does not wait.

    Args:
        root: the folder of the queues of all devices.
    """
    for queue in root.glob("*"):
        live = [ticket.run for ticket in tickets(queue) if ticket.is_live]
        if str(run) in live:
            return live.index(str(run)) + 1
    return None


def at_work(runs: Path, device: str) -> list[RunRecord]:
    """The active runs on `device` in `runs` and in its folders of accounts.

    The queue's lock does not cover them all: runs started in a terminal do not queue, and a run whose launcher was killed still
    saves a checkpoint after the lock has ended.
    """
    return [record for record in _records(runs) if record.is_at_work() and _device_of(record) == device]


def _records(runs: Path) -> Iterator[RunRecord]:
    for pattern in (f"*/{RunStatus.NAME}", f"*/*/{RunStatus.NAME}"):
        yield from (RunRecord(path.parent) for path in runs.glob(pattern))


def begins_earlier(runs: Path, since: float) -> bool:
    """Whether a run was queued shortly before `since` whose process has not taken its ticket yet."""
    oldest = time.time() - BEGINNING_SECONDS
    statuses = (record.status() for record in _records(runs))
    return any(one.state == "queued" and one.pid is None and oldest < (one.heartbeat or 0.0) < since for one in statuses)


def _device_of(record: RunRecord) -> str | None:
    process = record.process()
    try:
        return None if process is None else device_key(process.environ())
    except psutil.NoSuchProcess:
        return None
    except psutil.AccessDenied:
        # The environment of another user's process cannot be read: assume this device, as most machines have one.
        return device_key(dict(os.environ))


@contextmanager
def cancellable() -> Iterator[None]:
    """A context in which SIGTERM and SIGINT raise `Cancelled`."""

    def cancel(number: int, frame: FrameType | None) -> None:
        raise Cancelled(signal.Signals(number).name)

    before = {number: signal.signal(number, cancel) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def wait_for_turn(run: Path, root: Path, device: str, since: float | None = None) -> None:
    """Return when no other run is active on `device`, with its lock held until this process, or the command it becomes, ends.

    Args:
        since: when it was queued, in seconds since the epoch; None for now.
    Raises: Cancelled if it was stopped before this process began.
    """
    queue, since = root / device, since or time.time()
    ticket, record = Ticket.take(queue, run, since), RunRecord(run)
    try:
        # After the ticket was taken, so that no later run overtakes this one in between.
        update_status(record, state="queued", **CLEARED)
        if run_requests.was_asked(record, run_requests.STOP):
            # Before this process had written its id, which a request to stop ends it by.
            raise Cancelled(signal.SIGTERM.name)
        while _is_behind_another(ticket) or begins_earlier(root.parent, since):
            time.sleep(POLL_SECONDS)
        descriptor = os.open(queue / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        os.set_inheritable(descriptor, True)
        while not _locked(descriptor) or at_work(root.parent, device):
            time.sleep(POLL_SECONDS)
        update_status(record, state="starting")
    finally:
        ticket.path.unlink(missing_ok=True)


def _is_behind_another(last: Ticket) -> bool:
    """Whether a live process is ahead of `last`; tickets of processes that have ended are deleted."""
    for ticket in tickets(last.path.parent):
        if ticket.path == last.path:
            return False
        if ticket.is_live:
            return True
        ticket.path.unlink(missing_ok=True)
    return False


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def main(run: Path, root: Path, command: list[str]) -> None:
    """Wait for the turn of `run`, then become `command`; the state in status.json follows.

    Raises: SystemExit if it is stopped while it waits.
    """
    record = RunRecord(run)
    try:
        with cancellable():
            since = record.status().heartbeat if record.status().pid is None else None
            wait_for_turn(run, root, device_key(dict(os.environ)), since)
            os.execvp(command[0], command)
    except Cancelled as signalled:
        update_status(record, state="stopped", error=f"Stopped: stopped by {signalled} before its turn")
        raise SystemExit(128 + signal.Signals[str(signalled)]) from None
    except (OSError, InputError) as error:
        update_status(record, state="failed", error=f"{type(error).__name__}: {error}")
        raise


def _parse(arguments: list[str]) -> tuple[Path, Path, list[str]]:
    end = arguments.index("--") if "--" in arguments else len(arguments)
    command = arguments[end + 1 :]
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="The directory of the run, which must exist.")
    parser.add_argument("--queue", type=Path, help="The folder of the queue. Default: .queue beside the directory of the run.")
    options = parser.parse_args(arguments[:end])
    if not command:
        parser.error("the command is missing: give it after --")
    return options.run, options.queue or options.run.parent / QUEUE, command


if __name__ == "__main__":
    main(*_parse(sys.argv[1:]))
