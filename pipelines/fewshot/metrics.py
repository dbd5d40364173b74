"""How good a classifier is, how far its confidence can be believed, and how sure both are."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy import optimize, stats
from sklearn.metrics import confusion_matrix, recall_score
from torch.nn import functional as F

BINS = 15
LEVEL = 0.95
# Temperatures are searched in this range, first on a grid of equal ratios.
TEMPERATURES, GRID = (0.05, 20.0), 61


@dataclass(frozen=True)
class Interval:
    """An estimate, and the interval that holds what it estimates in 95% of all cases."""

    value: float
    low: float
    high: float

    def as_share(self) -> str:
        """For people, of a share, which no interval leaves: "90.0% (85.1% to 100.0%)"."""
        return f"{self.value:.1%} ({max(0.0, self.low):.1%} to {min(1.0, self.high):.1%})"


@dataclass(frozen=True)
class Reliability:
    """How often predictions of about the same confidence are right; bins without predictions hold zeros.

    Args:
        confidence: (bins,) mean confidence of each bin's predictions.
        accuracy: (bins,) share of them that is right.
        counts: (bins,) how many they are.
    """

    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def expected_calibration_error(self) -> float:
        """sum over bins of  count / n |accuracy - confidence|  [Guo et al. 2017, eq. 3]."""
        gaps = np.abs(np.subtract(self.accuracy, self.confidence))
        return float(np.average(gaps, weights=self.counts))


@dataclass(frozen=True)
class ClassificationMetrics:
    """What a run reports of one classifier on one part.

    Args:
        count: images.
        top1: share of them that is right, with Wilson's interval.
        per_class: the same of each class; None for classes without images.
        class_counts: images of each class; 0 for classes without, which no score speaks of.
        calibration_error: expected, over 15 bins.
        negative_log_likelihood: mean, in nats.
        temperature: that the logits were divided by.
        confusion: (classes, classes) counts; rows are true classes, columns predicted ones.
        reliability: what the calibration error is the mean of.
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

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def score(logits: torch.Tensor, labels: torch.Tensor, classes: Sequence[str], temperature: float = 1.0) -> ClassificationMetrics:
    """All scores of a classifier.

    Args:
        logits: (n, classes).
        labels: (n,) int64.
        temperature: to divide the logits by, fitted on other images.
    Raises: ValueError if the shapes do not fit, n is 0, or a logit is no finite number.
    """
    _check(logits, labels)
    if logits.shape[1] != len(classes):
        raise ValueError(f"logits must have a column for each of {len(classes)} classes, got {logits.shape[1]}.")
    probabilities = (logits.double() / temperature).softmax(dim=1)
    predicted, places = logits.argmax(dim=1), range(len(classes))
    found = reliability(probabilities, labels)
    recalls = recall_score(labels.cpu(), predicted.cpu(), labels=places, average=None, zero_division=np.nan)
    names = _named(classes)
    per_class = {name: None if math.isnan(own) else float(own) for name, own in zip(names, recalls, strict=True)}
    counts = torch.bincount(labels.cpu(), minlength=len(classes)).tolist()
    return ClassificationMetrics(
        count=len(labels),
        top1=wilson_interval(int((predicted == labels).sum()), len(labels)),
        per_class=per_class,
        class_counts=dict(zip(names, counts, strict=True)),
        calibration_error=found.expected_calibration_error,
        negative_log_likelihood=float(F.cross_entropy(logits.double() / temperature, labels)),
        temperature=temperature,
        confusion=confusion_matrix(labels.cpu(), predicted.cpu(), labels=places).tolist(),
        reliability=found,
    )


def _named(classes: Sequence[str]) -> list[str]:
    """The classes' names, told apart by their places where two are the same, as two of ImageNet's are."""
    return [name if classes.count(name) == 1 else f"{name} ({place})" for place, name in enumerate(classes)]


def _check(logits: torch.Tensor, labels: torch.Tensor) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(f"logits must be (n, classes) and labels (n,), n >= 1, got {logits.shape} and {labels.shape}.")
    if not logits.isfinite().all():
        raise ValueError(f"logits must be finite, got {int((~logits.isfinite()).sum())} that are not. Lower the learning rate.")


def top1(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of images whose largest logit, of (n, classes), is that of their label, of (n,)."""
    _check(logits, labels)
    return float((logits.argmax(dim=1) == labels).double().mean())


def reliability(probabilities: torch.Tensor, labels: torch.Tensor, bins: int = BINS) -> Reliability:
    """Accuracy by confidence, in bins of equal width: ((k - 1) / bins, k / bins].

    Args:
        probabilities: (n, classes).
        labels: (n,) int64.
    """
    confidence, predicted = probabilities.double().max(dim=1)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=confidence.device)[1:-1]
    of_bin = torch.bucketize(confidence, edges)
    counts = torch.bincount(of_bin, minlength=bins)
    sums = [torch.bincount(of_bin, weights, minlength=bins) for weights in (confidence, (predicted == labels).double())]
    mean_confidence, accuracy = (total / counts.clamp(min=1) for total in sums)
    return Reliability(tuple(mean_confidence.tolist()), tuple(accuracy.tolist()), tuple(counts.tolist()))


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """T, between 0.05 and 20, that minimises the negative log-likelihood of softmax(logits / T)  [Guo et al. 2017, 4.2]

        -sum log p_T(label) + log(T)^2 / 2

    The second term, a log-normal prior about 1, is soon outweighed. Without it T would fall without end where validation is
    all right, as a few images of each class often are, and every prediction would be called certain.

    Args:
        logits: (n, classes), of validation images.
        labels: (n,) int64.
    Raises: ValueError as `score`.
    """
    _check(logits, labels)
    precise = logits.double()

    def loss(log_temperature: float) -> float:
        likelihood = F.cross_entropy(precise / math.exp(log_temperature), labels, reduction="sum")
        return float(likelihood) + log_temperature**2 / 2

    grid = np.linspace(*map(math.log, TEMPERATURES), GRID)
    nearest = int(np.argmin([loss(place) for place in grid]))
    bounds = grid[max(0, nearest - 1)], grid[min(GRID - 1, nearest + 1)]
    return math.exp(optimize.minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x)


def wilson_interval(correct: int, total: int, level: float = LEVEL) -> Interval:
    """A share with Wilson's score interval, for one run.

    The ends solve  |correct / total - p| = z sqrt(p (1 - p) / total).  [Wilson 1927]

    Raises: ValueError unless 0 <= correct <= total and total >= 1.
    """
    if not 0 <= correct <= total or not total:
        raise ValueError(f"correct must lie between 0 and total, which is 1 or more, got {correct} of {total}.")
    found = stats.binomtest(correct, total).proportion_ci(level, method="wilson")
    return Interval(correct / total, float(found.low), float(found.high))


def interval_over_seeds(values: Sequence[float], level: float = LEVEL) -> Interval:
    """The mean over runs with other seeds, and Student's interval:  mean -+ t(n - 1) s / sqrt(n).

    Raises: ValueError for fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"An interval over seeds needs two runs or more, got {len(values)}. Run more seeds.")
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    reach = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * error
    return Interval(mean, mean - reach, mean + reach)


def harmonic_mean(base: float, new: float) -> float:
    """2 base new / (base + new): of the accuracies on trained and on held-out classes.  [Zhou et al. 2022, CoCoOp, 4.1]"""
    return statistics.harmonic_mean([base, new])
