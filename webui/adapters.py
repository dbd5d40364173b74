"""The adapters that a user can generate images with, read from files alone: the steps of runs, and uploaded files.

The page refers to an adapter as `RUN@STEP` or `file@ID`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import InputError
from training.runs.record import RunRecord
from training.runs.run_files import Suggestion
from training.subject.measured import adapter_at, saved_steps
from webui import uploads
from webui.runs import RunView, views
from webui.workspace import Workspace

FILE = "file"
GONE = "This adapter no longer exists. Choose another one."


@dataclass(frozen=True)
class AdapterEntry:
    """An adapter for generation.

    Args:
        reference: its id on the page.
        name: its title, which may contain user input.
        path: the argument of `pipelines.subject.adapters.load_adapter`.
        model: the group `model` of its run's options; None for an uploaded file.
    """

    reference: str
    name: str
    path: Path
    model: dict[str, Any] | None = None


@dataclass(frozen=True)
class Steps:
    """The steps of a run that have a saved adapter.

    Args:
        choices: the title of each and the step, in order.
        chosen: the recommended one, else the last; None if there is none.
    """

    choices: list[tuple[str, int]]
    chosen: int | None


def steps_of(record: RunRecord) -> Steps:
    """All adapters of a run: those saved while training, and the final one."""
    view = RunView(record)
    suggestion = view.read_file(Suggestion)
    last = _last_step(record, suggestion)
    steps = sorted({*saved_steps(record), *([] if last is None else [last])})
    suggested = None if suggestion is None else suggestion.step
    total = view.status.total
    notes = {step: " (last)" for step in steps if step == last} | {step: " (recommended)" for step in steps if step == suggested}
    choices = [(f"Step {step}{f' of {total}' if total else ''}{notes.get(step, '')}", step) for step in steps]
    return Steps(choices, suggested if suggested in steps else next(reversed(steps), None))


def last_step(record: RunRecord) -> int | None:
    """The last step, whose adapter was exported in all formats; None before the run is done."""
    return _last_step(record, RunView(record).read_file(Suggestion))


def _last_step(record: RunRecord, suggestion: Suggestion | None) -> int | None:
    return suggestion.last if suggestion is not None and (record.path / "adapter").is_dir() else None


def others(workspace: Workspace, run_id: str | None) -> list[tuple[str, str]]:
    """Adapters to combine with: the recommended or last one of each other run, and the uploaded files.

    Returns: titles, which may contain user input, and references.
    """
    entries = []
    for view in views(workspace):
        if view.task == "subject" and view.id != run_id and (step := steps_of(view.record).chosen) is not None:
            entries.append((f"{view.title}, step {step}", reference_of(view.id, step)))
    return entries + [(name, reference_of_file(path)) for name, path in uploads.adapters(workspace)]


def reference_of(run_id: str, step: int) -> str:
    """The reference of the adapter of a run at `step`."""
    return f"{run_id}@{step}"


def reference_of_file(path: Path) -> str:
    """The reference of the uploaded adapter at `path`."""
    return f"{FILE}@{path.stem}"


def find_adapter(workspace: Workspace, reference: str) -> AdapterEntry:
    """The adapter with this reference.

    Raises: InputError if this workspace has none.
    """
    owner, _, part = reference.partition("@") if isinstance(reference, str) else ("", "", "")
    if owner == FILE:
        return _uploaded(workspace, reference, part)
    view = RunView(workspace.run(owner))
    model = view.options.get("model")
    if view.task != "subject" or model is None:
        raise InputError("This run has no adapter for generation. Choose a subject run.")
    step = _step(part)
    name = f"{view.name}, step {step}"
    if step is not None and step == last_step(view.record):
        return AdapterEntry(reference, name, view.record.path, model)
    if step in saved_steps(view.record):
        return AdapterEntry(reference, name, adapter_at(view.record, step), model)
    raise InputError(GONE)


def _step(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else None


def _uploaded(workspace: Workspace, reference: str, stem: str) -> AdapterEntry:
    for name, path in uploads.adapters(workspace):
        if path.stem == stem:
            return AdapterEntry(reference, name, path)
    raise InputError(GONE)
