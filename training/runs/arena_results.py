"""What the report of an arena says: the measures, the ranking of methods by one of them, and the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pipelines.fewshot.metric_values import Interval
from pipelines.run_options import Task
from training.runs.arena_files import ArenaReport, MeasureSummary, PairedComparison
from training.runs.naming import variant_title

Direction = Literal["higher", "lower"]
TASK_NAMES: dict[Task, str] = {"subject": "subjects", "few-shot": "labelled datasets"}
# In tables, beside the titles of methods.
BASE_MODEL = "Base model"


@dataclass(frozen=True)
class Measure:
    """A measure.

    Args:
        name: in the files.
        title: its name for people.
        better: the direction that is better; None for a measure that is a property.
        form: of its values, as of `format`.
        explanation: what it is, in a sentence.
    """

    name: str
    title: str
    better: Direction | None
    form: str
    explanation: str

    def text(self, value: float) -> str:
        """The value for people."""
        return format(value, self.form)

    def with_interval(self, interval: Interval) -> str:
        """A value with its interval for people."""
        return f"{self.text(interval.value)} ({self.text(interval.low)} to {self.text(interval.high)})"


COSTS = (
    Measure("parameters", "parameters", "lower", ",.0f", "trained parameters"),
    Measure("bytes", "file, bytes", "lower", ",.0f", "the smallest native file of the adapter"),
    Measure("seconds", "seconds", "lower", ",.1f", "of the training, without measurements and exports"),
    Measure("peak_memory", "peak memory, MB", "lower", ",.0f", "of the process on a CPU, of tensors on a GPU"),
    Measure("seconds_to_quality", "seconds to quality", "lower", ",.1f", "until the reference's final quality is reached"),
)
MEASURES: dict[Task, tuple[Measure, ...]] = {
    "subject": (
        Measure(
            "heldout_loss", "held-out loss", "lower", ".4f", "denoising loss on the photo that was left out, with fixed noise"
        ),
        Measure(
            "image_similarity", "image-image", "higher", ".3f", "similarity of generated images to the photo that was left out"
        ),
        Measure("text_similarity", "image-text", "higher", ".3f", "similarity of generated images to their prompts"),
        Measure(
            "copying",
            "copying",
            "lower",
            ".3f",
            "similarity to the nearest training photo minus that to the photo that was left out",
        ),
        Measure(
            "drift", "drift", "lower", ".3f", "change of images of unrelated prompts, adapter on against off, with equal noise"
        ),
        *COSTS,
    ),
    "few-shot": (
        Measure("top1", "top-1", "higher", ".1%", "accuracy on test images"),
        Measure("calibration_error", "calibration error", "lower", ".3f", "expected calibration error on test images"),
        Measure("harmonic_mean", "base-to-new", "higher", ".1%", "harmonic mean of the accuracies on trained and on new classes"),
        Measure("below_zero_shot", "below zero-shot", "lower", ".0%", "share of the splits with a lower accuracy than zero-shot"),
        *COSTS,
    ),
}
# The measure by which methods are ranked.
PRIMARY: dict[Task, str] = {"subject": "heldout_loss", "few-shot": "top1"}
# The measures that methods are compared by in pairs.
TESTED: dict[Task, tuple[str, ...]] = {"subject": ("heldout_loss", "image_similarity", "text_similarity"), "few-shot": ("top1",)}


def measure_named(task: Task, name: str) -> Measure:
    """The measure called `name`."""
    return next(measure for measure in MEASURES[task] if measure.name == name)


def mean_of(
    summaries: Sequence[MeasureSummary], task: Task, shots: int | None, measure: str, variant: str
) -> MeasureSummary | None:
    """The mean over all datasets; None if the variant does not have the measure."""
    wanted = (task, None, variant, shots, measure)
    return next((s for s in summaries if (s.task, s.dataset, s.variant, s.shots, s.measure) == wanted), None)


def ranked(summaries: Sequence[MeasureSummary], task: Task, shots: int | None, measure: str) -> list[MeasureSummary]:
    """The means over all splits, the best one first; without variants that lack some splits, whose means are of other data."""
    sign = -1 if measure_named(task, measure).better == "higher" else 1
    chosen = _over_all(summaries, task, shots, measure)
    most = max((summary.count for summary in chosen), default=0)
    return sorted((one for one in chosen if one.count == most), key=lambda one: sign * one.interval.value)


def incomplete(summaries: Sequence[MeasureSummary], task: Task, shots: int | None) -> list[str]:
    """A sentence for each variant that lacks some splits of the primary measure, such as one whose cells have not all ended."""
    chosen = _over_all(summaries, task, shots, PRIMARY[task])
    most = max((summary.count for summary in chosen), default=0)
    return [
        f"{variant_title(one.variant)} has results on {one.count} of {most} splits and is not compared."
        for one in chosen
        if one.count < most
    ]


def _over_all(summaries: Sequence[MeasureSummary], task: Task, shots: int | None, measure: str) -> list[MeasureSummary]:
    return [s for s in summaries if (s.task, s.dataset, s.shots, s.measure) == (task, None, shots, measure)]


def measures_at(summaries: Sequence[MeasureSummary], task: Task, shots: int | None) -> list[Measure]:
    """The measures that have a mean at `shots`, in their order."""
    present = {summary.measure for summary in summaries if (summary.task, summary.shots) == (task, shots)}
    return [measure for measure in MEASURES[task] if measure.name in present]


def by_dataset(summaries: Sequence[MeasureSummary], task: Task, shots: int | None) -> dict[str, dict[str, Interval]]:
    """The primary measure, with the interval over the seeds, by dataset and variant."""
    datasets: dict[str, dict[str, Interval]] = {}
    for one in summaries:
        if one.dataset is not None and (one.task, one.shots, one.measure) == (task, shots, PRIMARY[task]):
            datasets.setdefault(one.dataset, {})[one.variant] = one.interval
    return datasets


def base_model(report: ArenaReport, task: Task) -> dict[str | None, Interval]:
    """The primary measure of the base model by dataset, None for the mean over all; empty if no curve starts at it."""
    return {one.dataset: one.interval for one in report.base_model if one.task == task}


def quality_by_shots(summaries: Sequence[MeasureSummary], task: Task) -> dict[str, list[tuple[int, Interval]]]:
    """The numbers of shots and the primary measure of each variant, the best one at the most shots first."""
    curves: dict[str, list[tuple[int, Interval]]] = {
        one.variant: [] for one in ranked(summaries, task, largest_shots(summaries, task), PRIMARY[task])
    }
    for shots in all_shots(summaries, task):
        for one in ranked(summaries, task, shots, PRIMARY[task]):
            curves.setdefault(one.variant, []).append((shots, one.interval))
    return curves


def all_shots(summaries: Sequence[MeasureSummary], task: Task) -> list[int]:
    """The numbers of shots that were measured, sorted; empty for a task without shots."""
    return sorted({summary.shots for summary in summaries if summary.task == task and summary.shots is not None})


def largest_shots(summaries: Sequence[MeasureSummary], task: Task) -> int | None:
    """The most shots that were measured; None for a task without shots."""
    return max(all_shots(summaries, task), default=None)


def comparisons_to_best(report: ArenaReport, task: Task, shots: int | None) -> list[PairedComparison]:
    """The tests of every variant against the best one by the primary measure; the best first."""
    return [one for one in report.comparisons if (one.task, one.shots, one.measure) == (task, shots, PRIMARY[task])]


def front_of(report: ArenaReport, task: Task, shots: int | None) -> list[str]:
    """The variants that no other one beats in both quality and parameters, by rising parameters."""
    sign = -1 if measure_named(task, PRIMARY[task]).better == "lower" else 1
    points = {name: (parameters, sign * quality) for name, parameters, quality, *_ in points_of(report, task, shots)}
    return pareto_front(points)


def points_of(report: ArenaReport, task: Task, shots: int | None) -> list[tuple[str, float, float, float, float]]:
    """Name, parameters, quality and its bounds of each variant with both, the best one first.

    The bounds are those of the paired difference to the best variant: those of the mean tell how much the datasets differ.
    """
    points = []
    differences = {one.variant: one.difference for one in comparisons_to_best(report, task, shots)}
    for one in ranked(report.summaries, task, shots, PRIMARY[task]):
        quality, difference = one.interval.value, differences.get(one.variant, Interval(0.0, 0.0, 0.0))
        parameters = mean_of(report.summaries, task, shots, "parameters", one.variant)
        if parameters is not None:
            low, high = (quality + bound - difference.value for bound in (difference.low, difference.high))
            points.append((one.variant, parameters.interval.value, quality, low, high))
    return points


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names of the points that no other point beats: none has at most their cost and a higher quality, or less cost and the
    same quality; by rising cost.

    Args:
        points: cost and quality of each name; a higher quality is better.
    """
    front: list[str] = []
    best = -math.inf
    for name, (_, quality) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if quality > best:
            front.append(name)
            best = quality
    return front
