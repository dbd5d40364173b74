"""Run a cell: the command of a recipe, as a process, to its end."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from threading import Event

import psutil

from pipelines.run_file import ResolvedOptions
from training.runs.arena_files import CellRecord
from training.runs.recipe_process import single_process_environment
from training.runs.record import RunRecord, live_process

LOG = "log.txt"
# A process that was killed is started again: the system may have needed its memory for another one.
MAX_ATTEMPTS = 3
POLL_SECONDS = 0.2
# How long a stopped cell may take to save a checkpoint.
STOP_SECONDS = 60
STOPPED_CODES = (128 + signal.SIGTERM, 128 + signal.SIGINT)


def run_cell(folder: Path, record: CellRecord, environment: Mapping[str, str], stop: Event) -> CellRecord:
    """Run the command of a cell to its end and record how it ended. A run that was begun before is resumed.

    Args:
        folder: the cell's run directory.
        environment: variables beside those of this process.
        stop: when it is set, the process is stopped; the cell then stays unfinished.
    Returns: the record as it was written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _wait_for_earlier_process(folder, stop)
    code = 0
    while not (stop.is_set() or is_finished(folder) or record.attempts >= MAX_ATTEMPTS):
        process = _start(folder, record.command, environment)
        record = _started(record, process)
        record.write(folder)
        code = _wait(process, stop)
        if code >= 0 and code not in STOPPED_CODES:
            break
    if is_finished(folder):
        record = replace(record, state="done", reason=None)
    elif not stop.is_set():
        record = replace(record, state="failed", reason=_failure(folder, code))
    record.write(folder)
    return record


def is_finished(folder: Path) -> bool:
    """Whether the run in `folder` has ended well."""
    return RunRecord(folder).status().state == "done"


def _wait_for_earlier_process(folder: Path, stop: Event) -> None:
    """Wait while a process of an arena that was killed still works on the cell."""
    record = CellRecord.read(folder)
    if record is None or record.pid is None or record.host != socket.gethostname():
        return
    while live_process(record.pid, record.pid_started) is not None and not stop.is_set():
        time.sleep(POLL_SECONDS)


def _start(folder: Path, command: list[str], environment: Mapping[str, str]) -> subprocess.Popen:
    resumed = (folder / ResolvedOptions.NAME).exists()
    words = [*command, *(("--resume_from_checkpoint", "latest") if resumed else ())]
    with (folder / LOG).open("ab") as log:
        return subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env={**single_process_environment(), **environment})


def _started(record: CellRecord, process: subprocess.Popen) -> CellRecord:
    """The record of a cell whose command runs as `process`."""
    pid_started = psutil.Process(process.pid).create_time()
    attempts = record.attempts + 1
    return replace(
        record, state="running", host=socket.gethostname(), pid=process.pid, pid_started=pid_started, attempts=attempts
    )


def _wait(process: subprocess.Popen, stop: Event) -> int:
    """The exit code of `process`; it is stopped when `stop` is set, or this process is interrupted."""
    try:
        while process.poll() is None and not stop.is_set():
            time.sleep(POLL_SECONDS)
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
    return process.wait()


def _failure(folder: Path, code: int) -> str:
    """Why the run in `folder` failed: its error, else the last line that it printed."""
    status = RunRecord(folder).status()
    if status.error is not None:
        return status.error
    lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").split("\n") if (folder / LOG).exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), f"exit code {code}")
