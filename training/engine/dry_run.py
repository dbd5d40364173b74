"""A dry run: three training steps to measure time, memory and disk space, after which everything is restored."""

from __future__ import annotations

import copy
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from pipelines.errors import InputError
from pipelines.optimizers import trainable_parameters
from training.engine.loop import LoopOptions, Stepper, Trainable, prepared
from training.runs.durable import free_bytes
from training.runs.record import newest_step
from training.runs.run import RunDirectory
from training.runs.run_files import DRY_RUN, GB, DryRunReport

STEPS = 3
CLEAR_PEAK = "5"
logger = get_logger(__name__)


class DoesNotFitError(InputError):
    """The run needs more memory than the device has or `memory_limit_gb` allows."""


def check_fits(report: DryRunReport) -> None:
    """Raises: DoesNotFitError if the run does not fit in memory, InputError if it does not fit on the disk."""
    if report.memory_limit is not None and report.peak_memory > report.memory_limit:
        raise DoesNotFitError(
            f"Training needs {report.peak_memory / GB:.3f} GB of memory, but memory_limit_gb is {report.memory_limit / GB:.3f}."
        )
    if report.disk > report.disk_free:
        raise InputError(
            f"Checkpoints need {report.disk / GB:.3f} GB of disk space, but {report.disk_free / GB:.3f} GB are free. Free some "
            "space, lower --checkpoints_total_limit, or give another --output_dir."
        )


def measure_steps(stepper: Stepper, memory_limit_gb: float | None = None, peak: PeakMemory | None = None) -> DryRunReport:
    """Train `STEPS` steps, restore everything, and write dry_run.json.

    Args:
        peak: a measurement that began before the steps. By default, only the steps are measured.
    Raises: DoesNotFitError if the run does not fit in memory, InputError if it does not fit on the disk.
    """
    options, run = stepper.options, stepper.run
    run.begin(DRY_RUN)
    peak, seconds = peak or PeakMemory(stepper.accelerator.device), []
    with restored(stepper):
        batches = stepper.batches(range(STEPS))
        for step in range(STEPS):
            began = time.monotonic()
            stepper.step(step, batches)
            seconds.append(time.monotonic() - began)
        state = stepper.trainable.state()
    trained = trainable_parameters(stepper.optimizer)
    checkpoint = sum(parameter.nbytes for parameter in trained) + nested_bytes(state)
    report = DryRunReport(
        num_trainable_parameters=sum(parameter.numel() for parameter in trained),
        seconds_per_step=median(seconds[1:]),
        seconds=median(seconds[1:]) * options.max_train_steps,
        peak_memory=peak.read(),
        checkpoint=checkpoint,
        # Besides the limit, the best checkpoint and the one being written.
        disk=checkpoint * (options.checkpoints_total_limit + 2),
        disk_free=free_bytes(run.path),
        memory_limit=None if memory_limit_gb is None else round(memory_limit_gb * GB),
    )
    if run.writes:
        report.write(run.path)
    check_fits(report)
    return report


def run_dry_run(
    accelerator: Accelerator,
    run: RunDirectory,
    trainable: Trainable,
    options: LoopOptions,
    memory_limit_gb: float | None,
    peak: PeakMemory | None = None,
) -> None:
    """Run `measure_steps` and log the report, unless the run is resumed.

    Args:
        peak: as for `measure_steps`.
    Raises: as `measure_steps`.
    """
    if newest_step(run.checkpoints) > 0:
        return
    with prepared(accelerator, run, trainable, options) as stepper:
        report = measure_steps(stepper, memory_limit_gb, peak)
    logger.info(report.summary())


@contextmanager
def restored(stepper: Stepper) -> Iterator[None]:
    """A context that restores parameters, optimiser, schedule, moving average and gradient scaler exactly when it ends."""
    trainable, scaler = stepper.trainable, stepper.accelerator.scaler
    parameters = [parameter.detach().clone() for parameter in trainable_parameters(stepper.optimizer)]
    state = copy.deepcopy(trainable.state())
    scaling = None if scaler is None else scaler.state_dict()
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, before in zip(trainable_parameters(stepper.optimizer), parameters, strict=True):
                parameter.copy_(before)
        stepper.optimizer.zero_grad(set_to_none=True)
        trainable.load_state(state)
        if scaler is not None:
            scaler.load_state_dict(scaling)


def nested_bytes(state: object) -> int:
    """The bytes of all tensors in nested dictionaries and lists."""
    if isinstance(state, torch.Tensor):
        return state.nbytes
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return sum(nested_bytes(value) for value in values)


class PeakMemory:
    """The peak of memory use since this object was created: of tensors on a GPU, of the process on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif (clear := Path("/proc/self/clear_refs")).exists():
            clear.write_text(CLEAR_PEAK)

    def read(self) -> int:
        """The peak in bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        status = Path("/proc/self/status")
        if status.exists():
            (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
            return int(line.split()[1]) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
