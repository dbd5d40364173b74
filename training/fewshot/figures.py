"""The figures of a few-shot run's card, from its report alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from pipelines.fewshot.classifier import ZERO_SHOT
from pipelines.fewshot.metrics import Interval, Reliability
from pipelines.fewshot.plots import comparison_figure, confusion_figure, per_class_figure, reliability_figure
from training.options.fewshot import ALL

Report = Mapping[str, Any]


def loaded_member(report: Report) -> dict[str, Any]:
    """The member that loading the run gives."""
    return next(member for member in report["members"] if member["folder"] == report["classifier"])


def shots_in_words(shots: int | str) -> str:
    """Such as "16 shots"."""
    if shots == ALL:
        return "all images"
    return "1 shot" if shots == 1 else f"{shots} shots"


def card_figures(report: Report) -> dict[str, Figure]:
    """The figures by name.

    `confusion` and `reliability` are of the classifier that is loaded; `per_class` has zero-shot beside it, where that was run;
    `comparison` has all methods by shots, where there are several numbers of them.
    """
    own = loaded_member(report)
    title = f"{own['method']}, {shots_in_words(own['shots'])}, seed {own['seed']}"
    curves = {
        "as trained": Reliability(**own["test"]["reliability"]),
        f"with the temperature {own['temperature']:.2f}": Reliability(**own["calibrated"]["reliability"]),
    }
    found = {
        "confusion": confusion_figure(own["test"]["confusion"], report["set"]["classes"], title),
        "reliability": reliability_figure(curves, title),
    }
    if base := _zero_shot_beside(report, own):
        accuracies = {ZERO_SHOT: base["test"]["per_class"], own["method"]: own["test"]["per_class"]}
        found["per_class"] = per_class_figure(accuracies, title)
    if by_shots := _by_shots(report):
        found["comparison"] = comparison_figure(by_shots, "95% intervals")
    return found


def _zero_shot_beside(report: Report, own: Mapping[str, Any]) -> dict[str, Any] | None:
    """Zero-shot on the draw of `own`, another method's."""
    wanted = (ZERO_SHOT, own["shots"], own["seed"])
    others = (member for member in report["members"] if member is not own)
    return next((member for member in others if (member["method"], member["shots"], member["seed"]) == wanted), None)


def _by_shots(report: Report) -> dict[str, dict[int, Interval]]:
    """Accuracy by method, then by shots; nothing where they are not several."""
    numbers = [shots for shots in report["shots"] if shots != ALL]
    if len(numbers) < 2:
        return {}
    curves: dict[str, dict[int, Interval]] = {method: {} for method in report["methods"]}
    for row in report["summary"]:
        if row["shots"] in numbers:
            curves[row["method"]][row["shots"]] = Interval(**row["top1"])
    return curves
