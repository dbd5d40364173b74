"""From the observations of an arena to its report: means with intervals, paired tests, and seconds to a given quality."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations

from pipelines.run_options import Task
from training.comparison.statistics import bootstrap_interval, holm, signed_rank_p
from training.runs.arena_files import MeasureSummary, Observation, PairedComparison
from training.runs.arena_results import PRIMARY, TESTED, measure_named

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


def comparisons_of(observations: Sequence[Observation]) -> list[PairedComparison]:
    """Every pair of variants, on the splits that both have; adjusted for the number of pairs of each measure and shots."""
    grouped: dict[tuple[Task, int | None], list[Observation]] = defaultdict(list)
    for one in observations:
        grouped[one.task, one.shots].append(one)
    return [
        comparison
        for (task, shots), group in grouped.items()
        for measure in TESTED[task]
        for comparison in _adjusted(list(_compared(task, shots, measure, group)))
    ]


def _compared(task: Task, shots: int | None, measure: str, group: Sequence[Observation]) -> Iterator[PairedComparison]:
    values: dict[str, dict[Split, float]] = defaultdict(dict)
    for one in group:
        if measure in one.values:
            values[one.variant][one.dataset, one.seed] = one.values[measure]
    for first, second in combinations(values, 2):
        differences = {
            split: values[first][split] - values[second][split] for split in values[first].keys() & values[second].keys()
        }
        if differences:
            p = signed_rank_p([differences[split] for split in sorted(differences)])
            yield PairedComparison(task, shots, measure, first, second, _interval(differences), len(differences), p, p)


def _interval(differences: Mapping[Split, float]):
    by_dataset: dict[str, list[float]] = defaultdict(list)
    for (dataset, _), value in sorted(differences.items()):
        by_dataset[dataset].append(value)
    return bootstrap_interval(by_dataset)


def _adjusted(comparisons: Sequence[PairedComparison]) -> list[PairedComparison]:
    adjusted = holm([one.p for one in comparisons])
    return [replace(one, adjusted_p=p) for one, p in zip(comparisons, adjusted, strict=True)]
