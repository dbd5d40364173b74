"""The figures of a few-shot run's model card, made from its report."""

from __future__ import annotations

from matplotlib.figure import Figure

from pipelines.fewshot.classifier import ZERO_SHOT
from pipelines.fewshot.metric_values import Interval
from pipelines.fewshot.plots import comparison_figure, confusion_figure, per_class_figure, reliability_figure
from training.options.fewshot import ALL
from training.runs.fewshot_files import FewShotReport


def shots_text(shots: int | str) -> str:
    """Such as "16 shots"."""
    if shots == ALL:
        return "all images"
    return "1 shot" if shots == 1 else f"{shots} shots"


def card_figures(report: FewShotReport) -> dict[str, Figure]:
    """The figures by name.

    `confusion` and `reliability` show the trial that represents the run, `per_class` compares it with zero-shot on the same
    split if that was run, and `comparison` shows all methods by number of shots if there are several.
    """
    trial = report.representative
    title = f"{trial.method}, {shots_text(trial.shots)}, seed {trial.seed}"
    curves = {
        "uncalibrated": trial.test.reliability,
        f"calibrated (temperature {trial.temperature:.2f})": trial.calibrated.reliability,
    }
    figures = {
        "confusion": confusion_figure(trial.test.confusion, report.dataset.classes, title),
        "reliability": reliability_figure(curves, title),
    }
    zero_shot = report.on_same_split(trial, ZERO_SHOT)
    if zero_shot is not None and zero_shot is not trial:
        accuracies = {ZERO_SHOT: zero_shot.test.per_class, trial.method: trial.test.per_class}
        figures["per_class"] = per_class_figure(accuracies, title)
    if by_shots := _by_shots(report):
        figures["comparison"] = comparison_figure(by_shots, "95% intervals")
    return figures


def _by_shots(report: FewShotReport) -> dict[str, dict[int, Interval]]:
    """Accuracy by method and number of shots; empty unless there are several numbers."""
    numbers = [shots for shots in report.shots if shots != ALL]
    if len(numbers) < 2:
        return {}
    curves: dict[str, dict[int, Interval]] = {method: {} for method in report.methods}
    for row in report.summary:
        if row.shots in numbers:
            curves[row.method][row.shots] = row.top1
    return curves
