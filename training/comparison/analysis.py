"""From the observations of an arena to its report: means with intervals, paired tests, and seconds to a given quality."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from pipelines.fewshot.metric_values import Interval
from pipelines.run_options import Task
from training.comparison.statistics import bootstrap_interval, holm, signed_rank_p
from training.runs.arena_files import MeasureSummary, Observation, PairedComparison
from training.runs.arena_results import BASE_MODEL, PRIMARY, TESTED, measure_named, ranked

Split = tuple[str, int]


def merged(observations: Sequence[Observation]) -> list[Observation]:
    """One observation for each variant and split, with the values of all its cells and the curve of the first one."""
    by_split: dict[tuple, Observation] = {}
    for one in observations:
        key = (one.task, one.dataset, one.variant, one.shots, one.seed)
        before = by_split.get(key)
        by_split[key] = one if before is None else replace(before, values={**one.values, **before.values})
    return list(by_split.values())


def with_seconds_to_quality(observations: Sequence[Observation], reference: str) -> list[Observation]:
    """The observations with `seconds_to_quality`: when the curve first reaches the last point of the curve that the variant
    `reference` has on the same split; missing where it never does.
    """
    goals = {
        (one.task, one.dataset, one.shots, one.seed): one.curve[-1][1]
        for one in observations
        if one.variant == reference and one.curve
    }
    return [_with_seconds(one, goals.get((one.task, one.dataset, one.shots, one.seed))) for one in observations]


def _with_seconds(one: Observation, goal: float | None) -> Observation:
    if goal is None:
        return one
    sign = -1 if measure_named(one.task, PRIMARY[one.task]).better == "lower" else 1
    reached = [seconds for seconds, quality in one.curve if sign * quality >= sign * goal]
    return replace(one, values={**one.values, "seconds_to_quality": reached[0]}) if reached else one


def summaries_of(observations: Sequence[Observation]) -> list[MeasureSummary]:
    """The mean of every measure, over all datasets and for each dataset."""
    grouped: dict[tuple, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for one in observations:
        for name, value in one.values.items():
            for dataset in (None, one.dataset):
                grouped[one.task, dataset, one.variant, one.shots, name][one.dataset].append(value)
    return [MeasureSummary(*key, bootstrap_interval(values), sum(map(len, values.values()))) for key, values in grouped.items()]


def base_model_summaries(observations: Sequence[Observation], at_base: Collection[str]) -> list[MeasureSummary]:
    """The held-out loss of the base model, over all subjects and for each: the first point of a curve on each split.

    Labelled datasets have none: zero-shot is one of their methods.

    Args:
        at_base: the variants that start at the base model.
    """
    started = {
        (one.dataset, one.seed): one for one in observations if one.task == "subject" and one.variant in at_base and one.curve
    }
    measure = PRIMARY["subject"]
    return summaries_of([replace(one, variant=BASE_MODEL, values={measure: one.curve[0][1]}) for one in started.values()])


def comparisons_of(observations: Sequence[Observation], summaries: Sequence[MeasureSummary]) -> list[PairedComparison]:
    """Every variant against the best one, in the order of their means; adjusted for their number by Holm's method.

    The best one is the control, as usual when learning methods are compared [Garcia et al. 2010, Information Sciences 180]. The
    correction for all pairs grows with the square of the number of variants: among fifty, no difference on fifteen splits would
    be significant.

    Args:
        summaries: of the observations.
    """
    comparisons: list[PairedComparison] = []
    for task, shots in dict.fromkeys((one.task, one.shots) for one in observations):
        for measure in TESTED[task]:
            order = [summary.variant for summary in ranked(summaries, task, shots, measure)]
            group = [one for one in observations if (one.task, one.shots) == (task, shots) and measure in one.values]
            comparisons += _adjusted(list(_against_first(task, shots, measure, order, group)))
    return comparisons


def _against_first(
    task: Task, shots: int | None, measure: str, order: Sequence[str], group: Sequence[Observation]
) -> Iterator[PairedComparison]:
    values: dict[str, dict[Split, float]] = defaultdict(dict)
    for one in group:
        values[one.variant][one.dataset, one.seed] = one.values[measure]
    for variant in order[1:]:
        best = order[0]
        common = sorted(values[variant].keys() & values[best].keys())
        differences = {split: values[variant][split] - values[best][split] for split in common}
        if differences:
            p = signed_rank_p(list(differences.values()))
            yield PairedComparison(task, shots, measure, variant, best, _interval(differences), len(differences), p, p)


def _interval(differences: Mapping[Split, float]) -> Interval:
    by_dataset: dict[str, list[float]] = defaultdict(list)
    for (dataset, _), value in differences.items():
        by_dataset[dataset].append(value)
    return bootstrap_interval(by_dataset)


def _adjusted(comparisons: Sequence[PairedComparison]) -> list[PairedComparison]:
    adjusted = holm([one.p for one in comparisons])
    return [replace(one, adjusted_p=p) for one, p in zip(comparisons, adjusted, strict=True)]
