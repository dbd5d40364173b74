"""Which adapters a user can generate with, read from files alone: the steps of runs, and uploaded files.

The page names an adapter by a reference that we make: `RUN@STEP` or `file@ID`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import InputError
from training.runs.record import RunRecord
from training.subject.measured import adapter_at, kept_steps
from webui import uploads
from webui.views import RunView, views
from webui.workspace import Workspace

# As in training.subject.image_scoring, which loads torch.
SUGGESTION = "suggestion.json"
FILE = "file"
GONE = "This adapter is no longer there. Choose another one."


@dataclass(frozen=True)
class AdapterEntry:
    """An adapter to generate images with.

    Args:
        reference: what the page calls it.
        name: what people call it; a user's words may be in it.
        path: what `pipelines.subject.adapters.load_adapter` takes.
        model: the group `model` of its run's options; None for a file, which does not say.
    """

    reference: str
    name: str
    path: Path
    model: dict[str, Any] | None = None


@dataclass(frozen=True)
class Steps:
    """The steps of a run whose adapters can be used.

    Args:
        choices: what each is called and its reference, in order.
        chosen: the suggested one, else the last; None where there is none.
    """

    choices: list[tuple[str, int]]
    chosen: int | None


def steps_of(record: RunRecord) -> Steps:
    """All adapters of a run: those kept while training, and the one at its end."""
    suggestion, last = record.read_json(SUGGESTION), last_step(record)
    steps = sorted({*kept_steps(record), *([] if last is None else [last])})
    suggested, total = suggestion.get("step"), record.status().get("total")
    notes = {step: ", the last" for step in steps if step == last} | {step: ", suggested" for step in steps if step == suggested}
    choices = [(f"Step {step}{f' of {total}' if total else ''}{notes.get(step, '')}", step) for step in steps]
    return Steps(choices, suggested if suggested in steps else next(reversed(steps), None))


def last_step(record: RunRecord) -> int | None:
    """The step whose adapter was exported in all forms at the run's end; None before that."""
    return record.read_json(SUGGESTION).get("last") if (record.path / "adapter").is_dir() else None


def others(workspace: Workspace, run_id: str | None) -> list[tuple[str, str]]:
    """What can be mixed in: the suggested adapter of each other run, else its last, and the uploaded files.

    Returns: names, with users' words in them, and references.
    """
    entries = []
    for view in views(workspace):
        if view.task == "subject" and view.id != run_id and (step := steps_of(view.record).chosen) is not None:
            entries.append((f"{view.title}, step {step}", reference_of(view.id, step)))
    return entries + [(name, reference_of_file(path)) for name, path in uploads.adapters(workspace)]


def reference_of(run_id: str, step: int) -> str:
    """What the page calls the adapter of a run at `step`."""
    return f"{run_id}@{step}"


def reference_of_file(path: Path) -> str:
    """What the page calls an uploaded adapter that lies at `path`."""
    return f"{FILE}@{path.stem}"


def adapter_called(workspace: Workspace, reference: str) -> AdapterEntry:
    """The adapter that the page calls `reference`.

    Raises: InputError if there is none in this workspace.
    """
    owner, _, part = reference.partition("@") if isinstance(reference, str) else ("", "", "")
    if owner == FILE:
        return _uploaded(workspace, reference, part)
    view = RunView(workspace.run(owner))
    model = view.options.get("model")
    if view.task != "subject" or model is None:
        raise InputError("This run has no adapter. Choose a run that was trained on a subject.")
    step = _step(part)
    name = f"{view.name}, step {step}"
    if step is not None and step == last_step(view.record):
        return AdapterEntry(reference, name, view.record.path, model)
    if step in kept_steps(view.record):
        return AdapterEntry(reference, name, adapter_at(view.record, step), model)
    raise InputError(GONE)


def _step(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else None


def _uploaded(workspace: Workspace, reference: str, stem: str) -> AdapterEntry:
    for name, path in uploads.adapters(workspace):
        if path.stem == stem:
            return AdapterEntry(reference, name, path)
    raise InputError(GONE)
