"""The verdict of an arena on each task, in three sentences."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.fewshot.layouts import counted
from pipelines.run_options import Task
from training.comparison.statistics import CONFIDENCE, smallest_p
from training.runs.arena_files import ArenaReport, MeasureSummary
from training.runs.arena_results import (
    PRIMARY,
    TASK_NAMES,
    base_model,
    comparisons_to_best,
    largest_shots,
    mean_of,
    measure_named,
    ranked,
)
from training.runs.naming import variant_title

SIGNIFICANT = 1 - CONFIDENCE


def verdict_of(report: ArenaReport, task: Task) -> list[str]:
    """Which method is best, which is the smallest that is not measurably worse, and what speaks against them.

    Empty if fewer than two variants have results.
    """
    shots = largest_shots(report.summaries, task)
    ranking = ranked(report.summaries, task, shots, PRIMARY[task])
    if len(ranking) < 2:
        return []
    best = ranking[0].variant
    worse = {one.variant for one in comparisons_to_best(report, task, shots) if one.adjusted_p < SIGNIFICANT}
    equal = [one.variant for one in ranking[1:] if one.variant not in worse]
    return [
        _best(report, task, shots, ranking, equal),
        _too_few_splits(report, task, shots) or _smallest(report, task, shots, best, equal),
        _caveat(report, task, shots, best),
    ]


def _best(report: ArenaReport, task: Task, shots: int | None, ranking: Sequence[MeasureSummary], equal: Sequence[str]) -> str:
    measure = measure_named(task, PRIMARY[task])
    winner, interval = variant_title(ranking[0].variant), ranking[0].interval
    at = f" at {shots} shots" if shots is not None else ""
    bounds = f"{measure.text(interval.value)}, 95% interval {measure.text(interval.low)} to {measure.text(interval.high)}"
    if before := base_model(report, task):
        bounds += f"; base model {measure.text(before[None].value)}"
    count = len(ranking) - 1
    if not equal:
        rest = "and the difference to every other method is significant"
    elif len(equal) == count:
        rest = "but no difference between it and another method is significant"
    else:
        rest = f"but the difference to {len(equal)} of the other {count} methods is not significant"
    return f"{winner} has the best {measure.title} on the {TASK_NAMES[task]}{at} ({bounds}), {rest}."


def _too_few_splits(report: ArenaReport, task: Task, shots: int | None) -> str | None:
    """A sentence if even a method that is worse on every split would not be significantly worse; None otherwise."""
    compared = comparisons_to_best(report, task, shots)
    splits = max(comparison.count for comparison in compared)
    if smallest_p(splits) * len(compared) < SIGNIFICANT:
        return None
    methods = f"{len(compared) + 1} methods" if len(compared) > 1 else "two methods"
    return f"On {counted(splits, 'split')} no difference between {methods} can be significant: add seeds, or data."


def _smallest(report: ArenaReport, task: Task, shots: int | None, best: str, equal: Sequence[str]) -> str:
    parameters = {
        name: summary.interval.value
        for name in (best, *equal)
        if (summary := mean_of(report.summaries, task, shots, "parameters", name)) is not None
    }
    smallest = min(parameters, key=parameters.__getitem__)
    size = f"{parameters[smallest]:,.0f} trained parameters"
    if smallest == best:
        return f"It is also the smallest of the methods that are not significantly worse, with {size}."
    share = parameters[smallest] / parameters[best]
    return (
        f"The smallest method that is not significantly worse is {variant_title(smallest)}, with {size}, "
        f"{share:.1%} of those of {variant_title(best)}."
    )


def _caveat(report: ArenaReport, task: Task, shots: int | None, best: str) -> str:
    """Where another method is better than the best one, by another measure."""
    if task == "few-shot":
        below = mean_of(report.summaries, task, shots, "below_zero_shot", best)
        new = ranked(report.summaries, task, shots, "harmonic_mean")
        if new and new[0].variant != best:
            better, value = variant_title(new[0].variant), new[0].interval.value
            return f"For classes that it was not trained on, {better} is better (base-to-new {value:.1%})."
        share = 0.0 if below is None else below.interval.value
        return f"It was below zero-shot on {share:.0%} of the splits."
    leaders = {name: ranked(report.summaries, task, shots, name) for name in ("text_similarity", "copying", "drift")}
    others = [
        f"{measure_named(task, name).title} ({variant_title(order[0].variant)})"
        for name, order in leaders.items()
        if order and order[0].variant != best
    ]
    if not others:
        return "It also follows prompts best, copies its training photos least and changes other images least."
    return f"Other methods are better by {', '.join(others)}."
