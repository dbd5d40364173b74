"""Accuracy and calibration of a classifier, with confidence intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np
import torch
from scipy import optimize, stats
from sklearn.metrics import confusion_matrix, recall_score
from torch.nn import functional as F

from pipelines.fewshot.metric_values import ClassificationMetrics, Interval, Reliability

BINS = 15
LEVEL = 0.95
# Range of the temperature, and the number of points of a logarithmic grid over it.
TEMPERATURES, GRID = (0.05, 20.0), 61


def score(logits: torch.Tensor, labels: torch.Tensor, classes: Sequence[str], temperature: float = 1.0) -> ClassificationMetrics:
    """The metrics of a classifier.

    Args:
        logits: (n, classes).
        labels: (n,) int64.
        temperature: divisor of the logits, fitted on other images.
    Raises: ValueError if the shapes do not fit, n is 0, or a logit is not finite.
    """
    _check(logits, labels)
    if logits.shape[1] != len(classes):
        raise ValueError(f"logits must have a column for each of {len(classes)} classes, got {logits.shape[1]}.")
    probabilities = (logits.double() / temperature).softmax(dim=1)
    predicted, indices = logits.argmax(dim=1), range(len(classes))
    diagram = reliability(probabilities, labels)
    recalls = recall_score(labels.cpu(), predicted.cpu(), labels=indices, average=None, zero_division=np.nan)
    names = _named(classes)
    per_class = {name: None if math.isnan(recall) else float(recall) for name, recall in zip(names, recalls, strict=True)}
    counts = torch.bincount(labels.cpu(), minlength=len(classes)).tolist()
    return ClassificationMetrics(
        count=len(labels),
        top1=wilson_interval(int((predicted == labels).sum()), len(labels)),
        per_class=per_class,
        class_counts=dict(zip(names, counts, strict=True)),
        calibration_error=diagram.expected_calibration_error,
        negative_log_likelihood=float(F.cross_entropy(logits.double() / temperature, labels)),
        temperature=temperature,
        confusion=confusion_matrix(labels.cpu(), predicted.cpu(), labels=indices).tolist(),
        reliability=diagram,
    )


def _named(classes: Sequence[str]) -> list[str]:
    """Unique names of the classes: names that occur twice, as in ImageNet, get their index."""
    return [name if classes.count(name) == 1 else f"{name} ({index})" for index, name in enumerate(classes)]


def _check(logits: torch.Tensor, labels: torch.Tensor) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(f"logits must be (n, classes) and labels (n,), n >= 1, got {logits.shape} and {labels.shape}.")
    if not logits.isfinite().all():
        raise ValueError(
            f"logits must be finite, got {int((~logits.isfinite()).sum())} non-finite values. Lower the learning rate."
        )


def top1(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Top-1 accuracy of logits (n, classes) for labels (n,)."""
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

    The second term is a log-normal prior about 1. A few validation images are often all classified correctly; without the
    prior T would then fall to its lower bound.

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
    nearest = int(np.argmin([loss(log_temperature) for log_temperature in grid]))
    bounds = grid[max(0, nearest - 1)], grid[min(GRID - 1, nearest + 1)]
    return math.exp(optimize.minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x)


def wilson_interval(correct: int, total: int, level: float = LEVEL) -> Interval:
    """The proportion `correct / total` with Wilson's score interval, for a single run.

    The bounds solve  |correct / total - p| = z sqrt(p (1 - p) / total).  [Wilson 1927]

    Raises: ValueError unless 0 <= correct <= total and total >= 1.
    """
    if not 0 <= correct <= total or not total:
        raise ValueError(f"correct must be in [0, total] and total at least 1, got {correct} of {total}.")
    interval = stats.binomtest(correct, total).proportion_ci(level, method="wilson")
    return Interval(correct / total, float(interval.low), float(interval.high))


def interval_over_seeds(values: Sequence[float], level: float = LEVEL) -> Interval:
    """The mean over runs with different seeds, with Student's interval:  mean -+ t(n - 1) s / sqrt(n).

    Raises: ValueError for fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"An interval over seeds needs at least two runs, got {len(values)}. Run more seeds.")
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    half_width = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * error
    return Interval(mean, mean - half_width, mean + half_width)


def harmonic_mean(base: float, new: float) -> float:
    """2 base new / (base + new), of the accuracies on trained and on held-out classes.  [Zhou et al. 2022, CoCoOp, 4.1]"""
    return statistics.harmonic_mean([base, new])
