"""The options of a run, for code that uses the run's results: its task and its base model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pipelines.errors import InputError
from pipelines.run_file import RESTORE, ResolvedOptions

STATUS = "status.json"
Task = Literal["subject", "few-shot"]
# How to use each task's runs.
COMMANDS: dict[Task, str] = {
    "subject": "generate images with python -m pipelines.subject.generate --adapter",
    "few-shot": "classify images with python -m pipelines.fewshot.classify",
}


def is_run(folder: Path) -> bool:
    """Whether `folder` is a run directory."""
    return (folder / STATUS).is_file() and (folder / ResolvedOptions.NAME).is_file()


def run_options(folder: str | Path) -> dict[str, Any] | None:
    """The options by group of the run in `folder`; None if it has no options.json.

    Raises: InputError naming the file if it does not hold options by group.
    """
    options = ResolvedOptions.read(Path(folder))
    if options is None:
        return None
    if not all(isinstance(group, dict) for group in options.groups.values()):
        raise InputError(f"{str(Path(folder) / options.NAME)!r} must hold the options of a run by group. {RESTORE}")
    return options.groups


def task_of(options: Mapping[str, Mapping[str, Any]]) -> Task | None:
    """The task of a run with these options; None if they belong to neither task."""
    if "target_layers" in options:
        return "few-shot"
    return "subject" if "pretrained_model_name_or_path" in options.get("model", {}) else None


def check_task(folder: str | Path, task: Task) -> dict[str, Any] | None:
    """The options of the run in `folder`, which must be of `task`; None if it has no options.json.

    Raises: InputError for a run of the other task, with the command for it.
    """
    options = run_options(folder)
    other = task_of(options) if options is not None else None
    if other is not None and other != task:
        raise InputError(f"{str(folder)!r} is a {other} run, not a {task} run: {COMMANDS[other]} {folder}.")
    return options
