"""Which step of a run to use: the held-out curve, the adapter kept at each of its steps, the suggestion and its reasons."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean

from torch import nn

from pipelines.methods import AdapterOptions
from pipelines.subject.adapters import save_small
from pipelines.subject.scores import COPY_THRESHOLD
from training.run import RunDirectory, write_text_atomically

SUGGESTION, ADAPTERS, FOLDS = "suggestion.json", "adapters", "folds"
# Of the whole fall of the held-out loss: what counts as equally good, and from where a rise is worth a warning; that also of
# how far the loss on training pictures has fallen meanwhile.
TOLERANCE, TURN = 0.02, 0.10


@dataclass(frozen=True)
class Point:
    """The loss after `step` steps, with fixed noise: on the held-out picture and on pictures that are trained on."""

    step: int
    heldout: float
    seen: float | None = None


@dataclass(frozen=True)
class Suggestion:
    """Which step to use.

    Args:
        step: the suggested one.
        last: the last step of the training.
        why: the reason, in words.
        warnings: of overfitting and the like, in words.
        curve: what it was judged by.
        scores: of the samples, by step: subject, prompt and copy.
    """

    step: int
    last: int
    why: str
    warnings: list[str]
    curve: list[Point]
    scores: dict[int, dict[str, float]] = field(default_factory=dict)


def adapter_at(run: RunDirectory, step: int) -> Path:
    """The folder of the adapter as it was after `step` steps."""
    return run.path / ADAPTERS / f"step-{step:07d}"


def keep_adapter(run: RunDirectory, step: int, options: AdapterOptions, components: dict[str, nn.Module]) -> None:
    """Save the adapter as it is now, in its smallest native layout, so that it can be used and exported at once."""
    target = adapter_at(run, step)
    aside = target.with_name(f".writing-{target.name}")
    shutil.rmtree(aside, ignore_errors=True)
    save_small(options, components, aside)
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)


def heldout_curve(run: RunDirectory) -> list[Point]:
    """The run's held-out curve, oldest first: its own, else the mean over the folds of a leave-one-out; empty without either."""
    own = _curve_of(run)
    if own:
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


def sample_scores(run: RunDirectory) -> dict[int, dict[str, float]]:
    """The scores of the samples drawn at each step: the means of subject and prompt, the highest of copy."""
    lines = (line for line in run.metrics() if "subject_score" in line)
    return {int(line["step"]): {name: line[f"{name}_score"] for name in ("subject", "prompt", "copy")} for line in lines}


def suggest_for(run: RunDirectory, last: int) -> Suggestion:
    """What the run suggests by all that it measured; `last` is its last step."""
    found, scores = suggest(heldout_curve(run), last), sample_scores(run)
    warnings = found.warnings + _copying(scores)
    return replace(found, warnings=warnings, scores=scores)


def _copying(scores: dict[int, dict[str, float]]) -> list[str]:
    """A warning where samples of the last step are nearly training pictures, and those of the base model are not."""
    trained = [step for step in scores if step > 0]
    if not trained or scores[max(trained)]["copy"] < COPY_THRESHOLD or scores.get(0, {}).get("copy", 0) >= COPY_THRESHOLD:
        return []
    score = scores[max(trained)]["copy"]
    return [f"A sample of step {max(trained)} is nearly a copy of a training picture ({score:.2f} of 1). Train for fewer steps."]


def suggest(curve: Sequence[Point], last: int) -> Suggestion:
    """The step to use, judged by the held-out curve, whose first point is the base model.

    The earliest step that is as good as the best one, within `TOLERANCE` of the whole fall: what was trained less has
    forgotten less. Overfitting is a held-out loss that has turned, by more than `TURN` of its fall, while the loss on the
    training pictures went on falling.

    Args:
        curve: oldest first; empty where nothing was held out.
        last: the last step of the training.
    """
    trained = [point for point in curve if point.step > 0]
    if not trained:
        why = "No picture was held out, so that nothing speaks for a step before the last."
        return Suggestion(last, last, why, ["Nothing was measured on a picture that was not trained on."], list(curve))
    base, best = curve[0], min(trained, key=lambda point: point.heldout)
    fall, end = base.heldout - best.heldout, trained[-1]
    if fall <= 0:
        why = f"The held-out loss is never below the base model's {base.heldout:.4f}; step {best.step} comes nearest to it."
        warning = "Training made the model no better on the held-out picture. Lower the learning rate, or use more pictures."
        turned = [] if base.seen is None else _overfitting(base, end, 0.0)
        return Suggestion(best.step, last, why, [warning, *turned], list(curve))
    if best is end and end.step < last:
        why = f"The held-out loss fell to the end of its curve, step {end.step}; nothing speaks for a step before the last."
        return Suggestion(last, last, why, [], list(curve))
    chosen = next(point for point in trained if point.heldout <= best.heldout + TOLERANCE * fall)
    why = f"The held-out loss falls from {base.heldout:.4f} to {chosen.heldout:.4f} at step {chosen.step}"
    why += ", the least of all." if chosen is best else f", as good as the least, {best.heldout:.4f} at step {best.step}."
    return Suggestion(chosen.step, last, why, _overfitting(best, end, fall), list(curve))


def _overfitting(best: Point, end: Point, fall: float) -> list[str]:
    """A warning where the held-out loss has turned at `best` while the loss on training pictures fell on."""
    known = best.seen is not None and end.seen is not None
    if end.heldout - best.heldout <= TURN * max(fall, best.seen - end.seen if known else 0.0):
        return []
    rise = f"the held-out loss rises from {best.heldout:.4f} at step {best.step} to {end.heldout:.4f} at step {end.step}"
    if not known:
        return [f"Overfitting: {rise}."]
    if end.seen >= best.seen:
        return [f"Training became unstable: {rise}, and the loss on the training pictures rises too. Lower the learning rate."]
    seen = f"while that on the training pictures falls on, from {best.seen:.4f} to {end.seen:.4f}"
    return [f"Overfitting: {rise}, {seen}. Train for fewer steps, or use the suggested adapter."]


def write_suggestion(run: RunDirectory, suggestion: Suggestion) -> None:
    """Write suggestion.json, with the folder of the suggested adapter where it was kept."""
    kept = adapter_at(run, suggestion.step)
    adapter = str(kept.relative_to(run.path)) if kept.is_dir() else None
    fields = {**asdict(suggestion), "adapter": adapter}
    write_text_atomically(run.path / SUGGESTION, json.dumps(fields, indent=2) + "\n")
