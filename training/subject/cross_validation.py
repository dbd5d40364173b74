"""Leave-one-out: short trainings before the real one, each without one of the images, measured on that one."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from pipelines.subject.encoding import CachedLatents
from pipelines.subject.loss import DenoisingLoss
from training.engine.loop import LoopOptions, Periodic, Trainable, train
from training.engine.sharding import assign, summon_full_params
from training.runs.run import RunDirectory
from training.runs.run_files import CROSS_VALIDATION, FOLDS
from training.subject.validation import measured_losses

logger = get_logger(__name__)
# Of the whole training, for each fold.
FOLD_SHARE = 0.5
Fold = tuple[CachedLatents, CachedLatents]


def leave_one_out(
    accelerator: Accelerator,
    run: RunDirectory,
    loss: DenoisingLoss,
    folds: Sequence[Fold],
    prepare: Callable[[CachedLatents], Trainable],
    options: LoopOptions,
    every: int,
    batch_size: int,
) -> None:
    """Train each fold for `FOLD_SHARE` of the steps from the adapter's start, and leave the adapter at its start.

    A fold is a run of its own under `folds/`, so that one that was interrupted goes on where it was, and a finished one is
    not repeated. NoRA's frozen factors come from the activations on all images; what is trained sees only the fold's.

    Args:
        folds: what is trained on and what is left out, encoded.
        prepare: the optimiser and all else for a training on the images given.
        options: of the whole training.
        every: steps between two measurements.
        batch_size: of the training.
    """
    start = {name: parameter.detach().clone() for name, parameter in loss.named_parameters() if parameter.requires_grad}
    short = dataclasses.replace(options, max_train_steps=fold_steps(options.max_train_steps))
    for index, (seen, heldout) in enumerate(folds):
        part = RunDirectory.create(run.path / FOLDS / str(index), {"left_out": index}, run.writes)
        if _is_finished(part, short.max_train_steps):
            continue
        run.update_status(phase=CROSS_VALIDATION, fold=index + 1, folds=len(folds))
        trainable = prepare(seen)
        with summon_full_params(loss):
            measure = _measure(part, loss, seen, heldout, batch_size)
        train(accelerator, part, trainable, short, [Periodic(every, measure)])
        _restore(loss, start)
        if part.writes:
            shutil.rmtree(part.checkpoints)
            shutil.rmtree(part.samples)


def fold_steps(max_train_steps: int) -> int:
    """Steps of one fold."""
    return max(1, round(FOLD_SHARE * max_train_steps))


def say_cost(folds: int) -> None:
    """Tell what leave-one-out costs, and how to go without."""
    logger.warning(
        f"Each of so few images is left out in turn: {folds} short trainings come first, which take about as long as "
        f"{folds * FOLD_SHARE:g} whole ones. --heldout_image none goes without, an image's name measures on that one alone."
    )


def _is_finished(part: RunDirectory, steps: int) -> bool:
    return any(logged.step == steps and "heldout_loss" in logged.values for logged in part.metrics())


def _measure(
    part: RunDirectory, loss: DenoisingLoss, seen: CachedLatents, heldout: CachedLatents, batch_size: int
) -> Callable[[int], float]:
    """A function that logs the fold's losses; the first line, of the base model, is written now."""

    def measure(step: int) -> float:
        losses = measured_losses(loss, heldout, seen, batch_size)
        part.log(step, **losses)
        return losses["heldout_loss"]

    if part.writes and not part.metrics():
        measure(0)
    return measure


def _restore(loss: DenoisingLoss, start: dict[str, torch.Tensor]) -> None:
    for name, parameter in loss.named_parameters():
        if name in start:
            assign(parameter, start[name])
            parameter.grad = None
