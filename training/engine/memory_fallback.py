"""Memory fallback: the first settings with which a run fits into memory, found by dry runs in separate processes."""

from __future__ import annotations

import copy
import gc
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils.memory import should_reduce_batch_size

from pipelines.errors import InputError
from training.engine.dry_run import DoesNotFitError
from training.runs.recipe_process import recipe_command, single_process_environment
from training.runs.run import RunDirectory
from training.runs.run_files import FINDING_SETTINGS, GB, DryRunReport, FallbackStep, MemoryFallback

SMALLER_RESOLUTIONS = (0.75, 0.5)
# Resolutions are multiples of these, so that UNets can halve them repeatedly.
LARGE, LARGE_STEP, SMALL_STEP = 512, 64, 8
Options = dict[str, dict[str, Any]]


def command_line(step: FallbackStep) -> str:
    """The flags of `step` as they are typed into a shell."""
    return shlex.join(as_flags(step.flags))


def fallback_settings(options: Options, resolution: int | None) -> Iterator[dict[str, Any]]:
    """The settings to try, in order, each in addition to those before: gradient checkpointing, smaller batches with gradient
    accumulation, 8-bit optimiser, 4-bit weights, lower resolution.

    Args:
        options: the resolved options, by group; settings that they already have, or do not know, are left out.
        resolution: the side of the images in pixels; None if unknown.
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
    """Smaller batches with the same number of images per optimisation step; each divides the size by its smallest divisor."""
    while size > 1:
        divisor = next(d for d in range(2, size + 1) if size % d == 0)
        size, parts = size // divisor, parts * divisor
        yield {"train_batch_size": size, "gradient_accumulation_steps": parts}


def as_flags(values: dict[str, Any]) -> list[str]:
    """The command-line flags for `values`; options that are None are left out."""
    flags: list[str] = []
    for name, value in values.items():
        if value is not None and value != []:
            values_of_flag = value if isinstance(value, list | tuple) else [value]
            flags += [f"--{name}", *map(str, values_of_flag)]
    return flags


def find_fitting(recipe: str, options: Options, resolution: int | None, folder: Path) -> list[FallbackStep]:
    """Try the settings in order until one fits.

    Args:
        recipe: the module that `python -m` runs.
        options: the resolved options, by group.
        folder: for the dry runs.
    """
    tried: list[FallbackStep] = []
    setting: dict[str, Any] = {}
    for more in fallback_settings(options, resolution):
        step = attempt(recipe, options, setting | more, folder / str(len(tried)))
        tried.append(step)
        if step.fits:
            break
        if step.peak_memory is not None or _ran_out(step.reason or ""):
            # Settings that failed for another reason than memory are not kept.
            setting |= more
    return tried


def attempt(recipe: str, options: Options, setting: dict[str, Any], folder: Path) -> FallbackStep:
    """The result of a dry run of `recipe` with `options` and `setting`, in a separate process."""
    flat_options = _flat(copy.deepcopy(options))
    values = flat_options | setting | {"output_dir": str(folder), "dry_run": True, "memory_fallback": False, "report_to": "none"}
    values |= {"resume_from_checkpoint": None, "push_to_hub": False, "hub_model_id": None, "hub_token": None}
    flags = as_flags({name: value for name, value in values.items() if name in flat_options})
    # A dry run is a single process and must not join the group of the run.
    environment = single_process_environment()
    finished = subprocess.run(recipe_command(recipe, flags), env=environment, capture_output=True, text=True, check=False)
    lines = finished.stderr.strip().splitlines() or [f"exit code {finished.returncode}"]
    reason = None if finished.returncode == 0 else lines[-1]
    report = DryRunReport.read(folder)
    measured = (None, None) if report is None else (report.peak_memory, report.seconds_per_step)
    return FallbackStep(setting, finished.returncode == 0, *measured, reason)


def _ran_out(message: str) -> bool:
    return should_reduce_batch_size(RuntimeError(message)) or "out of memory" in message


def advice(tried: list[FallbackStep]) -> str:
    """What the user can do, as a sentence."""
    if tried and tried[-1].fits:
        best = tried[-1]
        return (
            f"These flags fit: {command_line(best)} ({(best.peak_memory or 0) / GB:.3f} GB, {best.seconds_per_step:.3g} s per "
            "step). Add them to the command."
        )
    return "None of the settings of the memory fallback fits. Use a smaller base model, a lower --resolution or a larger device."


def with_memory_fallback(work: Callable[[Any], RunDirectory], options: Any, recipe: str) -> RunDirectory:
    """Run `work(options)`; if it does not fit into memory, look for settings that fit.

    Args:
        work: the recipe.
        options: its options, with `to_dict()`, and `output.memory_fallback`.
        recipe: the module that `python -m` runs; it must write `resolution` to the status.
    Raises: InputError with the flags to set.
    """
    try:
        return work(options)
    except (DoesNotFitError, RuntimeError) as error:
        if not isinstance(error, DoesNotFitError) and not should_reduce_batch_size(error):
            raise
        reason = str(error)
    # Outside of `except`, because the error's traceback keeps the model in memory.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if not options.output.memory_fallback or not PartialState().is_main_process:
        raise InputError(f"The training does not fit into memory: {reason}")
    run = RunDirectory(Path(options.output.output_dir))
    run.update_status(phase=FINDING_SETTINGS, share=None, seconds_left=None)
    with tempfile.TemporaryDirectory() as folder:
        tried = find_fitting(recipe, options.to_dict(), run.status().resolution, Path(folder))
    MemoryFallback(tried).write(run.path)
    message = f"The training does not fit into memory: {reason} {advice(tried)}"
    run.update_status(error=f"{InputError.__name__}: {message}")
    raise InputError(message)
