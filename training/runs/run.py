"""A run is a directory: options, status, metrics, samples and checkpoints, written so that a reader never sees half a file."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate.tracking import GeneralTracker
from PIL import Image

from pipelines.run_options import OPTIONS
from training.runs.durable import DiskFullError, free_bytes, is_disk_full, write_text_atomically
from training.runs.record import RunRecord, list_checkpoints, update_status
from training.runs.run_files import METRICS, step_name
from training.runs.tracking import log_image

RESERVE, RESERVED_BYTES = ".reserve", 1 << 16


@dataclass(frozen=True)
class RunDirectory(RunRecord):
    """The directory of one run; the command line writes it, everything else only reads it.

    Args:
        path: the directory.
        writes: False on all processes of a run but the main one, which then write nothing.
        trackers: what else all metrics and images are handed to.
    """

    writes: bool = True
    trackers: list[GeneralTracker] = field(default_factory=list, compare=False)

    @classmethod
    def create(cls, path: Path, options: Mapping[str, Any], writes: bool = True) -> RunDirectory:
        """Make the directory and record the resolved `options` in options.json."""
        run = cls(path, writes)
        if writes:
            run.samples.mkdir(parents=True, exist_ok=True)
            run.checkpoints.mkdir(exist_ok=True)
            write_text_atomically(path / OPTIONS, json.dumps(options, indent=2, default=str) + "\n")
        return run

    def update_status(self, **fields: Any) -> None:
        """Merge `fields` into status.json, with this process's id, its start time and a heartbeat (seconds since the epoch)."""
        if self.writes:
            update_status(self, **fields)

    def log(self, step: int, **values: float) -> None:
        """Append one line of `values` at `step` to metrics.jsonl."""
        if not self.writes:
            return
        with (self.path / METRICS).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"step": step, "time": time.time(), **values}) + "\n")
        for tracker in self.trackers:
            tracker.log(values, step=step)

    def save_image(self, step: int, image: Image.Image, name: str = "samples") -> None:
        """Save an image made at `step` as samples/step-<step>.png, and hand it to the trackers as `name`."""
        if not self.writes:
            return
        image.save(self.samples / f"{step_name(step)}.png")
        for tracker in self.trackers:
            log_image(tracker, name, image, step)

    def forget_metrics_after(self, step: int) -> None:
        """Drop the lines of steps after `step`, which a resumed run is about to write again."""
        if self.writes and (self.path / METRICS).exists():
            kept = [line for line in self.metrics() if line["step"] <= step]
            write_text_atomically(self.path / METRICS, "".join(json.dumps(line) + "\n" for line in kept))

    def recording(self) -> Recording:
        """Record in status.json how the enclosed work ends: "done", "stopped" by the user, or "failed" with the error."""
        return Recording(self)


@dataclass(frozen=True)
class Recording:
    """The context in which a run's work is done."""

    run: RunDirectory

    def __enter__(self) -> RunDirectory:
        if self.run.writes:
            # On a full disk this makes room to say so.
            (self.run.path / RESERVE).write_bytes(bytes(RESERVED_BYTES))
        self.run.update_status(state="running", error=None)
        return self.run

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self.run.writes:
            (self.run.path / RESERVE).unlink(missing_ok=True)
            for tracker in self.run.trackers:
                tracker.finish()
        if error is None:
            self.run.update_status(state="done", phase="done")
            return
        full = isinstance(error, OSError) and is_disk_full(error)
        shown = DiskFullError(self._full_disk()) if full else error
        state = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
        self.run.update_status(state=state, error=f"{type(shown).__name__}: {shown}")
        if shown is not error:
            raise shown from error

    def _full_disk(self) -> str:
        checkpoints = list_checkpoints(self.run.checkpoints)
        safe = f"The checkpoint {checkpoints[-1].name} is safe" if checkpoints else "There was no checkpoint yet"
        return (
            f"The disk of {str(self.run.path)!r} is full, {free_bytes(self.run.path):,} bytes are free. {safe}. Free some space "
            f"and go on with --output_dir {self.run.path} --resume_from_checkpoint latest."
        )
