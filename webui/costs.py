"""The estimated time, memory and disk space of a run, from its dry run."""

from __future__ import annotations

import html
from dataclasses import dataclass

from training.runs.record import RunRecord
from training.runs.run_files import GB, DryRunReport, RunStatus
from webui.progress import duration, phase_title

# With fewer photos, `auto` cross-validates instead of holding out one of them.
MIN_PHOTOS_TO_HOLD_OUT = 5
UNKNOWN = """<p class="quiet">Not measured yet. Every run begins with a dry run of three training steps. The button starts a
dry run alone, which takes about half a minute.</p>"""


@dataclass(frozen=True)
class Plan:
    """The options that determine the number of training steps.

    Args:
        steps: the steps of the training.
        photos: the number of photos.
        heldout: the option heldout_image.
    """

    steps: int
    photos: int
    heldout: str

    @property
    def folds(self) -> int:
        """The number of cross-validation folds: short trainings with half the steps, each without one photo."""
        automatic = self.heldout == "auto" and 2 <= self.photos < MIN_PHOTOS_TO_HOLD_OUT
        return self.photos if automatic or self.heldout == "leave_one_out" else 0


def is_measured(record: RunRecord) -> bool:
    """Whether a dry run has finished with a report."""
    return (record.path / DryRunReport.NAME).exists() and record.status().state == "done"


def is_measuring(record: RunRecord) -> bool:
    """Whether a dry run is active or queued."""
    return record.status().state in ("queued", "starting", "running") and record.has_live_process()


def cost_summary(record: RunRecord, plan: Plan) -> str:
    """The cost estimate or its state, as HTML."""
    if is_measuring(record):
        return f'<p role="status"><span class="chip running">measuring</span> {html.escape(_progress(record.status()))}</p>'
    if is_measured(record):
        report = DryRunReport.read(record.path)
        return UNKNOWN if report is None else _measured(report, plan)
    status = record.status()
    if status.state in ("failed", "interrupted", "stopped", "running", "starting", "queued"):
        return f'<div class="warning">{html.escape(_failure(record, status))}</div>'
    return UNKNOWN


def _progress(status: RunStatus) -> str:
    if status.state == "queued":
        return "Another run is active. The dry run starts when it is done."
    return phase_title(status)


def _measured(report: DryRunReport, plan: Plan) -> str:
    seconds = report.seconds_per_step * plan.steps
    rows = [("Training", f"about {duration(seconds)} for {plan.steps:,} steps")]
    if plan.folds:
        extra = duration(report.seconds_per_step * (plan.steps // 2) * plan.folds)
        rows.append(("Cross-validation", f"about {extra} for {plan.folds} short trainings, each without one of the photos"))
    rows += [
        ("Other work", "about two minutes with the built-in model: loading, sample images, scoring the checkpoints, export"),
        ("Memory", f"{report.peak_memory / GB:.1f} GB at most"),
        ("Disk", f"up to {_size(report.disk)} for checkpoints; {_size(report.disk_free)} are free"),
        ("Adapter", f"{report.num_trainable_parameters:,} trainable parameters"),
    ]
    cells = "".join(f"<div><dt>{name}</dt><dd>{html.escape(words)}</dd></div>" for name, words in rows)
    return f'<dl class="costs">{cells}</dl>'


def _failure(record: RunRecord, status: RunStatus) -> str:
    error = status.error
    if error:
        return f"The dry run failed: {error}"
    return "The dry run was interrupted. Measure again."


def _size(count: int) -> str:
    return f"{count / GB:.1f} GB" if count >= GB / 10 else f"{count / 1e6:.1f} MB"
