"""A run is a directory: options, status, metrics, samples and checkpoints, written so that a reader never sees half a file."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil


def write_text_atomically(path: Path, text: str) -> None:
    """Write beside `path` and rename, so that a reader sees the old file or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


@dataclass(frozen=True)
class RunDirectory:
    """The directory of one run; the command line writes it, everything else only reads it."""

    path: Path

    @property
    def samples(self) -> Path:
        """Pictures made while training."""
        return self.path / "samples"

    @property
    def checkpoints(self) -> Path:
        """Training states to resume from."""
        return self.path / "checkpoints"

    @classmethod
    def create(cls, path: Path, options: Mapping[str, Any]) -> RunDirectory:
        """Make the directory and record the resolved `options` in options.json."""
        run = cls(path)
        run.samples.mkdir(parents=True, exist_ok=True)
        run.checkpoints.mkdir(exist_ok=True)
        write_text_atomically(path / "options.json", json.dumps(options, indent=2, default=str) + "\n")
        return run

    def update_status(self, **fields: Any) -> None:
        """Merge `fields` into status.json, with this process's id, its start time and a heartbeat (seconds since the epoch)."""
        process = psutil.Process()
        status = {**self.status(), **fields, "pid": process.pid, "pid_started": process.create_time(), "heartbeat": time.time()}
        write_text_atomically(self.path / "status.json", json.dumps(status, indent=2) + "\n")

    def status(self) -> dict[str, Any]:
        """The fields of status.json; empty before the first update."""
        path = self.path / "status.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def log(self, step: int, **values: float) -> None:
        """Append one line of `values` at `step` to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"step": step, "time": time.time(), **values}) + "\n")

    def metrics(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl, oldest first."""
        path = self.path / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    @contextmanager
    def recording(self):
        """Record in status.json how the enclosed work ends: "done", "stopped" by the user, or "failed" with the error."""
        self.update_status(state="running", error=None)
        try:
            yield self
        except BaseException as error:
            state = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
            self.update_status(state=state, error=f"{type(error).__name__}: {error}")
            raise
        self.update_status(state="done", phase="done")
