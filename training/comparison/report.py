"""The report of an arena as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pipelines.fewshot.layouts import counted
from pipelines.run_options import Task
from pipelines.tables import harmless, markdown_table, replace_parts
from pipelines.text_files import write_text_atomically
from training.runs.arena_files import MARKDOWN, OBSERVATIONS, ArenaReport
from training.runs.arena_results import (
    BASE_MODEL,
    MEASURES,
    PRIMARY,
    TASK_NAMES,
    TESTED,
    Measure,
    all_shots,
    base_model,
    by_dataset,
    comparisons_to_best,
    incomplete,
    mean_of,
    measure_named,
    measures_at,
    ranked,
)
from training.runs.naming import variant_title

# In the comments around the parts of a document.
COMMAND = "nora-vision arena"
CAPTIONS = ("Quality against trained parameters", "Accuracy by training images per class")


def write_report(report: ArenaReport, folder: Path, figures: Mapping[Task, Sequence[str]]) -> None:
    """Write arena.json, README.md and observations.csv into `folder`.

    Args:
        figures: names of the figures of each task, in `folder`.
    """
    report.write(folder)
    write_observations(report, folder / OBSERVATIONS)
    write_text_atomically(folder / MARKDOWN, markdown(report, figures))


def write_observations(report: ArenaReport, path: Path) -> None:
    """One row for each measure of each variant on each split."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["task", "dataset", "variant", "shots", "seed", "measure", "value", "run"])
        for one in report.observations:
            for name, value in one.values.items():
                row = [one.task, one.dataset, one.variant, one.shots, one.seed, name, value, one.cell]
                writer.writerow([harmless(cell) if isinstance(cell, str) else cell for cell in row])


def markdown(report: ArenaReport, figures: Mapping[Task, Sequence[str]]) -> str:
    """The report for people."""
    budget = f"{report.max_train_steps} steps" if report.max_train_steps else f"{report.max_train_seconds:g} seconds"
    lines = ["# Arena", "", f"Every method was trained for {budget}, with a learning rate chosen on validation data."]
    for task in tasks_of(report):
        lines += ["", f"## {TASK_NAMES[task].capitalize()}", "", section(report, task, figures.get(task, ()))]
    if report.failed:
        lines += ["", "## Without a result", "", *(f"- {name}: {reason}" for name, reason in report.failed.items())]
    return "\n".join(lines) + "\n"


def tasks_of(report: ArenaReport) -> list[Task]:
    """The tasks with results."""
    return [task for task in MEASURES if any(summary.task == task for summary in report.summaries)]


def write_document(report: ArenaReport, document: Path, folder: Path, figures: Mapping[Task, Sequence[str]]) -> None:
    """Replace the parts of `document` that an arena writes, one for each task, and copy their figures beside it.

    Args:
        folder: of the figures.
        figures: their names by task.
    Raises: ValueError naming the comments that are missing in the document.
    """
    beside = document.with_suffix("")
    beside.mkdir(exist_ok=True)
    parts = {}
    for task in tasks_of(report):
        for name in figures[task]:
            shutil.copy(folder / name, beside / name)
        parts[task] = section(report, task, [f"{beside.name}/{name}" for name in figures[task]])
    replace_parts(document, parts, COMMAND)


def section(report: ArenaReport, task: Task, figures: Sequence[str]) -> str:
    """The verdict, tables and figures of a task."""
    return "\n".join(line.rstrip("\n") for line in _section(report, task, figures)) + "\n"


def _section(report: ArenaReport, task: Task, figures: Sequence[str]) -> Iterator[str]:
    yield " ".join(report.verdict.get(task, ("There are no two methods to compare.",)))
    shots = all_shots(report.summaries, task) or [None]
    for number in shots:
        yield ""
        yield from _means(report, task, number)
        if sentences := incomplete(report.summaries, task, number):
            yield ""
            yield " ".join(sentences)
        yield ""
        yield from _by_dataset(report, task, number)
    yield ""
    yield from _tests(report, task, shots[-1])
    for figure in figures:
        yield ""
        yield f"![{CAPTIONS['shots' in figure]}]({figure})"
    yield ""
    yield "Measures: " + "; ".join(f"{m.title}: {m.explanation}" for m in MEASURES[task]) + "."


def _means(report: ArenaReport, task: Task, shots: int | None) -> Iterator[str]:
    """Every measure of every variant, the mean over all datasets and seeds; the best variant first."""
    measures = measures_at(report.summaries, task, shots)
    if shots is not None:
        yield f"{counted(shots, 'shot')}:"
        yield ""
    order = [summary.variant for summary in ranked(report.summaries, task, shots, PRIMARY[task])]
    rows = [[variant_title(variant), *(_mean(report, task, shots, one, variant) for one in measures)] for variant in order]
    if before := base_model(report, task):
        rows.append([BASE_MODEL, *(one.with_interval(before[None]) if one.name == PRIMARY[task] else "" for one in measures)])
    yield markdown_table(["method", *(measure.title for measure in measures)], rows)


def _mean(report: ArenaReport, task: Task, shots: int | None, measure: Measure, variant: str) -> str:
    summary = mean_of(report.summaries, task, shots, measure.name, variant)
    if summary is None:
        return ""
    is_tested = measure.name in TESTED[task]
    return measure.with_interval(summary.interval) if is_tested else measure.text(summary.interval.value)


def _by_dataset(report: ArenaReport, task: Task, shots: int | None) -> Iterator[str]:
    """The primary measure on each dataset."""
    measure, values = measure_named(task, PRIMARY[task]), by_dataset(report.summaries, task, shots)
    texts = [{variant: measure.with_interval(one) for variant, one in of_dataset.items()} for of_dataset in values.values()]
    order = [one.variant for one in ranked(report.summaries, task, shots, measure.name)]
    rows = [[variant_title(variant), *(of_dataset.get(variant, "") for of_dataset in texts)] for variant in order]
    if before := base_model(report, task):
        rows.append([BASE_MODEL, *(measure.with_interval(before[dataset]) if dataset in before else "" for dataset in values)])
    at = "" if shots is None else f" at {counted(shots, 'shot')}"
    yield f"{measure.title.capitalize()}{at} on each dataset, with the interval over its seeds:"
    yield ""
    yield markdown_table(["method", *values], rows)


def _tests(report: ArenaReport, task: Task, shots: int | None) -> Iterator[str]:
    """The paired tests of every variant against the best one, by the primary measure."""
    measure = measure_named(task, PRIMARY[task])
    best = variant_title(ranked(report.summaries, task, shots, measure.name)[0].variant)
    yield f"Paired differences to {best} (Wilcoxon's signed-rank test, adjusted for their number by Holm's method):"
    yield ""
    rows = [
        [variant_title(one.variant), measure.with_interval(one.difference), str(one.count), f"{one.adjusted_p:.3g}"]
        for one in comparisons_to_best(report, task, shots)
    ]
    yield markdown_table(["method", "difference", "splits", "adjusted p"], rows)
