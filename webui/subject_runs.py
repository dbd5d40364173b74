"""From the draft of a subject run to its options, its command and the run itself."""

from __future__ import annotations

import hashlib
import json
import shutil
from typing import Any

from pipelines.errors import InputError
from training.runs.record import RunRecord
from webui import costs, panel, presets
from webui.app_context import AppContext
from webui.draft import Draft, Options, check_words, merged
from webui.image_dataset import SubjectDataset
from webui.workspace import Workspace

# Below the runs; hidden, so that it is none.
REHEARSALS, NEW_RUN = ".rehearsals", "NEW-RUN"


def source(context: AppContext) -> panel.FieldSource:
    """What the expert panel of subject runs is about."""
    return panel.FieldSource(context, "subject", presets.SUBJECT, context.draft, context.draft_changed, complete)


def complete(workspace: Workspace, stored: dict[str, Any], options: Options) -> Options:
    """All that a run is started with, from what the browser kept and the options in force."""
    draft = Draft.from_browser(stored)
    photos = SubjectDataset.of(workspace, draft.set)
    return draft.values(None if photos.is_example else photos.folder, options)


def values_of(context: AppContext, workspace: Workspace, stored: dict[str, Any]) -> tuple[dict[str, Any], Options]:
    """The draft with what was typed last, and all that its run is started with.

    Raises: InputError for what cannot be used.
    """
    about = source(context)
    stored = about.settled(workspace, stored)
    options = merged(about.preset(stored).options(), stored.get("options") or {})
    return stored, complete(workspace, stored, options)


def start(context: AppContext, workspace: Workspace, stored: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Start the run; returns the draft, with what was typed last, and the run's id.

    Raises: InputError for what cannot be used; then nothing was started.
    """
    from webui import launching

    draft = Draft.from_browser(stored)
    draft.check()
    photos = SubjectDataset.of(workspace, draft.set)
    if not photos.entries():
        raise InputError("There are no photos yet. Add three to ten photos of one subject under Photos.")
    stored, values = values_of(context, workspace, stored)
    photos.seal()
    return stored, launching.start(workspace, "subject", values)


def command(context: AppContext, workspace: Workspace, stored: dict[str, Any]) -> str:
    """The command that `start` runs, as one writes it.

    Raises: InputError for what cannot be used.
    """
    from webui import launching

    Draft.from_browser(stored).check()
    values = values_of(context, workspace, stored)[1]
    return launching.shown_command(launching.command("subject", _checked(workspace, values), workspace.runs / NEW_RUN))


def dry_run_of(context: AppContext, workspace: Workspace, stored: dict[str, Any]) -> tuple[Options, RunRecord]:
    """What a dry run of the draft is started with, and where its record is or will be.

    The place is the same for the same options and images, so that nothing is measured twice.

    Raises: InputError for what cannot be used.
    """
    draft = Draft.from_browser(stored)
    check_words(draft.trigger, draft.kind)
    values = values_of(context, workspace, stored)[1]
    photos = SubjectDataset.of(workspace, draft.set)
    said = json.dumps([_checked(workspace, values), photos.signature()], sort_keys=True)
    return values, RunRecord(workspace.runs / REHEARSALS / hashlib.sha256(said.encode()).hexdigest()[:20])


def _checked(workspace: Workspace, values: Options) -> Options:
    from webui.work import options as checked

    checked.build(workspace, "subject", values)
    return checked.cleaned(workspace, "subject", values)


def start_dry_run(context: AppContext, workspace: Workspace, stored: dict[str, Any]) -> None:
    """Have a dry run measure what the draft's run takes, unless one does already, or has.

    Raises: InputError for what cannot be used.
    """
    from webui import launching

    values, record = dry_run_of(context, workspace, stored)
    if costs.is_measuring(record) or costs.is_measured(record):
        return
    if record.path.exists():
        shutil.rmtree(record.path)
    launching.start_dry_run(workspace, "subject", values, record.path)
