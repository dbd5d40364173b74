"""Compare adapter methods on your subjects and labelled datasets: equal budgets, swept learning rates, seeds and paired tests.

    python -m training.arena --subjects_dir SUBJECTS --methods lora nora dora
    python -m training.arena --datasets CLASSES digits --methods all --max_train_steps 160

Each training is an ordinary run of a recipe in the arena's directory. An arena that was stopped goes on with the same command.
"""

from __future__ import annotations

# First: it filters the warnings of libraries that are imported later.
import pipelines  # noqa: F401

# isort: split
from training.engine.console import configure_logging
from training.engine.stopping import exit_codes
from training.options.arena import ArenaOptions, parse_arena_options

if __name__ == "__main__":
    # Before the slow imports below, so that --help and errors in flags appear at once.
    with configure_logging(), exit_codes():
        given_options = parse_arena_options(description=__doc__)

# isort: split
import logging
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from pipelines.errors import InputError
from pipelines.methods import REFERENCE
from pipelines.output_paths import check_output_file, check_output_folder
from pipelines.run_file import ResolvedOptions
from pipelines.run_options import Task
from training.comparison.analysis import (
    base_model_summaries,
    comparisons_of,
    merged,
    summaries_of,
    with_seconds_to_quality,
)
from training.comparison.blind import write_sheets
from training.comparison.figures import write_figures
from training.comparison.report import write_document, write_report
from training.comparison.results import CellResults, result_of
from training.comparison.schedule import Schedule
from training.comparison.tasks import ArenaTask, FewShotArena, SubjectArena, check_flags
from training.comparison.variants import variants_of
from training.comparison.verdict import verdict_of
from training.comparison.workers import Workers, workers_of
from training.runs.arena_files import MARKDOWN, ArenaReport, CellResult
from training.runs.run import RunDirectory
from training.runs.run_files import FITTING, REPORTING

LOCK = ".lock"
# How often the report is written while cells run, in seconds.
REPORT_SECONDS = 600.0
logger = logging.getLogger("training.arena")


def main(options: ArenaOptions) -> RunDirectory | None:
    """Run all cells that are not finished and write the report; returns the arena's directory.

    Under `accelerate launch`, the first process does it, with as many workers as processes were asked for; None on the others.

    Raises: InputError for options that cannot be used, before anything is trained.
    """
    if int(os.environ.get("RANK", "0")):
        return None
    schedule = schedule_of(options)
    run = RunDirectory(Path(options.output.output_dir).resolve())
    with locked(run.path), run.recording():
        ResolvedOptions(options.to_dict()).write(run.path)
        # Another arena in this directory may have ended since they were read.
        schedule.results.read()
        schedule.results.write()
        if not options.output.report_only:
            with workers_of(options.output) as workers:
                run_cells(run, schedule, workers, options)
        run.update_status(phase=REPORTING)
        report = report_of(schedule, options)
        figures = write(report, run.path)
        if options.output.write is not None:
            write_document(report, Path(options.output.write), run.path, figures)
        for task, sentences in report.verdict.items():
            logger.info(f"{task}: {' '.join(sentences)}")
        logger.info(f"Report: {run.path / MARKDOWN}.")
    return run


def schedule_of(options: ArenaOptions) -> Schedule:
    """The schedule of the cells.

    Raises: InputError for options or data that cannot be used.
    """
    check_output_folder(options.output.output_dir, "--output_dir")
    if options.output.write is not None:
        check_output_file(options.output.write, "--write", (".md",))
    check_flags(options)
    tasks: list[ArenaTask] = [task for task in (SubjectArena.create(options), FewShotArena.create(options)) if task is not None]
    variants = variants_of(options.method.methods)
    results = CellResults(
        Path(options.output.output_dir).resolve(), list(map(Path, options.output.results)), options.output.retry_failed
    )
    return Schedule(results, tasks, variants, options.method, options.data.seeds)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A context in which no other arena uses `folder`.

    Raises: InputError if one does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        acquired = FileLock(folder / LOCK, timeout=0).acquire()
    except Timeout as error:
        raise InputError(f"Another arena is at work in {str(folder)!r}. Wait for it, or give another --output_dir.") from error
    with acquired:
        yield


def run_cells(run: RunDirectory, schedule: Schedule, workers: Workers, options: ArenaOptions) -> None:
    """Run cells until none is left, as many at once as there are workers."""
    running: dict = {}
    began = reported = time.monotonic()
    ended_before, _ = schedule.progress()
    while True:
        waiting = [cell for cell in schedule.pending() if cell not in running.values()]
        for cell in waiting[: workers.count - len(running)]:
            running[workers.submit(cell.folder(run.path), cell.record_to_start(run.path))] = cell
        ended, planned = schedule.progress()
        pace = (time.monotonic() - began) / (ended - ended_before) if ended > ended_before else None
        left = None if pace is None else pace * (planned - ended)
        run.update_status(phase=FITTING, step=ended, total=planned, share=ended / planned, seconds_left=left)
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            cell = running.pop(future)
            result = result_of(cell, future.result(), run.path)
            schedule.results.add(result)
            log_end(result, ended + 1, planned)
        if time.monotonic() - reported > REPORT_SECONDS:
            write(report_of(schedule, options), run.path)
            reported = time.monotonic()


def log_end(result: CellResult, ended: int, planned: int) -> None:
    """Log how a cell has ended."""
    rate = "" if result.learning_rate is None else f", rate {result.learning_rate:.3g}"
    seed = "" if result.seed is None else f", seed {result.seed}"
    name = f"{result.variant} on {result.dataset}, {result.purpose}{rate}{seed}"
    if result.state == "failed":
        logger.warning(f"{ended}/{planned}: {name}: {result.reason}")
    else:
        logger.info(f"{ended}/{planned}: {name}: {result.state}")


def report_of(schedule: Schedule, options: ArenaOptions) -> ArenaReport:
    """The report of all cells that have ended."""
    observations = merged(schedule.observations())
    labels = [variant.label for variant in schedule.variants]
    observations = with_seconds_to_quality(observations, REFERENCE if REFERENCE in labels else labels[0])
    summaries = summaries_of(observations)
    report = ArenaReport(
        variants=labels,
        max_train_steps=options.method.max_train_steps,
        max_train_seconds=options.method.max_train_seconds,
        observations=observations,
        summaries=summaries,
        comparisons=comparisons_of(observations, summaries),
        rates=chosen_rates(schedule),
        failed=failures(schedule),
        base_model=base_model_summaries(observations, [one.label for one in schedule.variants if one.starts_at_base]),
    )
    verdicts = {task.task: verdict_of(report, task.task) for task in schedule.tasks}
    return replace(report, verdict={task: sentences for task, sentences in verdicts.items() if sentences})


def failures(schedule: Schedule) -> dict[str, str]:
    """Why variants have no result, or not all, by "task/variant"."""
    refused = {f"{task}/{label}": reason for (task, label), reason in schedule.refused.items()}
    reasons = {f"{task.task}/{variant.label}": schedule.failures(task, variant) for task, variant in schedule.pairs()}
    return refused | {name: "; ".join(given) for name, given in reasons.items() if given}


def chosen_rates(schedule: Schedule) -> dict[str, dict[str, Sequence[float]]]:
    """The learning rates that were chosen, by "task/dataset" and variant."""
    rates: dict[str, dict[str, Sequence[float]]] = {}
    for task, variant in schedule.pairs():
        for dataset in task.datasets:
            chosen = schedule.rates(task, variant, dataset)
            if chosen is not None and None not in chosen:
                rates.setdefault(f"{task.task}/{dataset}", {})[variant.label] = chosen
    return rates


def write(report: ArenaReport, folder: Path) -> dict[Task, list[str]]:
    """Write the report, its figures and the blind sheets; returns the names of the figures."""
    figures = write_figures(report, folder)
    write_report(report, folder, figures)
    write_sheets(report.observations, folder)
    return figures


if __name__ == "__main__":
    with configure_logging(), exit_codes():
        main(given_options)
