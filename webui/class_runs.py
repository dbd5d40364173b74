"""Start classifier runs from a draft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from pipelines.errors import InputError
from webui import class_presets, panel
from webui.context import AppContext
from webui.draft import Options, merged
from webui.labelled_datasets import EXAMPLES, class_datasets, find_classes
from webui.runs import views
from webui.workspace import Workspace

NEW_RUN = "NEW-RUN"
# Options that depend on the images of one run; a run with other images does not take them over.
DATASET_OPTIONS = ("data_dir", "dataset", "class_names", "shots", "test_share")
EMPTY_DRAFT: dict[str, Any] = {"set": None, "preset": class_presets.DEFAULT, "options": {}}


def source(app: AppContext, draft_changed: gr.State) -> panel.FieldSource:
    """The options that the expert panel edits."""
    return panel.FieldSource(app, "classify", class_presets.CLASSIFY, app.class_draft, draft_changed, complete)


def set_of(workspace: Workspace, draft: object) -> str:
    """The id of a draft's dataset; if it is gone, the user's newest dataset, or the first example."""
    datasets = class_datasets(workspace)
    wanted = draft.get("set") if isinstance(draft, dict) else None
    return wanted if wanted in (*EXAMPLES, *datasets) else next(iter(datasets), next(iter(EXAMPLES)))


def complete(workspace: Workspace, draft: dict[str, Any], options: Options) -> Options:
    """The options of a run on the draft's dataset.

    Args:
        draft: as stored by the browser.
        options: the preset's and the user's options, merged.
    """
    chosen = draft.get("options") or {}
    return class_presets.completed(find_classes(workspace, set_of(workspace, draft)), options, chosen)


def values_of(about: panel.FieldSource, workspace: Workspace, draft: dict[str, Any]) -> tuple[dict[str, Any], Options]:
    """The draft with the latest edits of the expert panel, and the options of its run.

    Raises: InputError if an option is invalid.
    """
    draft = about.with_pending_input(workspace, draft)
    options = merged(about.preset(draft).options(), draft.get("options") or {})
    return draft, complete(workspace, draft, options)


def start(about: panel.FieldSource, workspace: Workspace, draft: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Start the run; returns the draft with the latest edits, and the run's id.

    Raises: InputError if an option is invalid or the dataset is not ready; no run is started then.
    """
    from webui import launching

    classes = find_classes(workspace, set_of(workspace, draft))
    if not classes.is_ready:
        raise InputError(classes.warnings()[0])
    draft, values = values_of(about, workspace, draft)
    return draft, launching.start(workspace, "classify", values)


def command(about: panel.FieldSource, workspace: Workspace, draft: dict[str, Any]) -> str:
    """The shell command that `start` runs.

    Raises: InputError if an option is invalid.
    """
    from webui import launching
    from webui.work import options as checked

    values = checked.cleaned(workspace, "classify", values_of(about, workspace, draft)[1])
    return launching.shown_command(launching.command("classify", values, workspace.runs / NEW_RUN))


def check_free(workspace: Workspace, folder: Path) -> None:
    """Raises: InputError if a queued or active run trains on the images in `folder`."""
    given = str(folder.absolute())
    for view in views(workspace):
        if view.is_active and view.launch_options.get("data", {}).get("data_dir") == given:
            raise InputError("A run is training on these images. Wait until it is done, or stop it first.")
