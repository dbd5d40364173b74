"""The measurements of a run by step, read from its directory: validation losses, scores of samples, and saved adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from math import isclose
from pathlib import Path
from statistics import fmean

from training.runs.record import RunRecord
from training.runs.run_files import ADAPTERS, FOLDS, STEP, Point, StepScores, step_name, step_of


def adapter_at(run: RunRecord, step: int) -> Path:
    """The folder of the adapter after `step` steps."""
    return run.path / ADAPTERS / step_name(step)


def saved_steps(run: RunRecord) -> list[int]:
    """The steps whose adapters were saved, in order."""
    return sorted(step_of(path) for path in (run.path / ADAPTERS).glob(f"{STEP}*"))


def heldout_curve(run: RunRecord) -> list[Point]:
    """The validation loss by step, the base model first; empty if no trained step was measured.

    With cross-validation, it is the mean over the folds, up to the last step that all of them have measured.
    """
    curve = _curve_of(run)
    if len(curve) > 1:
        return curve
    folds = [_curve_of(RunRecord(path)) for path in sorted((run.path / FOLDS).glob("*")) if path.is_dir()]
    # Folds that are still training have fewer points.
    by_step = zip(*folds, strict=False) if folds else ()
    return [Point(points[0].step, fmean(p.heldout for p in points), _mean_seen(points)) for points in by_step]


def _curve_of(run: RunRecord) -> list[Point]:
    # A resumed run may measure a step again; the last measurement counts.
    lines = {logged.step: logged.values for logged in run.metrics() if "heldout_loss" in logged.values}
    return [Point(step, lines[step]["heldout_loss"], lines[step].get("seen_loss")) for step in sorted(lines)]


def _mean_seen(points: Sequence[Point]) -> float | None:
    seen = [point.seen for point in points if point.seen is not None]
    return fmean(seen) if seen else None


def sample_scores(run: RunRecord) -> dict[int, StepScores]:
    """The scores of the samples by step, the base model's at 0; if a step was scored twice, the last scores count.

    A resumed run may have another image scorer, with another scale. Each scorer computes its own `nearest_limit`, so scores with
    another limit than the last ones are left out.
    """
    names = [each.name for each in fields(StepScores)]
    lines = [line for line in run.metrics() if all(metric_name(name) in line.values for name in names)]
    scores = {line.step: StepScores(*(line.values[metric_name(name)] for name in names)) for line in lines}
    newest = scores[lines[-1].step].nearest_limit if lines else 0.0
    return {step: each for step, each in scores.items() if isclose(each.nearest_limit, newest)}


def metric_name(field: str) -> str:
    """The name of a field of `StepScores` in metrics.jsonl."""
    return f"{field}_score" if field != "nearest_limit" else field
