"""A run's directory, read without loading a model library: options, status, metrics, and whether its process runs."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from pipelines.run_file import ResolvedOptions
from training.runs.run_files import CHECKPOINTS, SAMPLES, STEP, LoggedMetrics, RunStatus, read_metrics, step_name, step_of


@dataclass(frozen=True)
class RunRecord:
    """The directory of a run, for reading.

    Args:
        path: the directory.
    """

    path: Path

    @property
    def samples(self) -> Path:
        """Images generated during training."""
        return self.path / SAMPLES

    @property
    def subject(self) -> Path:
        """Some training images as the model sees them."""
        return self.samples / "subject"

    def samples_at(self, step: int) -> Path:
        """The folder of the images generated after `step` steps, one for each prompt; step 0 is the base model."""
        return self.samples / step_name(step)

    @property
    def checkpoints(self) -> Path:
        """Training states to resume from."""
        return self.path / CHECKPOINTS

    def status(self) -> RunStatus:
        """The status; without any field set before the first update."""
        return RunStatus.read(self.path) or RunStatus()

    def options(self) -> dict[str, Any]:
        """The resolved options by group; empty before they are written."""
        options = ResolvedOptions.read(self.path)
        return {} if options is None else options.groups

    def metrics(self) -> list[LoggedMetrics]:
        """The logged metrics, oldest first; see `read_metrics`."""
        return read_metrics(self.path)

    def has_live_process(self) -> bool:
        """Whether the process that wrote the status last still runs and is not this one."""
        process = self.process()
        return process is not None and process.pid != os.getpid()

    def process(self) -> psutil.Process | None:
        """The process that wrote the status last; None if it has ended."""
        return process_of(self.status())

    def is_at_work(self) -> bool:
        """Whether its state is "running" and its process still runs."""
        return self.status().state == "running" and self.has_live_process()


def process_of(status: RunStatus) -> psutil.Process | None:
    """The process that wrote `status`; None if it has ended."""
    pid, started = status.pid, status.pid_started
    return live_process(pid, started) if isinstance(pid, int) and isinstance(started, float) else None


def live_process(pid: int, started: float) -> psutil.Process | None:
    """The process `pid` that was started at `started`; None if it has ended."""
    try:
        process = psutil.Process(pid)
        # The system reuses ids, so the start time is compared as well. A process that has ended may remain as a zombie.
        is_same = process.create_time() == started and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return None
    return process if is_same else None


def update_status(record: RunRecord, **fields: Any) -> None:
    """Merge `fields` into status.json, with this process's id, its start time and a heartbeat (seconds since the epoch)."""
    process = psutil.Process()
    writer = {"pid": process.pid, "pid_started": process.create_time(), "heartbeat": time.time()}
    replace(record.status(), **fields, **writer).write(record.path)


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints under `folder`, oldest first."""
    return sorted(folder.glob(f"{STEP}*"))


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint under `folder`; 0 if there is none."""
    return step_of(list_checkpoints(folder)[-1]) if list_checkpoints(folder) else 0
