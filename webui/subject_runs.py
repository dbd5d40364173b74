"""The options, the command and the start of a subject run, from its draft."""

from __future__ import annotations

import hashlib
import json
import shutil
from typing import Any

from pipelines.errors import InputError
from training.runs.record import RunRecord
from webui import costs, panel, presets
from webui.context import AppContext
from webui.datasets import Dataset
from webui.draft import Draft, Options, check_words, merged
from webui.workspace import Workspace

# A hidden folder below the runs, so that it is not listed as one.
DRY_RUNS, NEW_RUN = ".rehearsals", "NEW-RUN"


def source(context: AppContext) -> panel.FieldSource:
    """The fields of the expert panel for subject runs."""
    return panel.FieldSource(context, "subject", presets.SUBJECT, context.draft, context.draft_changed, complete)


def complete(workspace: Workspace, stored: dict[str, Any], options: Options) -> Options:
    """All options that a run is started with, from the stored draft and the options that differ from the defaults."""
    draft = Draft.from_browser(stored)
    photos = Dataset.of(workspace, draft.set)
    return draft.values(None if photos.is_example else photos.folder, options)


def values_of(context: AppContext, workspace: Workspace, stored: dict[str, Any]) -> tuple[dict[str, Any], Options]:
    """The draft including pending input, and all options that its run is started with.

    Raises: InputError for an invalid option.
    """
    about = source(context)
    stored = about.with_pending_input(workspace, stored)
    options = merged(about.preset(stored).options(), stored.get("options") or {})
    return stored, complete(workspace, stored, options)


def start(context: AppContext, workspace: Workspace, stored: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Start the run; returns the draft including pending input, and the run's id.

    Raises: InputError for an invalid option, before anything is started.
    """
    from webui import launching

    draft = Draft.from_browser(stored)
    draft.check()
    photos = Dataset.of(workspace, draft.set)
    if not photos.photos():
        raise InputError("There are no photos yet. Add three to ten photos of one subject under Photos.")
    stored, values = values_of(context, workspace, stored)
    photos.seal()
    return stored, launching.start(workspace, "subject", values)


def command(context: AppContext, workspace: Workspace, stored: dict[str, Any]) -> str:
    """The command that `start` runs, as it is typed into a shell.

    Raises: InputError for an invalid option.
    """
    from webui import launching

    Draft.from_browser(stored).check()
    values = values_of(context, workspace, stored)[1]
    return launching.shown_command(launching.command("subject", _checked(workspace, values), workspace.runs / NEW_RUN))


def dry_run_of(context: AppContext, workspace: Workspace, stored: dict[str, Any]) -> tuple[Options, RunRecord]:
    """The options of a dry run of the draft, and its record.

    The folder depends only on the options and the images, so that nothing is measured twice.

    Raises: InputError for an invalid option.
    """
    draft = Draft.from_browser(stored)
    check_words(draft.trigger, draft.kind)
    values = values_of(context, workspace, stored)[1]
    photos = Dataset.of(workspace, draft.set)
    content = json.dumps([_checked(workspace, values), photos.signature()], sort_keys=True)
    return values, RunRecord(workspace.runs / DRY_RUNS / hashlib.sha256(content.encode()).hexdigest()[:20])


def _checked(workspace: Workspace, values: Options) -> Options:
    from webui.work import options as checked

    checked.build(workspace, "subject", values)
    return checked.cleaned(workspace, "subject", values)


def start_dry_run(context: AppContext, workspace: Workspace, stored: dict[str, Any]) -> None:
    """Start a dry run of the draft, unless one is running or finished.

    Raises: InputError for an invalid option.
    """
    from webui import launching

    values, record = dry_run_of(context, workspace, stored)
    if costs.is_measuring(record) or costs.is_measured(record):
        return
    if record.path.exists():
        shutil.rmtree(record.path)
    launching.start_dry_run(workspace, "subject", values, record.path)
