"""Which cells of an arena can run now, from the results of those that have ended."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from pipelines.errors import InputError
from pipelines.run_options import Task
from training.comparison.cells import Cell
from training.comparison.measures import seconds_per_step, validation_score
from training.comparison.rates import choose_rate
from training.comparison.tasks import ArenaTask
from training.comparison.variants import MethodVariant
from training.options.arena import ArenaMethodOptions
from training.runs.arena_files import CellRecord


@dataclass
class Schedule:
    """The cells of an arena. Nothing is stored beside the records of the cells: an arena that was stopped goes on from them.

    Args:
        arena: the directory.
        tasks: with their data.
        variants: of the methods.
        options: the budget and the sweep.
        seeds: of the splits.
        retry_failed: whether cells that failed before this process are run again.
        refused: why the recipe does not take the options of a variant, by task and label.
    """

    arena: Path
    tasks: Sequence[ArenaTask]
    variants: Sequence[MethodVariant]
    options: ArenaMethodOptions
    seeds: Sequence[int]
    retry_failed: bool = False
    refused: dict[tuple[Task, str], str] = field(default_factory=dict)
    _ended: dict[Cell, CellRecord] = field(default_factory=dict)
    _retried: set[Cell] = field(default_factory=set)

    def __post_init__(self) -> None:
        for task, variant in self._all_pairs():
            try:
                task.default_rate(variant)
            except InputError as error:
                self.refused[task.task, variant.label] = str(error)

    def _all_pairs(self) -> Iterator[tuple[ArenaTask, MethodVariant]]:
        for task in self.tasks:
            yield from ((task, variant) for variant in self.variants if variant.runs_on(task.task))

    def pairs(self) -> Iterator[tuple[ArenaTask, MethodVariant]]:
        """Every variant on every task that it is a method of, unless it is refused."""
        return (pair for pair in self._all_pairs() if (pair[0].task, pair[1].label) not in self.refused)

    def pending(self) -> list[Cell]:
        """The cells that can run now, those of one variant after those of another."""
        cells = (
            cell for task, variant in self.pairs() for dataset in task.datasets for cell in self._needed(task, variant, dataset)
        )
        return [cell for cell in dict.fromkeys(cells) if self.ended(cell) is None]

    def progress(self) -> tuple[int, int]:
        """How many cells have ended, and how many there are; those whose learning rate is not chosen yet are estimated."""
        needed: set[Cell] = set()
        estimated = 0
        for task, variant in self.pairs():
            for dataset in task.datasets:
                cells = list(self._needed(task, variant, dataset))
                needed.update(cells)
                has_rates = any(cell.is_measured for cell in cells) or self._failures(task, variant, dataset)
                estimated += 0 if has_rates else task.measured_count
        return sum(self.ended(cell) is not None for cell in needed), max(len(needed) + estimated, 1)

    def ended(self, cell: Cell) -> CellRecord | None:
        """The record of a cell that has ended; None if it has not, or is to be run again."""
        if cell not in self._ended:
            record = cell.record(self.arena)
            if record is None or record.state == "running" or (record.state == "failed" and self._is_to_retry(cell)):
                return None
            self._ended[cell] = record
        return self._ended[cell]

    def _is_to_retry(self, cell: Cell) -> bool:
        return self.retry_failed and cell not in self._retried

    def new_record(self, cell: Cell) -> CellRecord:
        """The record with which a cell is started; the attempts of a failed one do not count."""
        record = cell.record(self.arena)
        self._retried.add(cell)
        return cell.new_record(self.arena) if record is None or record.state == "failed" else record

    def measured_cells(self, task: ArenaTask, variant: MethodVariant) -> list[Cell]:
        """The cells of the report that have ended well."""
        cells = (cell for dataset in task.datasets for cell in self._needed(task, variant, dataset) if cell.is_measured)
        return [cell for cell in cells if (record := self.ended(cell)) is not None and record.state == "done"]

    def failures(self, task: ArenaTask, variant: MethodVariant) -> list[str]:
        """Why a variant has no result on a dataset, or not all: the reasons, each once."""
        return list(dict.fromkeys(reason for dataset in task.datasets for reason in self._failures(task, variant, dataset)))

    def _failures(self, task: ArenaTask, variant: MethodVariant, dataset: str) -> list[str]:
        records = {cell: self.ended(cell) for cell in self._needed(task, variant, dataset)}
        measured = [cell for cell in records if cell.is_measured]
        # A learning rate whose training fails is a bad rate, unless all of them do.
        failed = [cell for cell in measured or records if records[cell] is not None and records[cell].state == "failed"]
        if None in records.values() and not measured:
            return []
        return [f"{cell.purpose} on {dataset}: {records[cell].reason}" for cell in failed]

    def rates(self, task: ArenaTask, variant: MethodVariant, dataset: str) -> list[float | None] | None:
        """The learning rate of each seed's split; None until all of them are chosen."""
        return None if self.steps(task, variant, dataset) is None else self._sweeps(task, variant, dataset)[0]

    def _needed(self, task: ArenaTask, variant: MethodVariant, dataset: str) -> Iterator[Cell]:
        """All cells of a variant that can be named now, those that have ended among them."""
        steps = self.steps(task, variant, dataset)
        if steps is None:
            yield task.pace_cell(variant, dataset)
            return
        rates, cells = self._sweeps(task, variant, dataset)
        yield from cells
        if rates is not None:
            yield from task.final_cells(variant, dataset, rates, steps)

    def _sweeps(self, task: ArenaTask, variant: MethodVariant, dataset: str) -> tuple[list[float | None] | None, list[Cell]]:
        """The learning rate of each seed's split, None until all of them are chosen, and the cells of the sweeps."""
        if variant.is_baseline or variant.fixed_rate is not None:
            return [variant.fixed_rate] * len(self.seeds), []
        swept = [self._sweep(task, variant, dataset, seed) for seed in self.seeds]
        rates = [rate for rate, _ in swept]
        return None if None in rates else rates, [cell for _, cells in swept for cell in cells]

    def _sweep(self, task: ArenaTask, variant: MethodVariant, dataset: str, seed: int) -> tuple[float | None, list[Cell]]:
        """The learning rate for a split, None if it is not known yet or every training failed, and the cells of the sweep."""
        default, cells = task.default_rate(variant), []
        steps = self.steps(task, variant, dataset)

        def score_at(rate: float) -> float | None:
            of_rate = task.sweep_cells(variant, dataset, seed, rate, steps)
            cells.extend(of_rate)
            return self._score(of_rate)

        rate, _ = choose_rate([default * factor for factor in self.options.learning_rate_factors], score_at)
        return rate, list(dict.fromkeys(cells))

    def _score(self, cells: Sequence[Cell]) -> float | None:
        """The mean validation score, infinite if a cell failed; None until all have ended."""
        records = [self.ended(cell) for cell in cells]
        if None in records:
            return None
        if any(record.state == "failed" for record in records):
            return math.inf
        return fmean(validation_score(cell.task, cell.folder(self.arena)) for cell in cells)

    def steps(self, task: ArenaTask, variant: MethodVariant, dataset: str) -> int | None:
        """Steps of each training; None until the pace of a budget of seconds is measured."""
        if self.options.max_train_steps is not None:
            return self.options.max_train_steps
        if variant.is_baseline:
            return 1
        cell = task.pace_cell(variant, dataset)
        record = self.ended(cell)
        if record is None or record.state == "failed":
            return None
        return max(1, round(self.options.max_train_seconds / seconds_per_step(cell.task, cell.folder(self.arena))))
