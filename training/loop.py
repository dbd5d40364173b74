"""The one training loop, for every recipe.

Randomness is stateless: everything that step k draws comes from generators seeded with (seed, k), so that a resumed run
repeats what an uninterrupted one would have done, and the order of pictures needs no state of its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
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
        module: called as `module(**batch)`, returns the mean loss of the batch (a scalar); its parameters that require grad
            are trained.
        batch_at: `batch_at(index)` returns the keyword arguments of `module` for the `index`-th batch of the run, over all
            processes: tensors whose first dimension counts examples. Each process takes an equal part of them.
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


def train(
    accelerator: Accelerator, run: RunDirectory, trainable: Trainable, options: LoopOptions, periodic: Sequence[Periodic] = ()
) -> None:
    """Train to `options.max_train_steps`, resuming from the run's newest checkpoint where there is one.

    Raises: FloatingPointError if the loss is not finite; the last checkpoint is kept.
    """
    first = _resume(run, trainable)
    module, optimizer = accelerator.prepare(trainable.module, trainable.optimizer)
    steps = range(first, options.max_train_steps)
    began = time.monotonic()
    with tqdm(initial=first, total=options.max_train_steps, desc="training", disable=not accelerator.is_main_process) as bar:
        for step in steps:
            module.train()
            set_seed(options.seed * STEP_STRIDE + step)
            rate = trainable.lr_scheduler.get_last_lr()[0]
            loss = _optimisation_step(accelerator, module, optimizer, trainable, step, options)
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"The loss of step {step + 1} is {loss}. Lower the learning rate, or go on from the checkpoints in "
                    f"{str(run.checkpoints)!r}."
                )
            bar.set_postfix(loss=f"{loss:.4f}")
            bar.update()
            pace = (time.monotonic() - began) / (step + 1 - first)
            run.log(step + 1, loss=loss, lr=rate)
            _report_progress(run, options, step + 1, pace)
            if accelerator.is_main_process:
                _save_and_act(run, trainable, options, step + 1, periodic)
            accelerator.wait_for_everyone()


def _optimisation_step(
    accelerator: Accelerator,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    trainable: Trainable,
    step: int,
    options: LoopOptions,
) -> float:
    """One optimisation step over all micro-batches; returns their mean loss over all processes."""
    parts = options.gradient_accumulation_steps
    total = torch.zeros((), device=accelerator.device)
    for index in range(step * parts, (step + 1) * parts):
        batch = own_part(trainable.batch_at(index), accelerator.process_index, accelerator.num_processes)
        last = index == (step + 1) * parts - 1
        with nullcontext() if last else accelerator.no_sync(module):
            loss = module(**send_to_device(batch, accelerator.device)) / parts
            accelerator.backward(loss)
        total += loss.detach()
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    accelerator.clip_grad_norm_(trained, options.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    trainable.lr_scheduler.step()
    if trainable.ema is not None:
        trainable.ema.step(trained)
    return accelerator.reduce(total, reduction="mean").item()


def own_part(batch: dict[str, Any], process: int, processes: int) -> dict[str, Any]:
    """The equal part of a global batch's tensors, split along their first dimension, that belongs to `process`.

    Raises: ValueError if the examples do not divide evenly.
    """
    if processes == 1:
        return batch
    count = len(next(iter(batch.values())))
    if count % processes:
        raise ValueError(f"The batch over all processes must be a multiple of {processes} processes, got {count} examples.")
    size = count // processes
    return {name: values[process * size : (process + 1) * size] for name, values in batch.items()}


def _report_progress(run: RunDirectory, options: LoopOptions, step: int, pace: float) -> None:
    """Say in status.json, every tenth step, how far training is; `pace` is in seconds a step."""
    if step % 10 == 0 or step == options.max_train_steps:
        total = options.max_train_steps
        run.update_status(phase="training", step=step, total=total, seconds_left=round(pace * (total - step), 1))


def _save_and_act(run: RunDirectory, trainable: Trainable, options: LoopOptions, step: int, periodic: Sequence[Periodic]) -> None:
    last = step == options.max_train_steps
    if step % options.checkpointing_steps == 0 or last:
        state: dict[str, object] = {
            "optimizer": trainable.optimizer.state_dict(),
            "lr_scheduler": trainable.lr_scheduler.state_dict(),
        }
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
    step = int(state["step"])
    run.forget_metrics_after(step)
    return step
