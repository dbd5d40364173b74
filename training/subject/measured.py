"""What a run knows of its steps, read from its directory: the held-out curve, the scores of samples, the adapter kept at each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from math import isclose
from pathlib import Path
from statistics import fmean

from training.runs.record import RunRecord
from training.runs.run_files import ADAPTERS, FOLDS, STEP, Point, StepScores, step_name, step_of


def adapter_at(run: RunRecord, step: int) -> Path:
    """The folder of the adapter as it was after `step` steps."""
    return run.path / ADAPTERS / step_name(step)


def kept_steps(run: RunRecord) -> list[int]:
    """The steps whose adapters were kept, in order."""
    return sorted(step_of(path) for path in (run.path / ADAPTERS).glob(f"{STEP}*"))


def heldout_curve(run: RunRecord) -> list[Point]:
    """The run's held-out curve, oldest first: its own, else the mean over the folds of a leave-one-out, as far as all
    of them have come; empty without either.

    Its first point is the base model; with that alone it is empty too.
    """
    curve = _curve_of(run)
    if len(curve) > 1:
        return curve
    folds = [_curve_of(RunRecord(path)) for path in sorted((run.path / FOLDS).glob("*")) if path.is_dir()]
    # Whoever looks on sees folds that are still at work.
    by_step = zip(*folds, strict=False) if folds else ()
    return [Point(points[0].step, fmean(p.heldout for p in points), _mean_seen(points)) for points in by_step]


def _curve_of(run: RunRecord) -> list[Point]:
    # A step measured again after a resume counts once.
    lines = {logged.step: logged.values for logged in run.metrics() if "heldout_loss" in logged.values}
    return [Point(step, lines[step]["heldout_loss"], lines[step].get("seen_loss")) for step in sorted(lines)]


def _mean_seen(points: Sequence[Point]) -> float | None:
    seen = [point.seen for point in points if point.seen is not None]
    return fmean(seen) if seen else None


def sample_scores(run: RunRecord) -> dict[int, StepScores]:
    """The scores of the samples drawn at each step, the base model's at 0; the newest where a step was scored twice.

    A resumed run may have another judge, whose scores have another scale. By their limit of nearness, which every judge
    measures for itself, those that the newest did not give are told apart and left out.
    """
    names = [each.name for each in fields(StepScores)]
    lines = [line for line in run.metrics() if all(metric_name(name) in line.values for name in names)]
    scores = {line.step: StepScores(*(line.values[metric_name(name)] for name in names)) for line in lines}
    newest = scores[lines[-1].step].nearest_limit if lines else 0.0
    return {step: each for step, each in scores.items() if isclose(each.nearest_limit, newest)}


def metric_name(field: str) -> str:
    """The name of a field of `StepScores` in metrics.jsonl."""
    return f"{field}_score" if field != "nearest_limit" else field
