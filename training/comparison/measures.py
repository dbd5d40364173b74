"""How the measures of an arena are read from run directories."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipelines.errors import InputError
from pipelines.run_options import Task
from training.comparison.cells import Cell
from training.fewshot.trials import stored_bytes
from training.runs.arena_files import Observation
from training.runs.fewshot_files import FewShotReport, TrialResult
from training.runs.record import RunRecord
from training.runs.run_files import CALIBRATING, DryRunReport
from training.runs.subject_files import SubjectEvaluation
from training.subject.measured import measured_curve

MB = 1e6


def validation_score(task: Task, folder: Path) -> float:
    """The score by which a learning rate is chosen, lower is better: the validation loss relative to the base model's, or the
    share of validation images that are classified wrongly.

    Raises: InputError if the run in `folder` has no validation.
    """
    if task == "subject":
        losses = [point.heldout for point in measured_curve(RunRecord(folder))]
        if len(losses) < 2:
            raise InputError(f"{str(folder)!r} has no held-out losses. Delete the folder to run the cell again.")
        return losses[-1] / losses[0]
    results = _report(folder).trials
    return 1 - sum(result.validation.top1 for result in results) / len(results)


def seconds_per_step(task: Task, folder: Path) -> float:
    """The pace that a cell has measured."""
    if task == "subject":
        return DryRunReport.read(folder).seconds_per_step
    (result,) = _report(folder).trials
    return result.seconds / result.setting["steps"]


def observations_of(cell: Cell, arena: Path) -> Iterator[Observation]:
    """The measures of a cell that has ended well."""
    folder = cell.folder(arena)
    name = str(folder.relative_to(arena))
    if cell.task == "subject":
        curve = loss_curve(folder)
        values = _subject_values(folder, curve[-1][0])
        yield Observation(cell.task, cell.dataset, cell.variant, None, cell.seed, values, name, curve)
        return
    for result in _report(folder).trials:
        values = _base_to_new_values(result) if cell.purpose == "base-to-new" else _fewshot_values(result)
        if values:
            curve = _accuracy_curve(folder / result.folder)
            yield Observation(cell.task, cell.dataset, cell.variant, result.shots, result.seed, values, name, curve)


def _report(folder: Path) -> FewShotReport:
    report = FewShotReport.read(folder)
    if report is None:
        raise InputError(f"{str(folder)!r} has no {FewShotReport.NAME}. Delete the folder to run the cell again.")
    return report


def _subject_values(folder: Path, seconds: float) -> dict[str, float]:
    """The measures of a subject's run, whose training took `seconds`."""
    evaluation, status = SubjectEvaluation.read(folder), RunRecord(folder).status()
    if evaluation is None:
        raise InputError(f"{str(folder)!r} has no {SubjectEvaluation.NAME}. Delete the folder to run the cell again.")
    names = ("heldout_loss", "image_similarity", "text_similarity", "copying", "drift")
    costs = {
        "parameters": status.num_trainable_parameters,
        "bytes": stored_bytes(folder),
        "seconds": seconds,
        "peak_memory": status.peak_memory / MB,
    }
    return {name: getattr(evaluation, name) for name in names} | costs


def _fewshot_values(result: TrialResult) -> dict[str, float]:
    """The measures of a trial."""
    return {
        "top1": result.test.top1.value,
        "calibration_error": result.calibrated.calibration_error,
        "below_zero_shot": float(result.test.top1.value < result.zero_shot_top1),
        "parameters": result.num_trainable_parameters,
        "bytes": result.stored_bytes,
        "seconds": result.seconds,
        "peak_memory": result.peak_memory / MB,
    }


def _base_to_new_values(result: TrialResult) -> dict[str, float]:
    """The measure of a trial on half of the classes; none for a method that cannot add classes."""
    return {} if result.new_classes is None else {"harmonic_mean": result.new_classes.harmonic_mean}


def loss_curve(folder: Path) -> list[tuple[float, float]]:
    """The held-out loss by the seconds of the calibration and of the steps, without those of the measurements themselves."""
    record = RunRecord(folder)
    seconds = sum(phase.seconds or 0.0 for phase in record.status().plan or () if phase.name == CALIBRATING)
    curve: list[tuple[float, float]] = []
    before: float | None = None
    for line in record.metrics():
        if "heldout_loss" in line.values:
            curve.append((seconds, line.values["heldout_loss"]))
        elif before is not None:
            seconds += line.time - before
        before = line.time
    return curve


def _accuracy_curve(folder: Path) -> list[tuple[float, float]]:
    """The validation accuracy by the seconds of the training."""
    lines = [line.values for line in RunRecord(folder).metrics() if "validation_top1" in line.values]
    return [(values["seconds"], values["validation_top1"]) for values in lines]
