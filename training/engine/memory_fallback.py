"""Where a run does not fit: the first settings that do, each tried by a dry run in a process of its own."""

from __future__ import annotations

import copy
import gc
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils.memory import should_reduce_batch_size

from pipelines.built_in import import_path
from pipelines.errors import InputError
from training.engine.dry_run import DoesNotFitError
from training.runs.run import RunDirectory
from training.runs.run_files import GB, DryRunReport, FallbackStep, MemoryFallback

SMALLER_RESOLUTIONS = (0.75, 0.5)
# Sides that UNets can halve often enough.
LARGE, LARGE_STEP, SMALL_STEP = 512, 64, 8
# A process alone must not look for the others of the run that does not fit.
DISTRIBUTED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
Options = dict[str, dict[str, Any]]


def command_line(step: FallbackStep) -> str:
    """The flags of `step` as typed in a shell."""
    return shlex.join(as_flags(step.flags))


def rungs(options: Options, resolution: int | None) -> Iterator[dict[str, Any]]:
    """What to set, one rung after the other: recompute, accumulate, 8-bit moments, 4-bit weights, smaller images.

    Args:
        options: the resolved options, by group; what they have already, or know nothing of, makes no rung.
        resolution: the side of the images in pixels, None where it is not known.
    """
    flat_options = _flat(options)
    if flat_options.get("gradient_checkpointing") is False:
        yield {"gradient_checkpointing": True}
    yield from _smaller_batches(flat_options["train_batch_size"], flat_options["gradient_accumulation_steps"])
    if flat_options.get("use_8bit_adam") is False:
        yield {"use_8bit_adam": True}
    if flat_options.get("quantize", "absent") is None:
        yield {"quantize": "nf4"}
    for factor in SMALLER_RESOLUTIONS if resolution is not None else ():
        multiple = LARGE_STEP if resolution >= LARGE else SMALL_STEP
        yield {"resolution": int(resolution * factor) // multiple * multiple}


def _flat(options: Options) -> dict[str, Any]:
    """The options by name, without their groups."""
    return {name: value for group in options.values() for name, value in group.items()}


def _smaller_batches(size: int, parts: int) -> Iterator[dict[str, Any]]:
    """The images of an optimisation step stay as many: the batch is divided by its smallest divisor, again and again."""
    while size > 1:
        divisor = next(d for d in range(2, size + 1) if size % d == 0)
        size, parts = size // divisor, parts * divisor
        yield {"train_batch_size": size, "gradient_accumulation_steps": parts}


def as_flags(values: dict[str, Any]) -> list[str]:
    """Command-line flags that set `values`; None is left out."""
    flags: list[str] = []
    for name, value in values.items():
        if value is not None and value != []:
            many = value if isinstance(value, list | tuple) else [value]
            flags += [f"--{name}", *(str(one) for one in many)]
    return flags


def climb(recipe: str, options: Options, resolution: int | None, folder: Path) -> list[FallbackStep]:
    """Try one rung after the other until one fits.

    Args:
        recipe: the module that is run.
        options: the resolved options, by group.
        folder: where the dry runs go.
    """
    tried: list[FallbackStep] = []
    setting: dict[str, Any] = {}
    for more in rungs(options, resolution):
        step = attempt(recipe, options, setting | more, folder / str(len(tried)))
        tried.append(step)
        if step.fits:
            break
        if step.peak_memory is not None or _ran_out(step.reason or ""):
            # Settings that cannot be used here at all are not carried on.
            setting |= more
    return tried


def attempt(recipe: str, options: Options, setting: dict[str, Any], folder: Path) -> FallbackStep:
    """A dry run of `recipe` with `setting` besides `options`, in a process of its own."""
    flat_options = _flat(copy.deepcopy(options))
    values = flat_options | setting | {"output_dir": str(folder), "dry_run": True, "memory_fallback": False, "report_to": "none"}
    values |= {"resume_from_checkpoint": None, "push_to_hub": False, "hub_model_id": None, "hub_token": None}
    flags = as_flags({name: value for name, value in values.items() if name in flat_options})
    command = [sys.executable, "-P", "-m", recipe, *flags]
    finished = subprocess.run(command, env=_own_environment(), capture_output=True, text=True, check=False)
    lines = finished.stderr.strip().splitlines() or [f"exit code {finished.returncode}"]
    reason = None if finished.returncode == 0 else lines[-1]
    report = DryRunReport.read(folder)
    measured = (None, None) if report is None else (report.peak_memory, report.seconds_per_step)
    return FallbackStep(setting, finished.returncode == 0, *measured, reason)


def _own_environment() -> dict[str, str]:
    """The environment of a process alone, with this project to import from."""
    distributed = {name for name in os.environ if name in DISTRIBUTED or name.startswith("TORCHELASTIC")}
    return {name: value for name, value in os.environ.items() if name not in distributed} | import_path()


def _ran_out(message: str) -> bool:
    return should_reduce_batch_size(RuntimeError(message)) or "out of memory" in message


def advice(tried: list[FallbackStep]) -> str:
    """What to do, in words."""
    if tried and tried[-1].fits:
        best = tried[-1]
        return (
            f"This fits: {command_line(best)} ({(best.peak_memory or 0) / GB:.3f} GB, {best.seconds_per_step:.3g} s a step). "
            "Add it to the command."
        )
    return "No setting of the ladder fits either: use a smaller base model, a lower --resolution or a larger device."


def with_ladder(work: Callable[[Any], RunDirectory], options: Any, recipe: str) -> RunDirectory:
    """`work(options)`; where it does not fit in memory, look for settings that do.

    Args:
        work: the recipe.
        options: its options, with `to_dict()`, and `output.memory_fallback`.
        recipe: the module that `python -m` runs; its status has the side of its images as `resolution`.
    Raises: InputError with the flags to set.
    """
    try:
        return work(options)
    except (DoesNotFitError, RuntimeError) as error:
        if not isinstance(error, DoesNotFitError) and not should_reduce_batch_size(error):
            raise
        reason = str(error)
    # Only here, where the frames of the error are gone, can the model go.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if not options.output.memory_fallback or not PartialState().is_main_process:
        raise InputError(f"It does not fit: {reason}")
    run = RunDirectory(Path(options.output.output_dir))
    run.update_status(phase="looking for settings that fit")
    with tempfile.TemporaryDirectory() as folder:
        tried = climb(recipe, options.to_dict(), run.status().resolution, Path(folder))
    MemoryFallback(tried).write(run.path)
    message = f"It does not fit: {reason} {advice(tried)}"
    run.update_status(error=message)
    raise InputError(message)
