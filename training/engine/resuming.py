"""Going on with a run: only with the options that it was started with, but for those that change nothing of what is learned."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.built_in import recorded_name
from pipelines.errors import InputError
from pipelines.run_options import run_options, task_of
from training.runs.record import RunRecord

# What is written and shown, how long to train, and who makes the batches.
MAY_CHANGE_GROUPS = frozenset({"output", "validation"})
MAY_CHANGE = frozenset({"max_train_steps", "dataloader_num_workers", "sample_batch_size"})


def check_can_resume(path: Path, options: dict[str, Any], processes: int) -> None:
    """Check that the run in `path` may be gone on with.

    Args:
        options: the resolved options, by group, as options.json holds them.
        processes: how many there are now.
    Raises: InputError showing each difference, or naming the process that is still at work on the run.
    """
    run = RunRecord(path)
    before = run_options(path)
    if before is None:
        return
    status = run.status()
    if run.is_at_work():
        raise InputError(
            f"The process {status.pid} is at work on {str(path)!r}. Stop it first (kill {status.pid} saves and stops), or wait "
            "until it has ended."
        )
    if (task := task_of(before)) not in (None, task_of(options)):
        raise InputError(f"{str(path)!r} holds a {task} run, which another script trains. Give another --output_dir.")
    differences = list(changed_options(before, json.loads(json.dumps(options))))
    started_with = status.processes or processes
    if started_with != processes:
        differences.append(f"processes: {started_with} then, {processes} now")
    if differences:
        raise InputError(
            f"{str(path)!r} was started with other options, and going on with these would end in neither run: "
            f"{'; '.join(differences)}. Give the options that it was started with, or another --output_dir. Steps, prompts, "
            "intervals and limits may change."
        )


def changed_options(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """Each option that must not change and has, in words; options that one side does not know count as unchanged."""
    for group in sorted(before.keys() & now.keys() - MAY_CHANGE_GROUPS):
        for name in sorted(before[group].keys() & now[group].keys() - MAY_CHANGE):
            if not _same(name, before[group][name], now[group][name]):
                yield f"{name}: {before[group][name]!r} then, {now[group][name]!r} now"


def _same(name: str, before: Any, now: Any) -> bool:
    """Whether an option is as it was; the built-in model is the same wherever it lies."""
    if name == "pretrained_model_name_or_path" and isinstance(before, str) and isinstance(now, str):
        return recorded_name(before) == recorded_name(now)
    return before == now
