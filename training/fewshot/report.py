"""The report of a few-shot run: every member, and the methods side by side with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from pipelines.fewshot.metrics import Interval, interval_over_seeds
from pipelines.fewshot.shots import Shots
from pipelines.methods import DEFAULT
from training.fewshot.experiment import Experiment, keys
from training.fewshot.trials import Trial
from training.options.fewshot import ALL, FewShotOptions

RESULT = "result.json"
FORMAT = 1
AVERAGED = ("trained_numbers", "stored_bytes", "seconds", "peak_memory")


def members_of(options: FewShotOptions) -> list[Trial]:
    """All that a run fits, draw by draw."""
    return [Trial(*key, method) for key in keys(options.data) for method in options.method.method]


def shown_member(options: FewShotOptions) -> Trial:
    """The one that stands for the run, of most shots and the first seed: the default method's, else the first adapter's, else the
    last method's.
    """
    adapters, methods = options.method.adapters(), options.method.method
    method = DEFAULT if DEFAULT in adapters else (adapters or methods[-1:])[0]
    shots = max(options.data.all_shots(), key=lambda own: float("inf") if own == ALL else own)
    return Trial(shots, options.data.seeds[0], method)


def seconds_left(results: Sequence[dict[str, Any]], members: Sequence[Trial]) -> float | None:
    """How long fitting `members` will take, by what the same methods took; None while one of them has not been fitted yet.

    Args:
        results: of those that are fitted.
    """
    took: dict[tuple[str, Shots], list[float]] = {}
    for one in results:
        took.setdefault((one["method"], one["shots"]), []).append(one["seconds"])
    known = [took.get((member.method, member.shots)) for member in members]
    return round(sum(map(fmean, known)), 1) if all(known) else None


def report_of(
    study: Experiment, options: FewShotOptions, copies: Sequence[str], results: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The report, as plain values.

    Args:
        copies: what was found of images that were there more than once.
        results: of all members.
    """
    new = study.new_prompts
    return {
        "format": FORMAT,
        "set": {
            "name": study.labelled.name,
            "classes": list(study.prompts.classes),
            "new_classes": [] if new is None else list(new.classes),
            "pictures": len(study.labelled.images),
            "copies": list(copies),
            "notes": list(study.labelled.notes),
        },
        "model": options.model.model,
        "pretrained": options.model.pretrained,
        "templates": list(study.prompts.templates),
        "shots": options.data.all_shots(),
        "seeds": options.data.seeds,
        "methods": options.method.method,
        "members": list(results),
        "summary": [
            summary_of([one for one in results if (one["shots"], one["method"]) == (shots, method)])
            for shots in options.data.all_shots()
            for method in options.method.method
        ],
        "classifier": shown_member(options).folder.as_posix(),
    }


def summary_of(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One method at one number of shots, over its seeds."""
    first, tests = results[0], [one["test"] for one in results]
    return {
        "shots": first["shots"],
        "method": first["method"],
        "runs": len(results),
        "top1": over_seeds([test["top1"] for test in tests]),
        "calibration_error": fmean(test["calibration_error"] for test in tests),
        "calibrated_calibration_error": fmean(one["calibrated"]["calibration_error"] for one in results),
        **{name: fmean(one[name] for one in results) for name in AVERAGED},
        **_of_new_classes([one for one in results if one["new_classes"] is not None]),
    }


def _of_new_classes(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What is told of classes that were not learned; None where there were none."""
    if not results:
        return {"new_classes": None, "harmonic_mean": None}
    return {
        "new_classes": over_seeds([one["new_classes"]["top1"] for one in results]),
        "harmonic_mean": fmean(one["new_classes"]["harmonic_mean"] for one in results),
    }


def over_seeds(found: Sequence[dict[str, float]]) -> dict[str, float]:
    """Student's interval over runs; of one run alone its own."""
    return dict(found[0]) if len(found) == 1 else asdict(interval_over_seeds([one["value"] for one in found]))


def table(report: dict[str, Any]) -> str:
    """The methods side by side, for a terminal."""
    lines = [
        f"{'shots':>5}  {'method':<14}{'top-1, 95% interval':>24}{'ECE':>8}{'calibrated':>12}{'trained':>10}{'bytes':>10}{'s':>8}"
    ]
    for row in report["summary"]:
        top1 = Interval(**row["top1"])
        lines.append(
            f"{row['shots']!s:>5}  {row['method']:<14}{top1.as_share():>24}{row['calibration_error']:>8.3f}"
            f"{row['calibrated_calibration_error']:>12.3f}{row['trained_numbers']:>10,.0f}{row['stored_bytes']:>10,.0f}"
            f"{row['seconds']:>8.1f}"
        )
    return "\n".join(lines)
