"""The one training loop, for every recipe.

Randomness is stateless: everything that step k draws comes from generators seeded with (seed, k), so that a resumed run
repeats what an uninterrupted one would have done, and the order of pictures needs no state of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm.auto import tqdm

from training.checkpoints import list_checkpoints, load_checkpoint, save_checkpoint
from training.run import RunDirectory

STEP_STRIDE = 1_000_003


@dataclass(frozen=True)
class Periodic:
    """Something done after every `every` optimisation steps, and after the last: `action(step)`."""

    every: int
    action: Callable[[int], None]


@dataclass
class Trainable:
    """What a recipe hands to the loop.

    Args:
        module: called as `module(**batch)`, returns the loss (a scalar); its parameters that require grad are trained.
        batch_at: `batch_at(index)` returns the keyword arguments of `module` for the `index`-th batch of the run.
        optimizer, lr_scheduler: over the trained parameters; the scheduler counts optimisation steps.
        ema: a moving average of the trained parameters, or None.
    """

    module: nn.Module
    batch_at: Callable[[int], dict[str, Any]]
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    ema: EMAModel | None = None


@dataclass(frozen=True)
class LoopOptions:
    """How long and how carefully to train.

    Args:
        max_train_steps: optimisation steps in all.
        seed: of everything that training draws.
        gradient_accumulation_steps: batches an optimisation step.
        max_grad_norm: gradients are clipped to this norm.
        checkpointing_steps: optimisation steps between two checkpoints.
        checkpoints_total_limit: how many checkpoints are kept.
    """

    max_train_steps: int
    seed: int = 0
    gradient_accumulation_steps: int = 1
    max_grad_norm: float = 1.0
    checkpointing_steps: int = 500
    checkpoints_total_limit: int = 2

    def __post_init__(self) -> None:
        for field in ("max_train_steps", "gradient_accumulation_steps", "checkpointing_steps", "checkpoints_total_limit"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}.")


def train(accelerator: Accelerator, run: RunDirectory, trainable: Trainable, options: LoopOptions, periodic: Sequence[Periodic] = ()) -> None:
    """Train to `options.max_train_steps`, resuming from the run's newest checkpoint where there is one.

    Raises: FloatingPointError if the loss is not finite; the last checkpoint is kept.
    """
    start = _resume(run, trainable)
    module, optimizer = accelerator.prepare(trainable.module, trainable.optimizer)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    bar = tqdm(range(start, options.max_train_steps), initial=start, total=options.max_train_steps, desc="training", disable=not accelerator.is_main_process)
    for step in bar:
        set_seed(options.seed * STEP_STRIDE + step)
        loss = _optimisation_step(accelerator, module, optimizer, trainable, trained, step, options)
        trainable.lr_scheduler.step()
        if trainable.ema is not None:
            trainable.ema.step(trained)
        if not math.isfinite(loss):
            raise FloatingPointError(f"The loss of step {step + 1} is {loss}. Lower the learning rate, or go on from the checkpoints in {str(run.checkpoints)!r}.")
        bar.set_postfix(loss=f"{loss:.4f}")
        if accelerator.is_main_process:
            _after_step(run, trainable, options, step + 1, loss, periodic)
        accelerator.wait_for_everyone()


def _optimisation_step(
    accelerator: Accelerator,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    trainable: Trainable,
    trained: list[nn.Parameter],
    step: int,
    options: LoopOptions,
) -> float:
    total = 0.0
    for micro in range(options.gradient_accumulation_steps):
        index = step * options.gradient_accumulation_steps + micro
        loss = module(**trainable.batch_at(index)) / options.gradient_accumulation_steps
        accelerator.backward(loss)
        total += loss.item()
    accelerator.clip_grad_norm_(trained, options.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


def _after_step(run: RunDirectory, trainable: Trainable, options: LoopOptions, step: int, loss: float, periodic: Sequence[Periodic]) -> None:
    last = step == options.max_train_steps
    run.log(step, loss=loss, lr=trainable.lr_scheduler.get_last_lr()[0])
    if step % 10 == 0 or last:
        run.update_status(phase="training", step=step, total=options.max_train_steps)
    if step % options.checkpointing_steps == 0 or last:
        state: dict[str, object] = {"optimizer": trainable.optimizer.state_dict(), "lr_scheduler": trainable.lr_scheduler.state_dict()}
        if trainable.ema is not None:
            state["ema"] = trainable.ema.state_dict()
        save_checkpoint(run.checkpoints, step, trainable.module, state, options.checkpoints_total_limit)
    for task in periodic:
        if step % task.every == 0 or last:
            task.action(step)


def _resume(run: RunDirectory, trainable: Trainable) -> int:
    """Restore the run's newest checkpoint into `trainable`; returns the number of steps already done."""
    checkpoints = list_checkpoints(run.checkpoints)
    if not checkpoints:
        return 0
    state = load_checkpoint(checkpoints[-1], trainable.module)
    trainable.optimizer.load_state_dict(state["optimizer"])
    trainable.lr_scheduler.load_state_dict(state["lr_scheduler"])
    if trainable.ema is not None:
        trainable.ema.load_state_dict(state["ema"])
    return int(state["step"])
