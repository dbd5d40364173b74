"""What a run's directory says, read without loading any model library: status, metrics, pictures, and whether it is at work."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

OPTIONS, STATUS, METRICS = "options.json", "status.json", "metrics.jsonl"


@dataclass(frozen=True)
class RunRecord:
    """The directory of one run, to read.

    Args:
        path: the directory.
    """

    path: Path

    @property
    def samples(self) -> Path:
        """Pictures made while training."""
        return self.path / "samples"

    @property
    def checkpoints(self) -> Path:
        """Training states to resume from."""
        return self.path / "checkpoints"

    def status(self) -> dict[str, Any]:
        """The fields of status.json; empty before the first update."""
        return self.read_json(STATUS)

    def options(self) -> dict[str, Any]:
        """The resolved options by group, of options.json; empty before they are written."""
        return self.read_json(OPTIONS)

    def metrics(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl, oldest first; a last line cut short by a crash is left out."""
        path = self.path / METRICS
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def has_live_process(self) -> bool:
        """Whether the process that wrote the status last still runs; not if that is this one."""
        status = self.status()
        if "pid" not in status or status["pid"] == os.getpid():
            return False
        try:
            process = psutil.Process(status["pid"])
            # Ids are given again; start times are not. One that has ended waits for its parent as a zombie.
            return process.create_time() == status["pid_started"] and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def is_at_work(self) -> bool:
        """Whether it is running, and its process still there."""
        return self.status().get("state") == "running" and self.has_live_process()

    def read_json(self, name: str) -> dict[str, Any]:
        """The JSON file `name` of the directory; empty where there is none."""
        path = self.path / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
