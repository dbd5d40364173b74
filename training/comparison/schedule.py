"""Which cells of an arena can run now, from the results of those that have ended."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

from pipelines.errors import InputError
from pipelines.run_options import Task
from training.comparison.cells import Cell
from training.comparison.rates import choose_rate
from training.comparison.results import CellResults
from training.comparison.tasks import ArenaTask
from training.comparison.variants import MethodVariant
from training.options.arena import ArenaMethodOptions
from training.runs.arena_files import Observation


@dataclass
class Schedule:
    """The cells of an arena. Nothing is stored beside their results: an arena that was stopped goes on from them.

    Args:
        results: of the cells that have ended.
        tasks: with their data.
        variants: of the methods.
        options: the budget and the sweep.
        seeds: of the splits.
        refused: why the recipe does not take the options of a variant, by task and label.
    """

    results: CellResults
    tasks: Sequence[ArenaTask]
    variants: Sequence[MethodVariant]
    options: ArenaMethodOptions
    seeds: Sequence[int]
    refused: dict[tuple[Task, str], str] = field(default_factory=dict)

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
        return [cell for cell in dict.fromkeys(self._cells()) if self.results.of(cell) is None]

    def _cells(self) -> Iterator[Cell]:
        for task, variant in self.pairs():
            for dataset in task.datasets:
                yield from self._needed(task, variant, dataset)

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
        return sum(self.results.of(cell) is not None for cell in needed), max(len(needed) + estimated, 1)

    def observations(self) -> list[Observation]:
        """What all cells that have ended have measured."""
        results = {cell: self.results.of(cell) for cell in self._cells() if cell.is_measured}
        # A result of another arena may have other names for the same data and options.
        return [
            replace(one, dataset=cell.dataset, variant=cell.variant)
            for cell, result in results.items()
            if result is not None
            for one in result.observations
        ]

    def failures(self, task: ArenaTask, variant: MethodVariant) -> list[str]:
        """Why a variant has no result on a dataset, or not all: the reasons, each once."""
        return list(dict.fromkeys(reason for dataset in task.datasets for reason in self._failures(task, variant, dataset)))

    def _failures(self, task: ArenaTask, variant: MethodVariant, dataset: str) -> list[str]:
        results = {cell: self.results.of(cell) for cell in self._needed(task, variant, dataset)}
        measured = [cell for cell in results if cell.is_measured]
        # A learning rate whose training fails is a bad rate, unless all of them do.
        failed = [cell for cell in measured or results if results[cell] is not None and results[cell].state == "failed"]
        if None in results.values() and not measured:
            return []
        return [f"{cell.purpose} on {dataset}: {results[cell].reason}" for cell in failed]

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
        results = [self.results.of(cell) for cell in cells]
        if None in results:
            return None
        return math.inf if any(result.state == "failed" for result in results) else fmean(result.score for result in results)

    def steps(self, task: ArenaTask, variant: MethodVariant, dataset: str) -> int | None:
        """Steps of each training; None until the pace of a budget of seconds is measured."""
        if self.options.max_train_steps is not None:
            return self.options.max_train_steps
        if variant.is_baseline:
            return 1
        result = self.results.of(task.pace_cell(variant, dataset))
        if result is None or result.state == "failed":
            return None
        return max(1, round(self.options.max_train_seconds / result.seconds_per_step))
