"""The metrics in the report of a few-shot run, as dataclasses that are read from JSON without numerical libraries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from operator import itemgetter
from typing import Any


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95% confidence interval."""

    value: float
    low: float
    high: float

    def is_above(self, other: Interval) -> bool:
        """Whether the interval lies above another one."""
        return self.low > other.high

    def as_share(self) -> str:
        """The estimate as percentages, clipped to [0, 1]: "90.0% (85.1% to 100.0%)"."""
        return f"{self.value:.1%} ({max(0.0, self.low):.1%} to {min(1.0, self.high):.1%})"


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram; bins without predictions hold zeros.

    Args:
        confidence: (bins,) mean confidence of each bin's predictions.
        accuracy: (bins,) accuracy of each bin's predictions.
        counts: (bins,) their number.
    """

    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def expected_calibration_error(self) -> float:
        """sum over bins of  count / n |accuracy - confidence|  [Guo et al. 2017, eq. 3]."""
        bins = zip(self.confidence, self.accuracy, self.counts, strict=True)
        return sum(count * abs(accuracy - confidence) for confidence, accuracy, count in bins) / sum(self.counts)


@dataclass(frozen=True)
class ClassificationMetrics:
    """The metrics of one classifier on one part of a split.

    Args:
        count: number of images.
        top1: accuracy, with Wilson's interval.
        per_class: accuracy of each class; None for classes without images.
        class_counts: number of images of each class; no metric covers a class with 0.
        calibration_error: expected calibration error over 15 bins.
        negative_log_likelihood: mean, in nats.
        temperature: divisor of the logits.
        confusion: (classes, classes) counts; rows are true classes, columns predicted ones.
        reliability: the bins of the calibration error.
    """

    count: int
    top1: Interval
    per_class: dict[str, float | None]
    class_counts: dict[str, int]
    calibration_error: float
    negative_log_likelihood: float
    temperature: float
    confusion: list[list[int]]
    reliability: Reliability

    @property
    def untested(self) -> list[str]:
        """The classes without images."""
        return [name for name, accuracy in self.per_class.items() if accuracy is None]

    @property
    def by_class(self) -> list[tuple[str, float, int, str]]:
        """The tested classes, the lowest accuracy first: name, accuracy, number of images, and what it is mistaken for."""
        rows, names = [], list(self.per_class)
        for label, (name, accuracy) in enumerate(self.per_class.items()):
            mistakes = {names[other]: count for other, count in enumerate(self.confusion[label]) if count and other != label}
            if accuracy is not None:
                rows.append((name, accuracy, sum(self.confusion[label]), max(mistakes, key=mistakes.get, default="")))
        return sorted(rows, key=itemgetter(1))

    def most_confused(self, most: int) -> list[int]:
        """The labels of at most `most` classes, those with the most mistakes, in order."""
        counts = self.confusion
        mistakes = [sum(row) + sum(other[label] for other in counts) - 2 * row[label] for label, row in enumerate(counts)]
        return sorted(sorted(range(len(counts)), key=lambda label: -mistakes[label])[:most])

    def to_json(self) -> dict[str, Any]:
        """Plain values, which `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> ClassificationMetrics:
        """The metrics that `to_json` wrote."""
        nested = {"top1": Interval(**content["top1"]), "reliability": Reliability(**content["reliability"])}
        return cls(**{**content, **nested})
