"""Writing a run's directory: options, status, metrics and samples. A reader never sees half a file."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate.tracking import GeneralTracker
from PIL import Image

from pipelines.images import save_png
from pipelines.run_file import ResolvedOptions
from pipelines.text_files import write_text_atomically
from training.runs.durable import DiskFullError, free_bytes, is_disk_full
from training.runs.progress import PlannedPhase, RunProgress
from training.runs.record import RunRecord, list_checkpoints, update_status
from training.runs.run_files import METRICS, LoggedMetrics, step_name
from training.runs.tracking import log_image

RESERVE, RESERVED_BYTES = ".reserve", 1 << 16


@dataclass(frozen=True)
class RunDirectory(RunRecord):
    """The directory of a run, for the process that writes it.

    Args:
        path: the directory.
        writes: whether this process writes; only the main process of a run does.
        trackers: they get all metrics and images as well.
        progress: of the run.
        whole: the run that this one is a part of, such as a fold of cross-validation; None for a run of its own.
    """

    writes: bool = True
    trackers: list[GeneralTracker] = field(default_factory=list, compare=False)
    progress: RunProgress = field(default_factory=RunProgress, compare=False)
    whole: RunDirectory | None = field(default=None, compare=False)

    @classmethod
    def create(
        cls, path: Path, options: Mapping[str, Any], writes: bool = True, whole: RunDirectory | None = None
    ) -> RunDirectory:
        """Make the directory and write the resolved `options`, by group, to options.json."""
        run = cls(path, writes, whole=whole)
        if writes:
            run.samples.mkdir(parents=True, exist_ok=True)
            run.checkpoints.mkdir(exist_ok=True)
            ResolvedOptions(dict(options)).write(path)
        return run

    def update_status(self, **fields: Any) -> None:
        """Merge `fields` into status.json, with this process's id, its start time and a heartbeat (seconds since the epoch)."""
        if self.writes:
            update_status(self, **fields)

    def plan(self, phases: Sequence[PlannedPhase]) -> None:
        """Set the phases of the run."""
        self.progress.expect(phases, self.status().share)

    def begin(self, phase: str, number: int | None = None, **fields: Any) -> None:
        """Report that `phase` begins, with `fields` for the status.

        Args:
            number: from 1, of a repeated phase.
        """
        self.progress.enter(phase, number)
        self.update_status(phase=phase, **fields, **self.progress.fields())

    def reach(self, step: int, total: int, first: int = 0) -> None:
        """Report that a training has done `step` of `total` steps, of which an earlier session has done `first`."""
        for run in filter(None, (self, self.whole)):
            run.progress.reach(step / total, first / total)
            run.update_status(**run.progress.fields(), **({"step": step, "total": total} if run is self else {}))

    def log(self, step: int, **values: float) -> None:
        """Append `values` at `step` to metrics.jsonl."""
        if not self.writes:
            return
        with (self.path / METRICS).open("a", encoding="utf-8") as lines:
            lines.write(LoggedMetrics(step, time.time(), values).line())
        for tracker in self.trackers:
            tracker.log(values, step=step)

    def save_image(self, step: int, image: Image.Image, name: str = "samples") -> None:
        """Save the sheet of images of `step` as samples/step-<step>.png, and log it to the trackers as `name`."""
        if not self.writes:
            return
        save_png(image, self.samples / f"{step_name(step)}.png")
        for tracker in self.trackers:
            log_image(tracker, name, image, step)

    def forget_metrics_after(self, step: int) -> None:
        """Drop the lines of steps after `step`: a resumed run writes them again."""
        if self.writes and (self.path / METRICS).exists():
            lines = [metrics.line() for metrics in self.metrics() if metrics.step <= step]
            write_text_atomically(self.path / METRICS, "".join(lines))

    def recording(self) -> Recording:
        """A context that records in status.json how its block ends: "done", "stopped" by the user, or "failed" with the error."""
        return Recording(self)


@dataclass(frozen=True)
class Recording:
    """The context of `RunDirectory.recording`."""

    run: RunDirectory

    def __enter__(self) -> RunDirectory:
        if self.run.writes:
            # Deleted at the end, so that even on a full disk there is room for the last status.
            (self.run.path / RESERVE).write_bytes(bytes(RESERVED_BYTES))
        self.run.update_status(state="running", error=None)
        return self.run

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self.run.writes:
            (self.run.path / RESERVE).unlink(missing_ok=True)
            for tracker in self.run.trackers:
                tracker.finish()
        if error is None:
            self.run.progress.end()
            plan = self.run.progress.plan or None
            self.run.update_status(state="done", phase="done", share=1.0, seconds_left=0.0, plan=plan)
            return
        full = isinstance(error, OSError) and is_disk_full(error)
        reported = DiskFullError(self._full_disk()) if full else error
        state = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
        self.run.update_status(state=state, error=f"{type(reported).__name__}: {reported}")
        if reported is not error:
            raise reported from error

    def _full_disk(self) -> str:
        checkpoints = list_checkpoints(self.run.checkpoints)
        saved = f"The checkpoint {checkpoints[-1].name} is complete" if checkpoints else "No checkpoint was saved yet"
        return (
            f"The disk of {str(self.run.path)!r} is full, {free_bytes(self.run.path):,} bytes are free. {saved}. Free some space "
            f"and resume with --output_dir {self.run.path} --resume_from_checkpoint latest."
        )
