"""Recommend a step of a run by the validation loss and the scores of samples, with the reason and warnings."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from training.runs.run_files import Point, StepScores, Suggestion

# Shares of the total reduction in validation loss: losses this close are equally good, and a rise this large is reported as
# overfitting.
TOLERANCE, OVERFITTING_RISE = 0.02, 0.10
# The least share of that reduction that a step must keep to be a candidate.
MIN_SHARE_OF_REDUCTION = 0.5
# Similarity to the subject may be lower by this share of its gain over the base model, similarity to the prompts by this
# share of its best value.
SIMILARITY_TOLERANCE, PROMPT_TOLERANCE = 0.05, 0.10


Scored = Mapping[int, StepScores]


def suggest(curve: Sequence[Point], last: int, scores: Scored | None = None) -> Suggestion:
    """Recommend a step by the validation loss and the samples together.

    The validation loss reaches its minimum early, before the subject is sharp in generated images. On the bundled toy the minimum
    comes with less than 90% of the possible gain in similarity, and the full gain with 75% of the reduction in loss. The loss
    of a single held-out image is also uncertain. So the loss only excludes steps, and similarity selects one:

    1. Candidates keep at least `MIN_SHARE_OF_REDUCTION` of the total reduction in validation loss (see `candidate_steps`).
    2. Excluded are candidates with a sample that nearly copies a training image, and those whose similarity to the prompts is
       more than `PROMPT_TOLERANCE` below the best.
    3. The remaining candidates within `SIMILARITY_TOLERANCE` of the best gain in similarity to the subject count as equal. The
       tolerances are fractions, because image scorers have no common scale.
    4. Among these the step with the lowest validation loss is recommended, or the earliest if no loss was measured.

    Without samples of the step with the lowest validation loss the loss alone decides (see `_by_loss`). Without a held-out image
    the samples alone decide.

    Args:
        curve: the validation loss by step, the base model first; empty without a held-out image.
        last: the last step of the training.
        scores: of the samples by step, the base model's at 0.
    """
    scores = scores or {}
    step, reasons, warnings = _by_loss(curve, last)
    compared = candidate_steps(curve, [each for each in scores if each > 0])
    if len(compared) > 1 and 0 in scores and (_falls_on(curve) or _best(curve).step in compared):
        step, reasons = _by_samples(curve, scores, compared)
    return Suggestion(step, last, reasons, warnings + _copying(scores), list(curve), dict(scores))


def candidate_steps(curve: Sequence[Point], steps: Collection[int]) -> list[int]:
    """Those of `steps` that the validation loss does not exclude, in order.

    Without a held-out image, none is excluded. If the loss never falls below the base model's, only its lowest step remains. If
    the curve falls to its end, later steps remain too: the short trainings of cross-validation end earlier.
    """
    if not curve:
        return sorted(steps)
    base, best, end = curve[0].heldout, _best(curve), curve[-1]
    # At least the lowest loss, which rounding must not exclude.
    most = max(best.heldout, base - MIN_SHARE_OF_REDUCTION * (base - best.heldout))
    candidates = {point.step for point in curve[1:] if point.heldout <= most} if best.heldout < base else {best.step}
    return [step for step in sorted(steps) if step in candidates or (_falls_on(curve) and step > end.step)]


def steps_to_sample(curve: Sequence[Point], candidates: Collection[int], scored: Collection[int], count: int) -> list[int]:
    """The steps to generate samples for after training, so that they can be compared.

    These are the `count` candidates with the lowest validation loss, without those that have scored samples. If the loss of some
    candidates is unknown, they are evenly spaced and include the last one.

    Args:
        candidates, scored: the steps with a saved adapter, and those with scored samples.
    """
    possible, heldout = candidate_steps(curve, candidates), {point.step: point.heldout for point in curve}
    count = min(count, len(possible))
    if all(step in heldout for step in possible):
        chosen = sorted(possible, key=lambda step: (heldout[step], step))[:count]
    else:
        chosen = [possible[(index + 1) * len(possible) // count - 1] for index in range(count)]
    return sorted(set(chosen) - set(scored))


def _best(curve: Sequence[Point]) -> Point:
    """The point with the lowest validation loss, without the base model."""
    return min(curve[1:], key=lambda point: point.heldout)


def _falls_on(curve: Sequence[Point]) -> bool:
    """Whether the curve is empty or falls to its end, so that steps after it may be as good."""
    return not curve or (_best(curve) is curve[-1] and curve[-1].heldout < curve[0].heldout)


def _by_loss(curve: Sequence[Point], last: int) -> tuple[int, list[str], list[str]]:
    """The recommended step by the validation loss alone, the reason, and warnings.

    It is the earliest step whose loss is within `TOLERANCE` of the total reduction from the lowest: less training forgets less.
    Overfitting is a rise of the validation loss by more than `OVERFITTING_RISE` of its reduction while the loss on
    the training images keeps falling.
    """
    if not curve:
        reason = "No image was held out, so the last step is used."
        return last, [reason], ["Nothing was measured on an image that was not trained on."]
    base, best, end = curve[0], _best(curve), curve[-1]
    fall = base.heldout - best.heldout
    if fall <= 0:
        reason = f"The validation loss never falls below the base model's {base.heldout:.4f}; step {best.step} comes closest."
        warning = "Training did not improve the loss on the held-out image. Lower the learning rate, or use more images."
        return best.step, [reason], [warning, *([] if base.seen is None else _overfitting(base, end, 0.0))]
    if best is end and end.step < last:
        reason = f"The validation loss was still falling at its last measurement, step {end.step}, so the last step is used."
        return last, [reason], []
    chosen = next(point for point in curve[1:] if point.heldout <= best.heldout + TOLERANCE * fall)
    lowest = "the lowest value" if chosen is best else f"as good as the lowest value, {best.heldout:.4f} at step {best.step}"
    reason = f"The validation loss falls from {base.heldout:.4f} to {chosen.heldout:.4f} at step {chosen.step}, {lowest}."
    return chosen.step, [reason], _overfitting(best, end, fall)


def _by_samples(curve: Sequence[Point], scores: Scored, compared: Sequence[int]) -> tuple[int, list[str]]:
    """The step among `compared` by rules 2 to 4 of `suggest`, and the reasons."""
    free = [step for step in compared if not _copies(scores, step)]
    if not free:
        step = min(compared, key=lambda step: (scores[step].copy, step))
        least = f"Of these, step {step} is farthest from its nearest thumbnail."
        reason = f"{_steps(compared)} generate near copies of training images. {least}"
        return step, [reason, *_measurements(curve, scores, step)]
    least = max(scores[step].prompt - PROMPT_TOLERANCE * abs(scores[step].prompt) for step in free)
    follow = [step for step in free if scores[step].prompt >= least]
    best = max(scores[step].subject for step in follow)
    similar = [
        step for step in follow if scores[step].subject >= best - SIMILARITY_TOLERANCE * max(0.0, best - scores[0].subject)
    ]
    heldout = {point.step: point.heldout for point in curve}
    # Steps after the end of a falling curve count as equal to its end.
    step = min(similar, key=lambda step: (heldout.get(step, min(heldout.values(), default=0.0)), step))
    others = {each for each in scores if each > 0} - set(compared)
    excluded = {
        "their validation loss": others & set(heldout),
        "a missing validation loss": others - set(heldout),
        "near copies": set(compared) - set(free),
        "low similarity to their prompts": set(free) - set(follow),
    }
    sentences = [_reason(curve, step, follow, similar), *_measurements(curve, scores, step), f"Compared: {_listed(compared)}."]
    return step, sentences + [f"Excluded for {reason}: {_listed(steps)}." for reason, steps in excluded.items() if steps]


def _reason(curve: Sequence[Point], step: int, eligible: Sequence[int], similar: Sequence[int]) -> str:
    """Rules 3 and 4 for `step`, as sentences.

    Args:
        eligible: the steps that rules 1 and 2 leave.
        similar: those of them that are about as similar to the subject as the best.
    """
    losses = {point.step: point.heldout for point in curve}
    if len(eligible) == 1:
        return f"Step {step} is the only compared step without near copies and with a high similarity to the prompts."
    if len(similar) == 1:
        return f"Of the checkpoints at {_steps(eligible).lower()}, step {step} is clearly the most similar to the subject."
    if step in losses:
        why = f"Of these, step {step} has the lowest validation loss, {losses[step]:.4f}."
    elif curve:
        why = f"Of these, step {step} is the earliest after step {curve[-1].step}, where the validation loss was still falling."
    else:
        why = f"Of these, step {step} is the earliest. No image was held out, so there is no validation loss."
    return f"{_steps(similar)} are about equally similar to the subject. {why}"


def _measurements(curve: Sequence[Point], scores: Scored, step: int) -> list[str]:
    """Each measurement of `step` and its range over all measured steps, as sentences."""
    columns = [
        ("Image similarity (CLIP-I)", {each: scored.subject for each, scored in scores.items()}, 3),
        ("Prompt similarity (CLIP-T)", {each: scored.prompt for each, scored in scores.items()}, 3),
        ("Validation loss", {point.step: point.heldout for point in curve}, 4),
    ]
    ranges = [
        f"{name} {values[step]:.{digits}f}; {_range(values, digits)}." for name, values, digits in columns if step in values
    ]
    return [*ranges, f"Memorisation: {scores[step].copy_summary}."]


def _range(values: Mapping[int, float], digits: int) -> str:
    """The lowest and the highest of `values` with their steps."""
    low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    ends = [f"{values[step]:.{digits}f} ({f'step {step}' if step else 'base model'})" for step in (low, high)]
    return f"range over all steps {ends[0]} to {ends[1]}"


def _steps(steps: Sequence[int]) -> str:
    """Such as "Steps 10, 20 and 30"."""
    *others, last = map(str, steps)
    return f"Steps {', '.join(others)} and {last}" if others else f"Step {last}"


def _listed(steps: Collection[int]) -> str:
    return ", ".join(map(str, sorted(steps)))


def _copies(scores: Scored, step: int) -> bool:
    """Whether the samples of a step contain near copies and those of the base model do not."""
    return scores[step].is_copy and not (0 in scores and scores[0].is_copy)


def _copying(scores: Scored) -> list[str]:
    """A warning if the last step copies training images and the base model does not."""
    last = max(scores, default=0)
    if last == 0 or not _copies(scores, last):
        return []
    return [f"A sample of step {last} is nearly a copy of a training image: {scores[last].copy_summary}. Train for fewer steps."]


def _overfitting(best: Point, end: Point, fall: float) -> list[str]:
    """A warning if the validation loss rises after `best` while the training loss keeps falling."""
    has_seen_loss = best.seen is not None and end.seen is not None
    if end.heldout - best.heldout <= OVERFITTING_RISE * max(fall, best.seen - end.seen if has_seen_loss else 0.0):
        return []
    rise = f"the validation loss rises from {best.heldout:.4f} at step {best.step} to {end.heldout:.4f} at step {end.step}"
    if not has_seen_loss:
        return [f"Overfitting: {rise}."]
    if end.seen >= best.seen:
        return [f"Training became unstable: {rise}, and the loss on the training images rises too. Lower the learning rate."]
    seen = f"while the loss on the training images keeps falling, from {best.seen:.4f} to {end.seen:.4f}"
    return [f"Overfitting: {rise}, {seen}. Train for fewer steps, or use the recommended adapter."]
