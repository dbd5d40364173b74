"""The estimated time, memory and disk space of a run, from its dry run."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any

from training.runs.record import RunRecord
from training.runs.run_files import GB, DryRunReport

FEWEST_TO_SPARE_ONE = 5
UNKNOWN = """<p class="quiet">Not measured yet. Every run measures this first, on three real steps, and says so before it goes on;
the button does that now, in half a minute, without training anything.</p>"""


@dataclass(frozen=True)
class Plan:
    """What of the options decides how often the measured step is done.

    Args:
        steps: of the training.
        photos: how many there are.
        heldout: the option heldout_image.
    """

    steps: int
    photos: int
    heldout: str

    @property
    def folds(self) -> int:
        """Short trainings that come before, each of half the steps and without one of the photos."""
        one_by_one = self.heldout == "leave_one_out" or (self.heldout == "auto" and 2 <= self.photos < FEWEST_TO_SPARE_ONE)
        return self.photos if one_by_one else 0


def is_measured(record: RunRecord) -> bool:
    """Whether a dry run has finished with a report."""
    return (record.path / DryRunReport.NAME).exists() and record.status().get("state") == "done"


def is_measuring(record: RunRecord) -> bool:
    """Whether a dry run is active or queued."""
    return record.status().get("state") in ("queued", "starting", "running") and record.has_live_process()


def cost_summary(record: RunRecord, plan: Plan) -> str:
    """The cost estimate or its state, as HTML."""
    if is_measuring(record):
        return f'<p role="status"><span class="chip running">measuring</span> {html.escape(_progress(record.status()))}</p>'
    if is_measured(record):
        report = DryRunReport.read(record.path)
        return UNKNOWN if report is None else _measured(report, plan)
    status = record.status()
    if status.get("state") in ("failed", "interrupted", "stopped", "running", "starting", "queued"):
        return f'<div class="warning">{html.escape(_failure(record, status))}</div>'
    return UNKNOWN


def _progress(status: dict[str, Any]) -> str:
    if status.get("state") == "queued":
        return "Another run is at work; this is measured when it has ended."
    phase = status.get("phase")
    return f"Three real steps are being timed: {phase}." if phase else "Three real steps are being timed: starting."


def _measured(report: DryRunReport, plan: Plan) -> str:
    seconds = report.seconds_per_step * plan.steps
    rows = [("Training", f"about {duration(seconds)} for {plan.steps:,} steps")]
    if plan.folds:
        extra = report.seconds_per_step * (plan.steps // 2) * plan.folds
        why = f"with fewer than {FEWEST_TO_SPARE_ONE} photos, each is left out once in a short training"
        sentence = f"about {duration(extra)} more: {why}"
        rows.append(("Finding the best step", sentence))
    rows += [
        (
            "Around it",
            "loading, sample images, comparing steps, writing files: about two minutes with the built-in model",
        ),
        ("Memory", f"{report.peak_memory / GB:.1f} GB at most"),
        ("Disk", f"up to {_size(report.disk)} for checkpoints; {_size(report.disk_free)} are free"),
        ("Adapter", f"{report.num_trainable_parameters:,} trainable parameters"),
    ]
    cells = "".join(f"<div><dt>{name}</dt><dd>{html.escape(words)}</dd></div>" for name, words in rows)
    return f'<dl class="costs">{cells}</dl>'


def _failure(record: RunRecord, status: dict[str, Any]) -> str:
    error = status.get("error")
    if error:
        return f"It could not be measured: {error}"
    return "The measuring was interrupted. Measure again."


def duration(seconds: float) -> str:
    """A duration, rounded for display."""
    if seconds < 90:
        return f"{max(5, round(seconds / 5) * 5)} seconds"
    minutes = seconds / 60
    return f"{minutes:.0f} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"


def _size(count: int) -> str:
    return f"{count / GB:.1f} GB" if count >= GB / 10 else f"{count / 1e6:.1f} MB"
