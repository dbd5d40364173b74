"""The results of a run by step, read from its directory: sample images and their scores, validation losses, saved adapters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from math import isclose
from pathlib import Path
from statistics import fmean

from PIL import Image

from pipelines.images import SETTINGS_KEY
from training.runs.record import RunRecord
from training.runs.run_files import ADAPTERS, FOLDS, STEP, Point, StepScores, step_name, step_of


@dataclass(frozen=True)
class Sample:
    """One sample image.

    Args:
        path: its file.
        prompt, seed: its generation settings.
        side: its width in pixels.
    """

    path: Path
    prompt: str
    seed: int
    side: int


def sampled_steps(run: RunRecord) -> list[int]:
    """The steps with sample images, in order; 0 is the base model."""
    names = (path.name.removeprefix(STEP) for path in run.samples.glob(f"{STEP}*") if path.is_dir())
    return sorted(int(name) for name in names if name.isdigit())


def samples(run: RunRecord, step: int) -> list[Sample]:
    """The sample images of `step`, one per prompt."""
    return _images_in(run.samples_at(step))


def subject_images(run: RunRecord) -> list[Sample]:
    """Some training images as the model sees them."""
    return _images_in(run.subject)


def newest_sheet(run: RunRecord) -> Path | None:
    """The newest contact sheet of samples; some recipes write no single samples. None if there is none."""
    return max(run.samples.glob(f"{STEP}*.png"), default=None)


def _images_in(folder: Path) -> list[Sample]:
    paths = sorted(folder.glob("*.png"), key=lambda path: int(path.stem))
    return [_sample(path, path.stat().st_mtime_ns) for path in paths]


@lru_cache(maxsize=4096)
def _sample(path: Path, changed: int) -> Sample:
    with Image.open(path, formats=("PNG",)) as image:
        settings = json.loads(image.text.get(SETTINGS_KEY, "{}"))
        return Sample(path, str(settings.get("prompt", "")), int(settings.get("seed", 0)), image.width)


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
    curve = measured_curve(run)
    if len(curve) > 1:
        return curve
    folds = [measured_curve(RunRecord(path)) for path in sorted((run.path / FOLDS).glob("*")) if path.is_dir()]
    # Folds that are still training have fewer points.
    by_step = zip(*folds, strict=False) if folds else ()
    return [Point(points[0].step, fmean(p.heldout for p in points), _mean_seen(points)) for points in by_step]


def measured_curve(run: RunRecord) -> list[Point]:
    """The validation loss by step on the run's held-out image, the base model first; empty without one."""
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
