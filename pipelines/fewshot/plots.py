"""Figures of a few-shot report, rendered without a display and without pyplot's global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pipelines.fewshot.metric_values import Interval, Reliability

# With more classes than this, counts or class names are left out.
MOST_NUMBERED, MOST_NAMED, LONGEST_NAME = 20, 60, 24
DOTS_PER_INCH = 120
# Ratio of the x positions of two methods at the same number of shots.
X_OFFSET = 1.05


def confusion_figure(confusion: Sequence[Sequence[int]], classes: Sequence[str], title: str = "") -> Figure:
    """A confusion matrix, coloured by the share of each true class.

    Args:
        confusion: (classes, classes) counts; rows are true classes, columns predicted ones.
    """
    counts = np.asarray(confusion)
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    side = min(12.0, 3.5 + 0.35 * len(classes))
    figure, axes = _figure(side + 1, side, title)
    heatmap = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(heatmap, ax=axes, label="share of the true class", fraction=0.046)
    axes.set(xlabel="predicted", ylabel="true")
    if len(classes) <= MOST_NUMBERED:
        for (row, column), count in np.ndenumerate(counts):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=8)
    if len(classes) <= MOST_NAMED:
        names = list(map(_shortened, classes))
        # A class name such as "$x$" must not be rendered as a formula.
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8, parse_math=False)
        axes.set_yticks(range(len(names)), names, fontsize=8, parse_math=False)
    return figure


def reliability_figure(curves: Mapping[str, Reliability], title: str = "") -> Figure:
    """Accuracy by confidence, one curve per classifier, above a histogram of the confidences.

    Args:
        curves: by label, such as "uncalibrated" and "calibrated".
    """
    figure, axes = _figure(5, 4.6, title)
    axes.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1)
    histogram = axes.twinx()
    for name, bins in curves.items():
        filled = np.asarray(bins.counts) > 0
        confidence, accuracy, counts = (np.asarray(values)[filled] for values in (bins.confidence, bins.accuracy, bins.counts))
        error = bins.expected_calibration_error
        (line,) = axes.plot(confidence, accuracy, marker="o", label=f"{name}, ECE {error:.3f}")
        width = 0.8 / len(bins.counts)
        histogram.bar(confidence, counts / counts.sum(), width=width, color=line.get_color(), alpha=0.2)
    # The histogram takes the lowest quarter of the figure.
    histogram.set(ylim=(0, 4), yticks=[])
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
    _plain_legend(axes, "upper left")
    return figure


def per_class_figure(accuracies: Mapping[str, Mapping[str, float | None]], title: str = "") -> Figure:
    """The accuracy by class of several classifiers, one row of dots per class, sorted by the last classifier.

    Args:
        accuracies: by classifier, such as "zero-shot" and "adapted", then by class; classes with None (no images) are left out.
    """
    last = list(accuracies.values())[-1]
    classes = sorted((name for name, accuracy in last.items() if accuracy is not None), key=last.__getitem__)
    figure, axes = _figure(6, min(14.0, 1.6 + 0.22 * len(classes)), title)
    for name, accuracy in accuracies.items():
        axes.plot([accuracy[one] for one in classes], range(len(classes)), marker="o", markersize=4, linestyle="", label=name)
    if len(classes) <= MOST_NAMED:
        axes.set_yticks(range(len(classes)), list(map(_shortened, classes)), fontsize=8, parse_math=False)
    axes.set(xlabel="accuracy", xlim=(-0.02, 1.02))
    axes.grid(axis="y", linewidth=0.3)
    _plain_legend(axes, "best")
    return figure


def comparison_figure(curves: Mapping[str, Mapping[int, Interval]], title: str = "") -> Figure:
    """The accuracy of several methods by number of shots, with confidence intervals.

    Args:
        curves: by method, then by number of shots.
    """
    figure, axes = _figure(6, 4.4, title)
    shots = sorted({count for curve in curves.values() for count in curve})
    for order, (name, curve) in enumerate(curves.items()):
        intervals = [curve[count] for count in sorted(curve)]
        # Side by side, since intervals at the same position would hide each other.
        positions = [count * X_OFFSET ** (order - (len(curves) - 1) / 2) for count in sorted(curve)]
        ends = [[one.value - one.low for one in intervals], [one.high - one.value for one in intervals]]
        axes.errorbar(positions, [one.value for one in intervals], yerr=ends, marker="o", markersize=4, capsize=3, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(shots, list(map(str, shots)))
    axes.set(xlabel="training images per class", ylabel="accuracy")
    _plain_legend(axes, "best")
    return figure


def _shortened(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def _plain_legend(axes: Axes, location: str) -> None:
    """Add a legend whose labels are not rendered as formulas."""
    for text in axes.legend(loc=location, fontsize=8).get_texts():
        text.set_parse_math(False)


def _figure(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    figure = Figure((width, height), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10, parse_math=False)
    return figure, axes


def save_figure(figure: Figure, path: Path) -> None:
    """Write `figure` as PNG; the same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": None})
