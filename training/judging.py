"""What a run knows of its steps: the held-out curve, the scores of samples, the adapter kept at each; and what it suggests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, fields
from math import isclose
from pathlib import Path
from statistics import fmean

from torch import nn

from pipelines.methods import AdapterOptions
from pipelines.subject.adapters import save_small
from training.run import RunDirectory, write_text_atomically
from training.suggesting import Point, StepScores, Suggestion, suggest

SUGGESTION, ADAPTERS, FOLDS = "suggestion.json", "adapters", "folds"
KEPT_AT = "step-"


def adapter_at(run: RunDirectory, step: int) -> Path:
    """The folder of the adapter as it was after `step` steps."""
    return run.path / ADAPTERS / f"{KEPT_AT}{step:07d}"


def kept_steps(run: RunDirectory) -> list[int]:
    """The steps whose adapters were kept, in order."""
    return sorted(int(path.name.removeprefix(KEPT_AT)) for path in (run.path / ADAPTERS).glob(f"{KEPT_AT}*"))


def keep_adapter(run: RunDirectory, step: int, options: AdapterOptions, components: dict[str, nn.Module]) -> None:
    """Save the adapter as it is now, in its smallest native layout, so that it can be used and exported at once."""
    target = adapter_at(run, step)
    aside = target.with_name(f".writing-{target.name}")
    shutil.rmtree(aside, ignore_errors=True)
    save_small(options, components, aside)
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)


def heldout_curve(run: RunDirectory) -> list[Point]:
    """The run's held-out curve, oldest first: its own, else the mean over the folds of a leave-one-out; empty without either.

    Its first point is the base model; with that alone it is empty too.
    """
    own = _curve_of(run)
    if len(own) > 1:
        return own
    folds = [_curve_of(RunDirectory(path, writes=False)) for path in sorted((run.path / FOLDS).glob("*")) if path.is_dir()]
    by_step = zip(*folds, strict=True) if folds else ()
    return [Point(points[0].step, fmean(p.heldout for p in points), _mean_seen(points)) for points in by_step]


def _curve_of(run: RunDirectory) -> list[Point]:
    # A step measured again after a resume counts once.
    lines = {int(line["step"]): line for line in run.metrics() if "heldout_loss" in line}
    return [Point(step, lines[step]["heldout_loss"], lines[step].get("seen_loss")) for step in sorted(lines)]


def _mean_seen(points: Sequence[Point]) -> float | None:
    seen = [point.seen for point in points if point.seen is not None]
    return fmean(seen) if seen else None


def sample_scores(run: RunDirectory) -> dict[int, StepScores]:
    """The scores of the samples drawn at each step, the base model's at 0; the newest where a step was scored twice.

    A resumed run may have another judge, whose scores have another scale. By their limit of nearness, which every judge
    measures for itself, those that the newest did not give are told apart and left out.
    """
    names = [each.name for each in fields(StepScores)]
    lines = [line for line in run.metrics() if all(logged(name) in line for name in names)]
    found = {int(line["step"]): StepScores(*(line[logged(name)] for name in names)) for line in lines}
    return {step: each for step, each in found.items() if isclose(each.nearest_limit, lines[-1][logged("nearest_limit")])}


def logged(name: str) -> str:
    """What a field of `StepScores` is called among the metrics."""
    return f"{name}_score" if name != "nearest_limit" else name


def suggest_for(run: RunDirectory, last: int) -> Suggestion:
    """What the run suggests by all that it measured; `last` is its last step."""
    return suggest(heldout_curve(run), last, sample_scores(run))


def write_suggestion(run: RunDirectory, suggestion: Suggestion) -> None:
    """Write suggestion.json, with the folder of the suggested adapter where it was kept."""
    kept = adapter_at(run, suggestion.step)
    adapter = str(kept.relative_to(run.path)) if kept.is_dir() else None
    fields = {**asdict(suggestion), "adapter": adapter}
    write_text_atomically(run.path / SUGGESTION, json.dumps(fields, indent=2) + "\n")
