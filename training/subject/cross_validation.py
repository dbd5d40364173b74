"""Leave-one-out cross-validation: short trainings, each without one image and with the validation loss on that image."""

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
from training.subject.plan import FOLD_SHARE, fold_steps
from training.subject.validation import measured_losses

logger = get_logger(__name__)
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
    """Train each fold for `FOLD_SHARE` of the steps, each from the adapter's initial parameters, and restore these.

    Each fold is a run under `folds/`: an interrupted fold resumes, and a finished one is not repeated. NoRA's frozen factors are
    computed from the activations on all images; only the trainable factors depend on the fold.

    Args:
        folds: the training images and the held-out image of each, encoded.
        prepare: makes what the loop trains, for training on the given images.
        options: of the complete training.
        every: steps between two measurements.
        batch_size: of the training.
    """
    start = {name: parameter.detach().clone() for name, parameter in loss.named_parameters() if parameter.requires_grad}
    short = dataclasses.replace(options, max_train_steps=fold_steps(options.max_train_steps))
    for index, (seen, heldout) in enumerate(folds):
        part = RunDirectory.create(run.path / FOLDS / str(index), {"left_out": index}, run.writes, run)
        if _is_finished(part, short.max_train_steps):
            continue
        run.begin(CROSS_VALIDATION, index + 1, fold=index + 1, folds=len(folds))
        trainable = prepare(seen)
        with summon_full_params(loss):
            measure = _measure(part, loss, seen, heldout, batch_size)
        train(accelerator, part, trainable, short, [Periodic(every, measure)])
        _restore(loss, start)
        if part.writes:
            shutil.rmtree(part.checkpoints)
            shutil.rmtree(part.samples)


def log_cost(folds: int) -> None:
    """Log what cross-validation costs and how to avoid it."""
    logger.warning(
        f"There are too few images to hold one out, so cross-validation runs {folds} short trainings first, each without one "
        f"image. They take about as long as {folds * FOLD_SHARE:g} complete ones. --heldout_image none skips them; the name of "
        "an image holds out that image alone."
    )


def _is_finished(part: RunDirectory, steps: int) -> bool:
    return any(logged.step == steps and "heldout_loss" in logged.values for logged in part.metrics())


def _measure(
    part: RunDirectory, loss: DenoisingLoss, seen: CachedLatents, heldout: CachedLatents, batch_size: int
) -> Callable[[int], float]:
    """A function that logs the losses of the fold; those of the base model are logged at once."""

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
