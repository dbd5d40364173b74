"""The files of an arena's directory: one for each cell, and the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

from pipelines.errors import InputError
from pipelines.fewshot.metric_values import Interval
from pipelines.run_file import RESTORE, RunFile, fields_of
from pipelines.run_options import Task

CELLS = "cells"
# One line for each cell that has ended.
RESULTS = "results.jsonl"
# The report for people, and the values that it is made of.
MARKDOWN, OBSERVATIONS = "README.md", "observations.csv"
# The folder of sheets that are judged without knowing the methods; the methods of the letters, and the ratings.
BLIND, KEY, RATINGS = "blind", "key.json", "ratings.csv"
Purpose = Literal["pace", "sweep", "final", "base-to-new"]
State = Literal["running", "done", "failed"]


@dataclass(frozen=True)
class CellDescription:
    """What a cell, one run of a recipe, is for.

    Args:
        dataset: the subject's name, or the labelled dataset's.
        variant: the label of the method.
        purpose: "pace" measures the seconds of a step, "sweep" chooses a learning rate, "final" is measured, and so is
            "base-to-new", on classes that were not trained.
        learning_rate: None for a method without one.
        seed: None if the run has all seeds.
    """

    task: Task
    dataset: str
    variant: str
    purpose: Purpose
    learning_rate: float | None
    seed: int | None


@dataclass(frozen=True)
class CellRecord(CellDescription, RunFile):
    """How a cell was started and how it ended; the file is in the cell's run directory.

    Args:
        command: the words of the command.
        state: "running" until it has ended, then "done" or "failed".
        reason: why it failed.
        host, pid, pid_started: the computer and the process that ran the command last, and when it was started, as psutil says.
        attempts: how often the command was started.
    """

    NAME: ClassVar[str] = "cell.json"

    command: Sequence[str]
    state: State
    reason: str | None = None
    host: str | None = None
    pid: int | None = None
    pid_started: float | None = None
    attempts: int = 0


@dataclass(frozen=True)
class Observation:
    """The measures of one variant on one split.

    Args:
        dataset: a subject's name, or a labelled dataset's.
        shots: training images per class; None for a subject.
        values: by the name of the measure, see `training.runs.arena_results`; a measure that does not apply is missing.
        cell: the run directory, relative to the arena's.
        curve: seconds since the start of the training, and the quality then: the held-out loss, or the validation accuracy.
    """

    task: Task
    dataset: str
    variant: str
    shots: int | None
    seed: int
    values: Mapping[str, float]
    cell: str
    curve: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class CellResult(CellDescription):
    """How a cell ended and what it measured: a line of results.jsonl.

    Args:
        key: of the cell, a hash of everything that the result depends on.
        state: "done" or "failed".
        reason: why it failed.
        score: by which its learning rate is compared, lower is better; None unless its purpose is "sweep".
        seconds_per_step: None unless its purpose is "pace".
        observations: empty unless it is measured.
    """

    key: str
    state: State
    reason: str | None = None
    score: float | None = None
    seconds_per_step: float | None = None
    observations: Sequence[Observation] = ()

    @cached_property
    def line(self) -> str:
        """The line with its line break; floats have six significant digits."""
        return json.dumps(_rounded(asdict(self))) + "\n"

    @classmethod
    def from_line(cls, line: str, name: str = RESULTS) -> CellResult:
        """Read a line.

        Args:
            name: of the file in the error message.
        Raises: InputError if it is not a result.
        """
        try:
            values = fields_of(cls, json.loads(line), name)
            return cls(**values | {"observations": tuple(Observation(**one) for one in values.get("observations", ()))})
        except InputError:
            raise
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{name} has a line that cannot be read: {line.strip()[:80]!r} ({error}). {RESTORE}") from error


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {name: _rounded(one) for name, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class MeasureSummary:
    """The mean of a measure over all datasets and seeds, or over the seeds of one dataset.

    Args:
        dataset: None for the mean over all.
        interval: the mean, with the 95% interval of a bootstrap over datasets and seeds.
        count: the number of observations.
    """

    task: Task
    dataset: str | None
    variant: str
    shots: int | None
    measure: str
    interval: Interval
    count: int


@dataclass(frozen=True)
class PairedComparison:
    """A paired test of a variant against the best one on the splits that both were measured on.

    Args:
        best: the variant with the best mean of the measure.
        difference: the mean of `variant` minus `best`, with the 95% interval of a bootstrap over datasets and seeds.
        count: the number of splits.
        p: of Wilcoxon's signed-rank test, two-sided.
        adjusted_p: adjusted by Holm's method for all variants that are tested against the best one.
    """

    task: Task
    shots: int | None
    measure: str
    variant: str
    best: str
    difference: Interval
    count: int
    p: float
    adjusted_p: float


@dataclass(frozen=True)
class ArenaReport(RunFile):
    """The results of an arena.

    Args:
        variants: labels in the order in which they were given.
        max_train_steps: steps of each training; None with a budget of seconds.
        max_train_seconds: of each training; None with a budget of steps.
        rates: the learning rates that were chosen, by "task/dataset" and variant; a method without a rate has none.
        failed: the reason for each variant that failed, by "task/variant".
        base_model: the held-out loss of the base model on subjects.
        verdict: sentences for each task.
    """

    NAME: ClassVar[str] = "arena.json"
    FILE_VERSION: ClassVar[int] = 2

    variants: Sequence[str]
    max_train_steps: int | None
    max_train_seconds: float | None
    observations: Sequence[Observation] = ()
    summaries: Sequence[MeasureSummary] = ()
    comparisons: Sequence[PairedComparison] = ()
    rates: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
    verdict: Mapping[str, Sequence[str]] = field(default_factory=dict)
    base_model: Sequence[MeasureSummary] = ()

    @classmethod
    def upgrade(cls, values: dict[str, Any], version: int) -> dict[str, Any]:
        """Make the nested values objects. Comparisons of version 1 are left out: they are of all pairs, with other adjusted
        p-values. Any command of the arena writes them again.
        """

        def with_interval(content: Mapping[str, Any], name: str) -> dict[str, Any]:
            return {**content, name: Interval(**content[name])}

        comparisons = values.get("comparisons", ()) if version > 1 else ()
        return values | {
            "observations": tuple(Observation(**one) for one in values.get("observations", ())),
            **{
                name: tuple(MeasureSummary(**with_interval(one, "interval")) for one in values.get(name, ()))
                for name in ("summaries", "base_model")
            },
            "comparisons": tuple(PairedComparison(**with_interval(one, "difference")) for one in comparisons),
        }
