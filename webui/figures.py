"""Key figures of runs for lists and comparisons, read from their files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

from pipelines.fewshot.metric_values import Interval
from pipelines.methods import DEFAULT
from training.runs.fewshot_files import FewShotReport, MethodSummary
from training.runs.run_files import Suggestion
from webui.classifiers import method_name
from webui.curves import Point
from webui.runs import RunView

# The displayed training loss is the mean over this many steps.
LAST_STEPS = 16
SCORES = {"subject_score": "Similarity to your photos", "prompt_score": "Prompt adherence"}


def figures(view: RunView) -> list[tuple[str, str]]:
    """The key figures of a run as pairs of name and value; escape them before they go into HTML."""
    rows = _of_classifier(view) if view.task == "classify" else _of_subject(view)
    return [(name, value) for name, value in rows if value]


def method_of(view: RunView) -> str:
    """The display name of the adapter method, or of all methods of a few-shot run."""
    if view.task == "subject":
        return method_name(view.chosen("adapter", "method") or DEFAULT)
    methods = view.chosen("method", "method")
    return ", ".join(map(method_name, methods)) if isinstance(methods, list) else ""


def _of_subject(view: RunView) -> list[tuple[str, str]]:
    by_name = series(view)
    losses = [value for _, value in by_name.get("loss", [])][-LAST_STEPS:]
    heldout = [value for step, value in by_name.get("heldout_loss", []) if step > 0]
    done, total = view.status.step, view.status.total
    return [
        ("Method", method_of(view)),
        ("Steps", f"{done} of {total}" if total else ""),
        ("Loss", f"{fmean(losses):.3f}" if losses else ""),
        ("Lowest validation loss", f"{min(heldout):.3f}" if heldout else ""),
        ("Recommended checkpoint", suggested_step(view)),
    ]


def _of_classifier(view: RunView) -> list[tuple[str, str]]:
    best = [(row.method, row.top1) for row in accuracies(view)]
    done, total = view.status.step, view.status.total
    started = [("Methods", method_of(view)), ("Trainings", f"{done} of {total}" if total else "")]
    return [(method_name(method), in_percent(top1)) for method, top1 in best] or started


def suggested_step(view: RunView) -> str:
    """The recommended step; empty before there is one."""
    suggestion = view.read_file(Suggestion)
    return "" if suggestion is None else str(suggestion.step)


def accuracies(view: RunView) -> Sequence[MethodSummary]:
    """The summary rows of a classifier's report, one per method and number of shots; empty before the report exists."""
    report = view.read_file(FewShotReport)
    return [] if report is None else report.summary


def in_percent(interval: Interval) -> str:
    """A proportion with its 95% confidence interval, in percent."""
    return f"{interval.value:.0%} ({max(0.0, interval.low):.0%} to {min(1.0, interval.high):.0%})"


def series(view: RunView) -> dict[str, list[Point]]:
    """All logged metrics by name, as (step, value) in order. If a step was logged twice, the last value counts."""
    by_name: dict[str, dict[float, float]] = defaultdict(dict)
    for logged in view.metrics:
        for name, value in logged.values.items():
            by_name[name][logged.step] = value
    return {name: sorted(points.items()) for name, points in by_name.items()}
