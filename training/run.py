"""A run is a directory: options, status, metrics, samples and checkpoints, written so that a reader never sees half a file."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil


def write_text_atomically(path: Path, text: str) -> None:
    """Write beside `path` and rename, so that a reader sees the old file or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


@dataclass(frozen=True)
class RunDirectory:
    """The directory of one run; the command line writes it, everything else only reads it.

    Args:
        path: the directory.
        writes: False on all processes of a run but the main one, which then write nothing.
    """

    path: Path
    writes: bool = True

    @property
    def samples(self) -> Path:
        """Pictures made while training."""
        return self.path / "samples"

    @property
    def checkpoints(self) -> Path:
        """Training states to resume from."""
        return self.path / "checkpoints"

    @classmethod
    def create(cls, path: Path, options: Mapping[str, Any], writes: bool = True) -> RunDirectory:
        """Make the directory and record the resolved `options` in options.json."""
        run = cls(path, writes)
        if writes:
            run.samples.mkdir(parents=True, exist_ok=True)
            run.checkpoints.mkdir(exist_ok=True)
            write_text_atomically(path / "options.json", json.dumps(options, indent=2, default=str) + "\n")
        return run

    def update_status(self, **fields: Any) -> None:
        """Merge `fields` into status.json, with this process's id, its start time and a heartbeat (seconds since the epoch)."""
        if not self.writes:
            return
        process = psutil.Process()
        own = {"pid": process.pid, "pid_started": process.create_time(), "heartbeat": time.time()}
        write_text_atomically(self.path / "status.json", json.dumps({**self.status(), **fields, **own}, indent=2) + "\n")

    def status(self) -> dict[str, Any]:
        """The fields of status.json; empty before the first update."""
        path = self.path / "status.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def log(self, step: int, **values: float) -> None:
        """Append one line of `values` at `step` to metrics.jsonl."""
        if not self.writes:
            return
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"step": step, "time": time.time(), **values}) + "\n")

    def metrics(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl, oldest first; a last line cut short by a crash is left out."""
        path = self.path / "metrics.jsonl"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def forget_metrics_after(self, step: int) -> None:
        """Drop the lines of steps after `step`, which a resumed run is about to write again."""
        if self.writes and (self.path / "metrics.jsonl").exists():
            kept = [line for line in self.metrics() if line["step"] <= step]
            write_text_atomically(self.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))

    def recording(self) -> Recording:
        """Record in status.json how the enclosed work ends: "done", "stopped" by the user, or "failed" with the error."""
        return Recording(self)


@dataclass(frozen=True)
class Recording:
    """The context in which a run's work is done."""

    run: RunDirectory

    def __enter__(self) -> RunDirectory:
        self.run.update_status(state="running", error=None)
        return self.run

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is None:
            self.run.update_status(state="done", phase="done")
        else:
            state = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
            self.run.update_status(state=state, error=f"{type(error).__name__}: {error}")
