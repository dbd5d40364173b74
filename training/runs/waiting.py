"""Wait for a run's turn, then become its command: one run at a time on a device, whoever started it, first come first served.

    python -m training.runs.waiting RUN_DIR --queue DIR -- accelerate launch training/dreambooth_nora.py ...

No scheduler is needed, and nothing is left to mend when a process is killed: a lock on a file, which the command inherits,
ends with the command, and tickets of processes that are gone are skipped.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import sys
import time
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import psutil

from training.runs.durable import write_text_atomically
from training.runs.record import RunRecord, live_process, update_status
from training.runs.run_files import RunStatus

QUEUE, LOCK, TICKET = ".queue", "lock", ".ticket"
DEVICES, CPU = "CUDA_VISIBLE_DEVICES", "cpu"
POLL_SECONDS = 0.25
# What a run that goes on had said of its last process.
FORGOTTEN = {"error": None, "phase": None, "seconds_left": None}


class Cancelled(Exception):
    """The run was asked to stop while it waited."""


def device_key(environment: dict[str, str]) -> str:
    """What runs that must not run at once have in common, as a folder's name."""
    return re.sub(r"[^A-Za-z0-9]+", "-", environment.get(DEVICES, "")).strip("-") or CPU


@dataclass(frozen=True)
class Ticket:
    """A place in the queue.

    Args:
        path: its file; names are in the order in which places were taken.
        run: the directory of the run that waits.
        pid, pid_started: the process that waits.
    """

    path: Path
    run: str
    pid: int
    pid_started: float

    @classmethod
    def take(cls, queue: Path, run: Path) -> Ticket:
        """Take the last place in `queue`, for this process."""
        queue.mkdir(parents=True, exist_ok=True)
        process = psutil.Process()
        ticket = cls(queue / f"{time.time_ns():020d}-{process.pid}{TICKET}", str(run), process.pid, process.create_time())
        values = {name: value for name, value in asdict(ticket).items() if name != "path"}
        write_text_atomically(ticket.path, json.dumps(values) + "\n")
        return ticket

    @property
    def is_live(self) -> bool:
        """Whether the process still waits."""
        return live_process(self.pid, self.pid_started) is not None


def tickets(queue: Path) -> list[Ticket]:
    """All places of `queue`, the first first, also of processes that are gone."""
    found = []
    for path in sorted(queue.glob(f"[!.]*{TICKET}")):
        with suppress(FileNotFoundError):
            found.append(Ticket(path, **json.loads(path.read_text(encoding="utf-8"))))
    return found


def runs_before(root: Path, run: Path) -> int | None:
    """How many runs have their turn before `run`, the one at work included; None where it does not wait.

    Args:
        root: the folder of all devices' queues.
    """
    for queue in root.glob("*"):
        live = [ticket.run for ticket in tickets(queue) if ticket.is_live]
        if str(run) in live:
            return live.index(str(run)) + 1
    return None


def at_work(runs: Path, device: str) -> list[RunRecord]:
    """The runs in `runs`, or in the folders of its accounts, that hold `device` without having queued for it.

    A run that queued has a launcher that holds the lock; one whose launcher was killed still saves for a while.
    """
    records = [
        RunRecord(path.parent) for pattern in (f"*/{RunStatus.NAME}", f"*/*/{RunStatus.NAME}") for path in runs.glob(pattern)
    ]
    return [record for record in records if record.is_at_work() and _device_of(record) == device]


def _device_of(record: RunRecord) -> str | None:
    process = record.process()
    try:
        return None if process is None else device_key(process.environ())
    except psutil.NoSuchProcess:
        return None
    except psutil.AccessDenied:
        # Another user's: with one device, which most machines have, it is that.
        return device_key(dict(os.environ))


@contextmanager
def cancellable() -> Iterator[None]:
    """Meanwhile SIGTERM and SIGINT raise `Cancelled`."""

    def cancel(number: int, frame: FrameType | None) -> None:
        raise Cancelled(signal.Signals(number).name)

    before = {number: signal.signal(number, cancel) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def wait_for_turn(run: Path, root: Path, device: str) -> None:
    """Return when nothing else is at work on `device`, holding its lock for as long as this process and what it becomes live."""
    queue = root / device
    ticket = Ticket.take(queue, run)
    try:
        while _anyone_before(ticket):
            time.sleep(POLL_SECONDS)
        descriptor = os.open(queue / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        os.set_inheritable(descriptor, True)
        while not _locked(descriptor) or at_work(root.parent, device):
            time.sleep(POLL_SECONDS)
        update_status(RunRecord(run), state="starting")
    finally:
        ticket.path.unlink(missing_ok=True)


def _anyone_before(own: Ticket) -> bool:
    """Whether another process was there first; places of those that are gone are cleared away."""
    for ticket in tickets(own.path.parent):
        if ticket.path == own.path:
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
    """Wait until it is the turn of `run`, then become `command`; the run's status.json says which.

    Raises: SystemExit if it was asked to stop meanwhile.
    """
    record = RunRecord(run)
    try:
        with cancellable():
            update_status(record, state="queued", **FORGOTTEN)
            wait_for_turn(run, root, device_key(dict(os.environ)))
            os.execvp(command[0], command)
    except Cancelled as asked:
        update_status(record, state="stopped", error=f"Stopped: stopped by {asked} before its turn")
        raise SystemExit(128 + signal.Signals[str(asked)]) from None
    except OSError as error:
        update_status(record, state="failed", error=f"{type(error).__name__}: {error}")
        raise


def _parse(arguments: list[str]) -> tuple[Path, Path, list[str]]:
    place = arguments.index("--") if "--" in arguments else len(arguments)
    own, command = arguments[:place], arguments[place + 1 :]
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="The run's directory, which must be there.")
    parser.add_argument("--queue", type=Path, help="The folder of the queue; .queue beside the run unless said.")
    options = parser.parse_args(own)
    if not command:
        parser.error("give the command to wait for after --")
    return options.run, options.queue or options.run.parent / QUEUE, command


if __name__ == "__main__":
    main(*_parse(sys.argv[1:]))
