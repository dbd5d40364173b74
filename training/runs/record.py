"""What a run's directory says, read without loading any model library: status, metrics, images, and whether it is at work."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from pipelines.deprecated_flags import with_current_names
from pipelines.run_options import OPTIONS
from training.runs.run_files import CHECKPOINTS, METRICS, SAMPLES, STEP, RunStatus, step_name, step_of


@dataclass(frozen=True)
class RunRecord:
    """The directory of one run, to read.

    Args:
        path: the directory.
    """

    path: Path

    @property
    def samples(self) -> Path:
        """Images made while training."""
        return self.path / SAMPLES

    @property
    def subject(self) -> Path:
        """Some of the images that are trained on, as the model sees them."""
        return self.samples / "subject"

    def samples_at(self, step: int) -> Path:
        """The folder of the images made after `step` steps, one a prompt; 0 is the base model."""
        return self.samples / step_name(step)

    @property
    def checkpoints(self) -> Path:
        """Training states to resume from."""
        return self.path / CHECKPOINTS

    def status(self) -> dict[str, Any]:
        """The fields of status.json that are set; empty before the first update."""
        status = RunStatus.read(self.path)
        return {} if status is None else status.to_json()

    def options(self) -> dict[str, Any]:
        """The resolved options by group, of options.json; empty before they are written."""
        return with_current_names(self.read_json(OPTIONS))

    def metrics(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl, oldest first; a last line cut short by a crash is left out."""
        text = self._read(METRICS)
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def has_live_process(self) -> bool:
        """Whether the process that wrote the status last still runs; not if that is this one."""
        process = self.process()
        return process is not None and process.pid != os.getpid()

    def process(self) -> psutil.Process | None:
        """The process that wrote the status last, if it still runs."""
        status = self.status()
        return live_process(status["pid"], status["pid_started"]) if "pid" in status else None

    def is_at_work(self) -> bool:
        """Whether it is running, and its process still there."""
        return self.status().get("state") == "running" and self.has_live_process()

    def read_json(self, name: str) -> dict[str, Any]:
        """The JSON file `name` of the directory; empty where there is none."""
        text = self._read(name)
        return json.loads(text) if text else {}

    def _read(self, name: str) -> str:
        """The file `name`; empty where there is none."""
        try:
            return (self.path / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""


def live_process(pid: int, started: float) -> psutil.Process | None:
    """The process `pid` that was started at `started`, if it still runs."""
    try:
        process = psutil.Process(pid)
        # Ids are given again; start times are not. One that has ended waits for its parent as a zombie.
        is_it = process.create_time() == started and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return None
    return process if is_it else None


def update_status(record: RunRecord, **fields: Any) -> None:
    """Merge `fields` into status.json, with this process's id, its start time and a heartbeat (seconds since the epoch)."""
    process = psutil.Process()
    status = RunStatus.read(record.path) or RunStatus()
    writer = {"pid": process.pid, "pid_started": process.create_time(), "heartbeat": time.time()}
    replace(status, **fields, **writer).write(record.path)


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints under `folder`, oldest first."""
    return sorted(folder.glob(f"{STEP}*"))


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint under `folder`, 0 where there is none."""
    return step_of(list_checkpoints(folder)[-1]) if list_checkpoints(folder) else 0
