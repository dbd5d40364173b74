"""Check that a run can be resumed: options that affect the result must not have changed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.adapter_options import changed_options_of, method_flags
from pipelines.built_in import BUILT_IN_CLIP_NAME, recorded_name
from pipelines.errors import InputError
from pipelines.methods import AUTO, method_named, method_names
from pipelines.optimizers import ADAMW
from pipelines.run_options import Task, run_options, task_of
from training.options.fewshot import AUTO_METHODS
from training.runs.record import RunRecord

# Options of outputs, the length of the training and the batch preparation, which may change.
MAY_CHANGE_GROUPS = frozenset({"output", "validation"})
MAY_CHANGE = frozenset({"dataloader_num_workers", "sample_batch_size"})
# The same, except in a few-shot run, whose finished trials had the earlier length.
LENGTH = "max_train_steps"
# The group that holds the options of adapter methods.
METHOD_GROUPS: dict[Task, str] = {"subject": "adapter", "few-shot": "method"}


def check_can_resume(path: Path, options: dict[str, Any], processes: int) -> None:
    """Check that the run in `path` can be resumed.

    Args:
        options: the resolved options, by group.
        processes: the number of processes now.
    Raises: InputError naming each difference, or the process that still trains the run.
    """
    run = RunRecord(path)
    before = run_options(path)
    if before is None:
        return
    status = run.status()
    if run.is_at_work():
        raise InputError(
            f"The process {status.pid} is still training {str(path)!r}. Stop it first (kill {status.pid} saves a checkpoint and "
            "stops), or wait until it has ended."
        )
    if (task := task_of(before)) not in (None, task_of(options)):
        raise InputError(f"{str(path)!r} is a {task} run, which another script trains. Give another --output_dir.")
    differences = list(changed_options(before, json.loads(json.dumps(options))))
    started_with = status.processes or processes
    if started_with != processes:
        differences.append(f"processes: {started_with} before, {processes} now")
    if differences:
        raise InputError(
            f"{str(path)!r} was started with other options, so it cannot be resumed with these: {'; '.join(differences)}. Give "
            "its original options, or another --output_dir. Steps, prompts, intervals and limits may change."
        )


def changed_options(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """A text for each changed option that must not change; options that only one side has are ignored.

    Of the options of adapter methods, only those of the run's methods count.
    """
    for group in sorted(before.keys() & now.keys() - MAY_CHANGE_GROUPS):
        for name, both in sorted(_changed_in(group, before, now).items()):
            if not _same(name, *both):
                yield f"{name}: {both[0]!r} before, {both[1]!r} now"


def _changed_in(group: str, before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The options of a group that may have changed, and must not, with both values."""
    task = task_of(now)
    compared = before[group].keys() & now[group].keys() - MAY_CHANGE - ({LENGTH} if task != "few-shot" else set())
    changed = {name: (before[group][name], now[group][name]) for name in compared}
    if task is not None and group == METHOD_GROUPS[task]:
        changed = {name: both for name, both in changed.items() if name not in method_flags(task)}
        changed |= _changed_method_options(before[group], now, task)
    if task == "few-shot" and group == "optimisation":
        changed.pop("optimizer", None)
        changed |= _changed_optimizers(before, now)
    return changed


def _changed_method_options(before: dict[str, Any], now: dict[str, Any], task: Task) -> dict[str, tuple[Any, Any]]:
    """The changed options of the run's adapter methods, by flag."""
    group = now[METHOD_GROUPS[task]]
    built_in = task == "few-shot" and now["model"]["model"] == BUILT_IN_CLIP_NAME
    changes = (change for name in _adapters(group) for change in changed_options_of(name, before, group, task, built_in))
    return {flag: (earlier, later) for flag, earlier, later in changes}


def _adapters(group: dict[str, Any]) -> list[str]:
    """The run's adapter methods; the others are baselines, without options."""
    names = [group["method"]] if isinstance(group["method"], str) else group["method"]
    return [name for name in (AUTO_METHODS if names == [AUTO] else names) if name in method_names()]


def _changed_optimizers(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The optimiser of a few-shot run's adapter methods, if it has changed. Earlier versions only had AdamW."""
    changed = {}
    for name in _adapters(now["method"]):
        usual = method_named(name).defaults("few-shot", now["model"]["model"] == BUILT_IN_CLIP_NAME).optimizer
        optimizers = before["optimisation"].get("optimizer", ADAMW) or usual, now["optimisation"]["optimizer"] or usual
        if optimizers[0] != optimizers[1]:
            changed["optimizer"] = optimizers
    return changed


def _same(name: str, before: Any, now: Any) -> bool:
    """Whether an option is unchanged; the built-in model may have another path, and an optimiser's name another case."""
    if name == "optimizer" and isinstance(before, str) and isinstance(now, str):
        return before.lower() == now.lower()
    if name == "pretrained_model_name_or_path" and isinstance(before, str) and isinstance(now, str):
        return recorded_name(before) == recorded_name(now)
    return before == now
