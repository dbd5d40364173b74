"""The training loop of all recipes.

Randomness is stateless: step k seeds its generators with (seed, k). A resumed run therefore computes the same as an uninterrupted
one, and the order of images needs no saved state.
"""

from __future__ import annotations

import math
import signal
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
from training.engine.progress import TrainingProgress
from training.engine.sharding import gathered, prepare, split_like, split_state, summon_full_params
from training.engine.stopping import NotFiniteError, StopRequests, TrainingInterrupted
from training.runs.run import RunDirectory
from training.runs.run_requests import ASKED, SAMPLE, SAVE, STOP, Requests

STEP_STRIDE = 1_000_003

logger = get_logger(__name__)


@dataclass(frozen=True)
class Periodic:
    """An action after every `every` optimisation steps and after the last one, on the main process.

    During the action, the trained parameters hold their moving average if there is one.

    Args:
        every: optimisation steps between two calls.
        action: called with the step. It may return a loss that scores the step, such as the validation loss; the checkpoint
            with the lowest score is always kept.
        on_request: called with the step in place of `action` if a user requests samples at another step. It must not change the
            result of the run. None if users cannot request it.
    """

    every: int
    action: Callable[[int], float | None]
    on_request: Callable[[int], None] | None = None


@dataclass
class Trainable:
    """What a recipe trains.

    Args:
        module: called as `module(**batch)`, returns the mean loss of the batch (a scalar); its parameters that require grad
            are trained.
        batch_at: `batch_at(index)` returns the keyword arguments of `module` for the `index`-th batch of the run, over all
            processes: tensors whose first dimension counts examples. Each process takes an equal part of them.
        optimizer, lr_scheduler: over the trained parameters; the scheduler counts optimisation steps.
        ema: a moving average of the trained parameters, or None.
        method: the adapter method's part in this training.
    """

    module: nn.Module
    batch_at: Callable[[int], dict[str, Any]]
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    ema: EMAModel | None = None
    method: MethodTraining = field(default_factory=lambda: MethodTraining((), 0))

    def state(self) -> dict[str, Any]:
        """The state of optimiser, schedule, moving average and method, for a checkpoint."""
        parts = {"optimizer": self.optimizer, "lr_scheduler": self.lr_scheduler, "ema": self.ema, "method": self.method}
        return {name: part.state_dict() for name, part in parts.items() if part is not None}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore a state returned by `state`."""
        self.optimizer.load_state_dict(split_state(state["optimizer"], self.optimizer))
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        # Checkpoints of earlier versions have no state of the method.
        self.method.load_state_dict(state.get("method", {}))
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
            self.place_average()

    def place_average(self) -> None:
        """Move the moving average to the device of the trained parameters, and shard it like them."""
        pairs = zip(self.ema.shadow_params, trainable_parameters(self.optimizer), strict=True)
        self.ema.shadow_params = [split_like(average.to(parameter.device), parameter) for average, parameter in pairs]


@dataclass(frozen=True)
class LoopOptions:
    """The options of the training loop.

    Args:
        max_train_steps: the total number of optimisation steps.
        seed: of all random choices in training.
        gradient_accumulation_steps: batches per optimisation step.
        max_grad_norm: gradients are clipped to this norm.
        checkpointing_steps: optimisation steps between two checkpoints.
        checkpoints_total_limit: the number of checkpoints that are kept, besides the best one.
        dataloader_num_workers: processes that prepare batches in advance; with 0, the training process prepares each batch.
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
    module: nn.Module,
    batch_at: Callable[[int], dict[str, Any]],
    accelerator: Accelerator,
    count: int,
    per_epoch: int | None = None,
) -> Iterator[torch.Tensor]:
    """The losses of this process's part of the first `count` batches, for differentiation; `module` is in evaluation mode.

    With `count` 0, those of an epoch of `per_epoch` batches. Raises: ValueError if there are none.
    """
    indices = range(count or per_epoch or 0)
    if not indices:
        raise ValueError("The number of batches must be at least 1, or 0 where the length of an epoch is known.")
    batches = ProcessBatches(batch_at, accelerator.process_index, accelerator.num_processes).over(indices, 0)
    was_training = module.training
    module.eval()
    try:
        for batch in batches:
            with accelerator.autocast():
                loss = module(**send_to_device(batch, accelerator.device))
            # Outside of autocast, which must be off during the backward pass.
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
    """Train to `options.max_train_steps`, from the run's newest intact checkpoint if there is one.

    After SIGTERM or SIGINT, training finishes the current step, saves a checkpoint and stops. Requests for samples or a
    checkpoint (see `training.runs.run_requests`) are also answered at the end of a step.

    Raises:
        NotFiniteError: the loss or the gradient is not finite; the step is not saved.
        TrainingInterrupted: a signal has stopped the training.
    """
    with prepared(accelerator, run, trainable, options) as stepper:
        # Resume after `prepare`, which decides how parameters are sharded.
        _train_from(_resume(accelerator, run, trainable, options), stepper, periodic)


def _train_from(first: int, stepper: Stepper, periodic: Sequence[Periodic]) -> None:
    """Train, with `first` steps already done."""
    run, options, trainable = stepper.run, stepper.options, stepper.trainable
    requests = Requests.of(run, looks=run.writes)
    is_hidden = not stepper.accelerator.is_main_process
    with StopRequests() as signals, tqdm(initial=first, total=options.max_train_steps, desc="training", disable=is_hidden) as bar:
        batches = stepper.batches(range(first, options.max_train_steps), options.dataloader_num_workers)
        progress = TrainingProgress(run, first, options.max_train_steps)
        for step in range(first, options.max_train_steps):
            rate = trainable.lr_scheduler.get_last_lr()[0]
            loss, requested = stepper.step(step, batches, signals, requests)
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update()
            run.log(step + 1, loss=loss, lr=rate)
            progress.report(step + 1, at_once=_saves(options, step + 1, requested))
            _finish_step(stepper, step + 1, periodic, requested)
            if STOP in requested:
                raise TrainingInterrupted(signals.noted or signal.SIGTERM)


@contextmanager
def prepared(accelerator: Accelerator, run: RunDirectory, trainable: Trainable, options: LoopOptions) -> Iterator[Stepper]:
    """A context with a `Stepper` for `trainable`, whose module is in training mode."""
    module, optimizer = prepare(accelerator, trainable.module.train(), trainable.optimizer)
    if trainable.ema is not None:
        trainable.place_average()
    try:
        yield Stepper(accelerator, run, trainable, options, module, optimizer)
    finally:
        # The accelerator would also unscale the gradients of optimisers of earlier trainings.
        accelerator.free_memory()


@dataclass(frozen=True)
class Stepper:
    """Performs optimisation steps.

    Args:
        module, optimizer: of `trainable`, prepared by `accelerator`.
    """

    accelerator: Accelerator
    run: RunDirectory
    trainable: Trainable
    options: LoopOptions
    module: nn.Module
    optimizer: torch.optim.Optimizer

    def batches(self, steps: range, workers: int = 0) -> Iterator[dict[str, Any]]:
        """This process's part of the batches of `steps`."""
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

        Returns: their mean loss over all processes, without the method's regulariser, and the requests (STOP, SAMPLE, SAVE) that
            any process has received, which are the same on all processes.
        Raises: NotFiniteError, before any parameter changes, if the loss or, without a gradient scaler, the gradient is not
            finite.
        """
        accelerator, trainable = self.accelerator, self.trainable
        seed = self.options.seed * STEP_STRIDE + step
        torch.manual_seed(seed)
        trainable.method.before_step(step + 1, torch.Generator().manual_seed(seed))
        total = self._backward(batches)
        requested = frozenset() if requests is None else requests.take()
        if signals is not None and signals.noted > 0:
            requested |= {STOP}
        loss, requested = self._reduce(total, requested)
        trained = trainable_parameters(self.optimizer)
        norm = accelerator.clip_grad_norm_(trained, self.options.max_grad_norm)
        # With a gradient scaler, a gradient may overflow; the scaler then skips the step.
        gradient = 0.0 if accelerator.scaler is not None else float(gathered(norm))
        for name, value in (("loss", loss), ("gradient's norm", gradient)):
            if not math.isfinite(value):
                raise NotFiniteError(self._not_finite(name, value, step))
        trainable.method.after_backward(step + 1)
        self.optimizer.step()
        if not accelerator.optimizer_step_was_skipped:
            trainable.method.after_step(step + 1)
        trainable.optimizer.zero_grad(set_to_none=True)
        trainable.lr_scheduler.step()
        if trainable.ema is not None:
            trainable.ema.step(trained)
        return loss, requested

    def _reduce(self, loss: torch.Tensor, requested: frozenset[str]) -> tuple[float, frozenset[str]]:
        """The mean of `loss`, (), and the union of `requested` over all processes, in one collective call."""
        if self.accelerator.num_processes == 1:
            return loss.item(), requested
        kinds = (STOP, *ASKED)
        values = torch.stack([loss, *(loss.new_tensor(float(kind in requested)) for kind in kinds)])
        mean, *shares = self.accelerator.reduce(values, reduction="mean").tolist()
        return mean, frozenset(kind for kind, share in zip(kinds, shares, strict=True) if share > 0)

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
            f"The {name} of step {step + 1} is {value} and must be finite; the step was not saved. Lower the learning rate and "
            f"start again, or resume from a checkpoint in {str(self.run.checkpoints)!r}."
        )


def _finish_step(stepper: Stepper, step: int, periodic: Sequence[Periodic], requested: frozenset[str]) -> None:
    """Run the actions that are due or requested after `step` steps, then save a checkpoint if one is.

    The checkpoint is last: a run that resumes from it does not repeat the actions.
    """
    options = stepper.options
    is_last = step == options.max_train_steps
    actions = list(_actions(periodic, step, is_last, SAMPLE in requested))
    score = _act(stepper, step, actions) if actions else None
    if save := _saves(options, step, requested):
        _save(stepper, step, score)
    if actions or save:
        stepper.accelerator.wait_for_everyone()


def _saves(options: LoopOptions, step: int, requested: frozenset[str]) -> bool:
    """Whether a checkpoint is saved after `step` steps."""
    return step == options.max_train_steps or step % options.checkpointing_steps == 0 or bool(requested & {SAVE, STOP})


def _actions(periodic: Sequence[Periodic], step: int, is_last: bool, samples: bool) -> Iterator[Callable[[int], float | None]]:
    """The actions that are due after `step` steps and, if `samples` are requested, those for requests."""
    for task in periodic:
        if is_last or step % task.every == 0:
            yield task.action
        elif samples and task.on_request is not None:
            yield task.on_request


def _act(stepper: Stepper, step: int, actions: Sequence[Callable[[int], float | None]]) -> float | None:
    """Run `actions` with the moving average on the main process; returns the lowest score, None if there is none."""
    trainable, scores = stepper.trainable, []
    with averaged(trainable.ema, trainable.optimizer), summon_full_params(trainable.module), _as_saved(trainable):
        if stepper.accelerator.is_main_process:
            scores = [score for action in actions if (score := action(step)) is not None]
    # Actions may leave modules in evaluation mode.
    stepper.module.train()
    return min(scores, default=None)


@contextmanager
def _as_saved(trainable: Trainable) -> Iterator[None]:
    """Within the context, the trained parameters have the values that the adapter's files hold."""
    parameters = trainable_parameters(trainable.optimizer)
    before = [parameter.detach().clone() for parameter in parameters]
    trainable.method.round_trained()
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)


def _save(stepper: Stepper, step: int, score: float | None) -> None:
    run, trainable, scaler = stepper.run, stepper.trainable, stepper.accelerator.scaler
    state = gathered(trainable.state()) | ({} if scaler is None else {"scaler": scaler.state_dict()})
    with summon_full_params(trainable.module):
        if stepper.accelerator.is_main_process:
            save_checkpoint(run.checkpoints, step, trainable.module, state, stepper.options.checkpoints_total_limit, score)


def _resume(accelerator: Accelerator, run: RunDirectory, trainable: Trainable, options: LoopOptions) -> int:
    """Restore the run's newest intact checkpoint into `trainable`; returns the number of steps already done."""
    # Only the main process looks for it, because it renames damaged checkpoints.
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
            f"max_train_steps must be at least {step}, the number of steps that {str(run.path)!r} has already trained, got "
            f"{options.max_train_steps}."
        )
    run.forget_metrics_after(step)
    return step


def _follow_schedule(scheduler: torch.optim.lr_scheduler.LRScheduler) -> None:
    """Set the learning rate by the current schedule; it differs from the saved one if the number of steps has changed."""
    if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        return
    saved = scheduler.get_last_lr()
    rates = [base * factor(scheduler.last_epoch) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
    if not math.isclose(saved[0], rates[0]):
        logger.warning(
            "The schedule has changed with the number of steps: "
            f"the learning rate is now {rates[0]:.3g} instead of {saved[0]:.3g}."
        )
