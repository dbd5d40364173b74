"""From the draft of a classifier to its options, its command and the run itself; and from a run to the next, with corrections."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from pipelines.errors import InputError
from training.runs.durable import write_text_atomically
from training.runs.record import RunRecord
from webui import class_presets, class_sets, panel
from webui.app_context import AppContext
from webui.class_results import named_source, result_of
from webui.class_sets import SPLIT
from webui.draft import Options, merged
from webui.image_datasets import add_class, read_set
from webui.labelled_classes import EXAMPLE
from webui.uploads import add_images
from webui.views import RunView, views
from webui.workspace import Workspace

NEW_RUN = "NEW-RUN"
GONE = "The images that this run learned from are no longer there. Train with your own under Images."
EMPTY_DRAFT: dict[str, Any] = {"set": None, "preset": class_presets.DEFAULT, "options": {}}
# What belongs to the images of one run alone.
OF_ITS_IMAGES = ("data_dir", "dataset", "class_names", "shots", "test_share")


@dataclass(frozen=True)
class ClassifyContext:
    """What the parts of the screen Classify share.

    Args:
        app: the context of all screens.
        tab: the screen's own tab.
        steps: the tabs of its parts: "pictures", "train", "result" and "new".
        run: the id of the classifier that Train, Result and Classify new are about.
        draft: the settings of the next run, stored by the browser: {"set": id of its images or None, "preset", "options"}.
        draft_changed: a copy of `draft` whose change event follows it.
        classifiers: the titles and states of all classifiers, whose change event says when to read them again.
        refresh_trigger: changes whenever a part may have something new to show: it was opened, another classifier was chosen,
            or the classifier's state changed.
    """

    app: AppContext
    tab: gr.Tab
    steps: gr.Tabs
    run: gr.Dropdown
    draft: gr.BrowserState
    draft_changed: gr.State
    classifiers: gr.State
    refresh_trigger: gr.State

    def source(self) -> panel.FieldSource:
        """What the expert panel is about."""
        return panel.FieldSource(self.app, "classify", class_presets.CLASSIFY, self.draft, self.draft_changed, complete)


def classifiers(workspace: Workspace) -> list[RunView]:
    """All runs that train classifiers, newest first."""
    return [view for view in views(workspace) if view.task == "classify"]


def view_of(workspace: Workspace, run_id: str | None) -> RunView | None:
    """The classifier of that id; None for none, or one that is gone by now."""
    try:
        view = RunView(workspace.run(run_id))
    except InputError:
        return None
    return view if view.task == "classify" else None


def set_of(workspace: Workspace, draft: object) -> str:
    """The id of the set that a draft is about: the one it names, if it is there, else the user's newest, else the example."""
    datasets = class_sets.class_sets(workspace)
    wanted = draft.get("set") if isinstance(draft, dict) else None
    return wanted if wanted in (EXAMPLE, *datasets) else next(iter(datasets), EXAMPLE)


def complete(workspace: Workspace, draft: dict[str, Any], options: Options) -> Options:
    """All that a run is started with, from what the browser kept and the options in force."""
    chosen = draft.get("options") or {}
    return class_presets.completed(class_sets.find(workspace, set_of(workspace, draft)), options, chosen)


def values_of(context: ClassifyContext, workspace: Workspace, draft: dict[str, Any]) -> tuple[dict[str, Any], Options]:
    """The draft with what was typed last, and all that its run is started with.

    Raises: InputError for what cannot be used.
    """
    about = context.source()
    draft = about.settled(workspace, draft)
    options = merged(about.preset(draft).options(), draft.get("options") or {})
    return draft, complete(workspace, draft, options)


def start(context: ClassifyContext, workspace: Workspace, draft: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Start the run; returns the draft, with what was typed last, and the run's id.

    Raises: InputError for what cannot be used; then nothing was started.
    """
    from webui import launching

    classes = class_sets.find(workspace, set_of(workspace, draft))
    if not class_sets.is_ready(classes):
        raise InputError(class_sets.warnings(classes)[0])
    if classes.kind == "own":
        class_sets.settle(classes.data_dir)
    draft, values = values_of(context, workspace, draft)
    return draft, launching.start(workspace, "classify", values)


def command(context: ClassifyContext, workspace: Workspace, draft: dict[str, Any]) -> str:
    """The command that `start` runs, as one writes it.

    Raises: InputError for what cannot be used.
    """
    from webui import launching
    from webui.work import options as checked

    values = checked.cleaned(workspace, "classify", values_of(context, workspace, draft)[1])
    return launching.shown_command(launching.command("classify", values, workspace.runs / NEW_RUN))


def check_free(workspace: Workspace, folder: Path) -> None:
    """Raises: InputError if a run is about to learn from the images in `folder`, or is learning from them."""
    given = str(folder.absolute())
    for view in views(workspace):
        if view.is_active and view.launch.get("options", {}).get("data", {}).get("data_dir") == given:
            raise InputError("A run is learning from these images. Wait until it is done, or stop it first.")


def train_again(workspace: Workspace, record: RunRecord, files: Mapping[str, Sequence[Path]]) -> tuple[str, str]:
    """Add images whose class the user has said to those that a run learned from, and start a run like it.

    They go into the user's own set that the run was trained on. The example and folders of the machine stay as they are: of
    what the run used of them a set of the user's own is made. The new run is tested on the same images as the old one, and
    learns from all others.

    Args:
        files: the corrected images by the name of their class.
    Returns: the ids of the set and of the run.
    Raises: InputError if the run's images are no longer there, or none was corrected.
    """
    from webui import launching

    if not any(files.values()):
        raise InputError("No image was corrected yet. Choose the right class below one that was taken for another.")
    result = result_of(record)
    if result is None:
        raise InputError("This run is not done yet. Wait until it is.")
    folder = _folder_to_correct(workspace, record)
    _add_corrections(folder, files)
    options = launching.duplicate(workspace, record.path.name)
    data = {name: value for name, value in options.get("data", {}).items() if name not in OF_ITS_IMAGES}
    values = class_presets.completed(
        class_sets.own_set(folder), merged({**options, "data": data}, {"data": {"shots": ["all"]}}), {"data": {"shots": ["all"]}}
    )
    return folder.name, launching.start(workspace, "classify", values)


def _folder_to_correct(workspace: Workspace, record: RunRecord) -> Path:
    """The user's own set that the run was trained on, or a new one with what the run used of another."""
    set_id = class_sets.set_of_run(workspace, record)
    is_own = set_id not in (None, EXAMPLE) and class_sets.read_pointer(workspace.image_set(set_id)) is None
    return workspace.image_set(set_id) if is_own else copied_set(workspace, record)


def _add_corrections(folder: Path, files: Mapping[str, Sequence[Path]]) -> None:
    """Add the corrected images, by the name of their class, to the set in `folder`."""
    keys = {one.name: one.folder for one in read_set(folder).classes}
    missing = [name for name in files if name not in keys]
    if missing:
        raise InputError(f"The class {missing[0]} is no longer among the images. Add it again under Images.")
    added = class_sets.add_corrections(folder, {keys[name]: paths for name, paths in files.items()})
    if not added.names:
        raise InputError(f"None of the images could be added: {added.refused[0]}")


def copied_set(workspace: Workspace, record: RunRecord) -> Path:
    """A set of the user's own with the images that a run used, the tested ones tested on for good; returns its folder.

    Raises: InputError if the images are no longer there.
    """
    split, names = _drawn_split(record)
    folder = workspace.new_image_set()
    try:
        parts = {part: _copied(record, folder, split[part], names) for part in ("test", "train", "val")}
        listed = {"train": parts["train"] + parts["val"], "test": parts["test"]}
        write_text_atomically(folder / SPLIT, json.dumps(listed, indent=1))
    except InputError:
        shutil.rmtree(folder)
        raise
    return folder


def _drawn_split(record: RunRecord) -> tuple[dict[str, list[list[Any]]], dict[str, str]]:
    """What the classifier that stands for a run learned from and was tested on, and the names of its classes by their keys."""
    result = result_of(record)
    shots, seed = result.trial["shots"], result.trial["seed"]
    split = record.read_json(f"splits/{shots}-shots-seed-{seed}.json")
    return split, dict(zip(split["keys"], result.classes, strict=False))


def _copied(record: RunRecord, folder: Path, listed: Iterable[Sequence[Any]], names: Mapping[str, str]) -> list[list[str]]:
    """Copy images of a run into a set; returns what they are called there, with the folders of their classes."""
    by_class: dict[str, list[str]] = {}
    for name, _, key in listed:
        by_class.setdefault(key, []).append(name)
    copies = []
    for key, paths in by_class.items():
        made = add_class(folder, names.get(key, key))
        with tempfile.TemporaryDirectory() as scratch:
            files = []
            for position, name in enumerate(paths):
                files.append(Path(scratch) / f"{position:06d}{Path(name).suffix}")
                files[-1].write_bytes(_content(record, name))
            copies += [[name, made] for name in add_images(folder, files, made).names]
    return copies


def _content(record: RunRecord, name: str) -> bytes:
    try:
        source = named_source(record, name)
        if source is not None:
            return source.content()
    except (InputError, OSError) as error:
        raise InputError(GONE) from error
    raise InputError(GONE)
