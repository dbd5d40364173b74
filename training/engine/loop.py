"""The one training loop, for every recipe.

Randomness is stateless: everything that step k draws comes from generators seeded with (seed, k), so that a resumed run
repeats what an uninterrupted one would have done, and the order of images needs no state of its own.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, send_to_device
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm.auto import tqdm

from pipelines.adapter_method import MethodTraining
from pipelines.errors import InputError
from pipelines.optimizers import averaged, trainable_parameters
from training.engine.checkpoints import load_checkpoint, newest_intact_checkpoint, save_checkpoint
from training.engine.prefetch import ProcessBatches
from training.engine.sharding import gathered, prepare, split_like, split_state, summon_full_params
from training.engine.stopping import NotFiniteError, StopRequests, TrainingInterrupted
from training.runs.run import RunDirectory
from training.runs.run_requests import ASKED, SAMPLE, SAVE, STOP, Requests

STEP_STRIDE = 1_000_003
STATUS_SECONDS = 1.0

logger = get_logger(__name__)


@dataclass(frozen=True)
class Periodic:
    """Something done after every `every` optimisation steps, and after the last: `action(step)`, on the main process.

    The trained parameters hold their moving average meanwhile, where there is one.
    What it returns, if anything, is a loss that scores the step, such as that of held-out images: the checkpoint of the
    step with the lowest is kept whatever the limit.
    Where people may ask for samples between two of its times, `on_request(step)` is done for that alone, and must change
    nothing of what the run ends in.
    """

    every: int
    action: Callable[[int], float | None]
    on_request: Callable[[int], None] | None = None


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
        method: what the adapter method does within this training.
    """

    module: nn.Module
    batch_at: Callable[[int], dict[str, Any]]
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    ema: EMAModel | None = None
    method: MethodTraining = field(default_factory=lambda: MethodTraining((), 0))

    def state(self) -> dict[str, Any]:
        """The state of everything that steps but the parameters."""
        parts = {"optimizer": self.optimizer, "lr_scheduler": self.lr_scheduler, "ema": self.ema, "method": self.method}
        return {name: part.state_dict() for name, part in parts.items() if part is not None}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.optimizer.load_state_dict(split_state(state["optimizer"], self.optimizer))
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        # Checkpoints from before methods had a state have none.
        self.method.load_state_dict(state.get("method", {}))
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
            self.place_average()

    def place_average(self) -> None:
        """Have the moving average lie where the trained parameters do."""
        pairs = zip(self.ema.shadow_params, trainable_parameters(self.optimizer), strict=True)
        self.ema.shadow_params = [split_like(average.to(parameter.device), parameter) for average, parameter in pairs]


@dataclass(frozen=True)
class LoopOptions:
    """How long and how carefully to train.

    Args:
        max_train_steps: optimisation steps in all.
        seed: of everything that training draws.
        gradient_accumulation_steps: batches an optimisation step.
        max_grad_norm: gradients are clipped to this norm.
        checkpointing_steps: optimisation steps between two checkpoints.
        checkpoints_total_limit: how many checkpoints are kept, besides the best.
        dataloader_num_workers: processes that make batches ahead; none makes them when they are needed.
    """

    max_train_steps: int
    seed: int = 0
    gradient_accumulation_steps: int = 1
    max_grad_norm: float = 1.0
    checkpointing_steps: int = 500
    checkpoints_total_limit: int = 2
    dataloader_num_workers: int = 0

    def __post_init__(self) -> None:
        for name in ("max_train_steps", "gradient_accumulation_steps", "checkpointing_steps", "checkpoints_total_limit"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


def training_losses(
    module: nn.Module, batch_at: Callable[[int], dict[str, Any]], accelerator: Accelerator, count: int
) -> Iterator[torch.Tensor]:
    """The losses of this process's part of the first `count` batches, to be differentiated; `module` is in evaluation mode."""
    batches = ProcessBatches(batch_at, accelerator.process_index, accelerator.num_processes).over(range(count), 0)
    was_training = module.training
    module.eval()
    try:
        for batch in batches:
            with accelerator.autocast():
                loss = module(**send_to_device(batch, accelerator.device))
            # Out here, so that autocast is off while it is differentiated.
            yield loss
    finally:
        module.train(was_training)


def train(
    accelerator: Accelerator,
    run: RunDirectory,
    trainable: Trainable,
    options: LoopOptions,
    periodic: Sequence[Periodic] = (),
) -> None:
    """Train to `options.max_train_steps`, resuming from the run's newest intact checkpoint where there is one.

    SIGTERM and SIGINT let the step in progress end, and a checkpoint is written. So do files among the run's requests, for
    samples or a checkpoint (see `training.runs.run_requests`), and training goes on.

    Raises:
        NotFiniteError: the loss or the gradient is not finite; nothing of that step is saved.
        Stopped: a signal asked for it.
    """
    with prepared(accelerator, run, trainable, options) as stepper:
        # Only now is it known which part of a parameter is here.
        _train_from(_resume(accelerator, run, trainable, options), stepper, periodic)


def _train_from(first: int, stepper: Stepper, periodic: Sequence[Periodic]) -> None:
    """All steps after the first `first`."""
    run, options, trainable = stepper.run, stepper.options, stepper.trainable
    requests = Requests.of(run, looks=run.writes)
    with StopRequests() as signals, _progress_bar(first, options, stepper.accelerator) as bar:
        batches = stepper.batches(range(first, options.max_train_steps), options.dataloader_num_workers)
        progress = TrainingProgress(run, first, options.max_train_steps)
        for step in range(first, options.max_train_steps):
            rate = trainable.lr_scheduler.get_last_lr()[0]
            loss, asked = stepper.step(step, batches, signals, requests)
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update()
            run.log(step + 1, loss=loss, lr=rate)
            progress.report(step + 1)
            _act_and_save(stepper, step + 1, periodic, asked)
            if STOP in asked:
                raise TrainingInterrupted(signals.noted or signal.SIGTERM)


def _progress_bar(first: int, options: LoopOptions, accelerator: Accelerator) -> tqdm:
    return tqdm(initial=first, total=options.max_train_steps, desc="training", disable=not accelerator.is_main_process)


@contextmanager
def prepared(accelerator: Accelerator, run: RunDirectory, trainable: Trainable, options: LoopOptions) -> Iterator[Stepper]:
    """What does optimisation steps of `trainable`, as long as this is entered; its module is in training mode then."""
    module, optimizer = prepare(accelerator, trainable.module.train(), trainable.optimizer)
    if trainable.ema is not None:
        trainable.place_average()
    try:
        yield Stepper(accelerator, run, trainable, options, module, optimizer)
    finally:
        # An accelerator unscales the gradients of every optimiser that it still knows, and more than once if it has several.
        accelerator.free_memory()


@dataclass(frozen=True)
class Stepper:
    """Does optimisation steps.

    Args:
        module, optimizer: those of `trainable`, prepared by `accelerator`.
    """

    accelerator: Accelerator
    run: RunDirectory
    trainable: Trainable
    options: LoopOptions
    module: nn.Module
    optimizer: torch.optim.Optimizer

    def batches(self, steps: range, workers: int = 0) -> Iterator[dict[str, Any]]:
        """This process's part of all batches of `steps`."""
        parts = self.options.gradient_accumulation_steps
        of_process = ProcessBatches(self.trainable.batch_at, self.accelerator.process_index, self.accelerator.num_processes)
        return of_process.over(range(steps.start * parts, steps.stop * parts), workers)

    def step(
        self,
        step: int,
        batches: Iterator[dict[str, Any]],
        signals: StopRequests | None = None,
        requests: Requests | None = None,
    ) -> tuple[float, frozenset[str]]:
        """One optimisation step over the next micro-batches.

        Returns: their mean loss over all processes, without the method's regulariser, and what any of them has been asked for,
        all processes the same: STOP, SAMPLE, SAVE.
        Raises: NotFiniteError before anything is changed, if the loss is not finite or, in full precision, the gradient.
        """
        accelerator, trainable = self.accelerator, self.trainable
        torch.manual_seed(self.options.seed * STEP_STRIDE + step)
        total = self._backward(batches)
        asked = frozenset() if requests is None else requests.taken()
        stopping = {STOP} if signals is not None and signals.noted > 0 else set()
        loss, asked = self._agreed(total, asked | stopping)
        trained = trainable_parameters(self.optimizer)
        norm = accelerator.clip_grad_norm_(trained, self.options.max_grad_norm)
        # With a gradient scaler an overflow is expected now and then: it leaves the step out.
        gradient = 0.0 if accelerator.scaler is not None else float(gathered(norm))
        for name, value in (("loss", loss), ("gradient's norm", gradient)):
            if not math.isfinite(value):
                raise NotFiniteError(self._not_finite(name, value, step))
        self.optimizer.step()
        if not accelerator.optimizer_step_was_skipped:
            trainable.method.after_step(step + 1)
        trainable.optimizer.zero_grad(set_to_none=True)
        trainable.lr_scheduler.step()
        if trainable.ema is not None:
            trainable.ema.step(trained)
        return loss, asked

    def _agreed(self, loss: torch.Tensor, asked: frozenset[str]) -> tuple[float, frozenset[str]]:
        """The mean of all processes' `loss`, (), and all that any of them was `asked` for."""
        if self.accelerator.num_processes == 1:
            return loss.item(), asked
        commands = (STOP, *ASKED)
        all_in_one = torch.stack([loss, *(loss.new_tensor(float(command in asked)) for command in commands)])
        mean, *shares = self.accelerator.reduce(all_in_one, reduction="mean").tolist()
        return mean, frozenset(command for command, share in zip(commands, shares, strict=True) if share > 0)

    def _backward(self, batches: Iterator[dict[str, Any]]) -> torch.Tensor:
        """Accumulate the gradients of one step's micro-batches; returns their mean loss on this process, ()."""
        parts = self.options.gradient_accumulation_steps
        total = torch.zeros((), device=self.accelerator.device)
        for part in range(parts):
            with nullcontext() if part == parts - 1 else self.accelerator.no_sync(self.module):
                batch = send_to_device(next(batches), self.accelerator.device)
                with self.accelerator.autocast():
                    loss = self.module(**batch)
                penalty = self.trainable.method.regularizer()
                self.accelerator.backward((loss if penalty is None else loss + penalty) / parts)
            total += loss.detach() / parts
        return total

    def _not_finite(self, name: str, value: float, step: int) -> str:
        return (
            f"The {name} of step {step + 1} is {value}; nothing of that step was saved. Lower the learning rate and start "
            f"again, or go on from the last good of the checkpoints in {str(self.run.checkpoints)!r}."
        )


class TrainingProgress:
    """Says in status.json, about once a second, how far training is."""

    def __init__(self, run: RunDirectory, first: int, total: int) -> None:
        self.run, self.first, self.total = run, first, total
        self.began, self.reported = time.monotonic(), -math.inf

    def report(self, step: int) -> None:
        """Report that `step` steps are done."""
        now = time.monotonic()
        if now - self.reported < STATUS_SECONDS and step < self.total:
            return
        self.reported = now
        left = (now - self.began) / (step - self.first) * (self.total - step)
        self.run.update_status(phase="training", step=step, total=self.total, seconds_left=round(left, 1))


def _act_and_save(stepper: Stepper, step: int, periodic: Sequence[Periodic], asked: frozenset[str]) -> None:
    """What is due or `asked` for after `step` steps.

    The checkpoint comes last: what a resumed run goes on from has had its actions.
    """
    options = stepper.options
    last = step == options.max_train_steps
    due = [task for task in periodic if last or step % task.every == 0]
    wanted = _requested([task for task in periodic if task not in due]) if SAMPLE in asked else []
    save = last or step % options.checkpointing_steps == 0 or not asked.isdisjoint({SAVE, STOP})
    acts = bool(due or wanted)
    score = _act(stepper, step, due, wanted) if acts else None
    if save:
        _save(stepper, step, score)
    if acts or save:
        stepper.accelerator.wait_for_everyone()


def _requested(tasks: Sequence[Periodic]) -> list[Callable[[int], None]]:
    """What `tasks` do for people who ask between two of their times."""
    return [task.on_request for task in tasks if task.on_request is not None]


def _act(stepper: Stepper, step: int, due: Sequence[Periodic], wanted: Sequence[Callable[[int], None]]) -> float | None:
    """Do all actions with the moving average, on the main process; returns the lowest score of those that give one."""
    trainable, scores = stepper.trainable, []
    with averaged(trainable.ema, trainable.optimizer), summon_full_params(trainable.module):
        if stepper.accelerator.is_main_process:
            scores = [score for task in due if (score := task.action(step)) is not None]
            for sample in wanted:
                sample(step)
    # Measuring and sampling leave what they use in evaluation mode.
    stepper.module.train()
    return min(scores, default=None)


def _save(stepper: Stepper, step: int, score: float | None) -> None:
    run, trainable, scaler = stepper.run, stepper.trainable, stepper.accelerator.scaler
    state = gathered(trainable.state()) | ({} if scaler is None else {"scaler": scaler.state_dict()})
    with summon_full_params(trainable.module):
        if stepper.accelerator.is_main_process:
            save_checkpoint(run.checkpoints, step, trainable.module, state, stepper.options.checkpoints_total_limit, score)


def _resume(accelerator: Accelerator, run: RunDirectory, trainable: Trainable, options: LoopOptions) -> int:
    """Restore the run's newest intact checkpoint into `trainable`; returns the number of steps already done."""
    # One process decides: the others must neither judge for themselves nor see it half set aside.
    chosen = [newest_intact_checkpoint(run.checkpoints) if accelerator.is_main_process else None]
    checkpoint = broadcast_object_list(chosen)[0]
    if checkpoint is None:
        run.forget_metrics_after(0)
        return 0
    state = load_checkpoint(checkpoint, trainable.module)
    trainable.load_state(state)
    if accelerator.scaler is not None and "scaler" in state:
        accelerator.scaler.load_state_dict(state["scaler"])
    _follow_schedule(trainable.lr_scheduler)
    step = int(state["step"])
    if step > options.max_train_steps:
        raise InputError(
            f"max_train_steps must be at least {step}, the steps that {str(run.path)!r} has done, got {options.max_train_steps}."
        )
    run.forget_metrics_after(step)
    return step


def _follow_schedule(scheduler: torch.optim.lr_scheduler.LRScheduler) -> None:
    """Have the next step use the rate of the schedule as it is now: with more steps in all, that is not the one saved."""
    if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        return
    saved = scheduler.get_last_lr()
    rates = [base * factor(scheduler.last_epoch) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
    if not math.isclose(saved[0], rates[0]):
        logger.warning(
            f"The schedule has changed with the number of steps: the learning rate goes on at {rates[0]:.3g}, not {saved[0]:.3g}."
        )
