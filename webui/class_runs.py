"""Start classifier runs: from a draft, or from a finished run and corrected images."""

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
from pipelines.text_files import write_text_atomically
from training.runs.record import RunRecord
from webui import class_presets, class_sets, panel
from webui.class_results import named_source, result_of
from webui.class_sets import SPLIT
from webui.context import AppContext
from webui.draft import Options, merged
from webui.image_datasets import add_class, read_set
from webui.labelled_classes import EXAMPLE
from webui.runs import RunView, views
from webui.uploads import add_images
from webui.workspace import Workspace

NEW_RUN = "NEW-RUN"
GONE = "The training images of this run are gone. Choose or upload images under Images and train again."
EMPTY_DRAFT: dict[str, Any] = {"set": None, "preset": class_presets.DEFAULT, "options": {}}
# Options that depend on the images of one run; a run with other images does not take them over.
DATASET_OPTIONS = ("data_dir", "dataset", "class_names", "shots", "test_share")


@dataclass(frozen=True)
class ClassifyContext:
    """State and components shared by the parts of the screen Classify.

    Args:
        app: the context of all screens.
        tab: the screen's own tab.
        steps: the tabs of its parts: "pictures", "train", "result" and "new".
        run: the id of the selected classifier, which Train, Result and Use show.
        draft: the settings of the next run, stored by the browser: {"set": id of the dataset or None, "preset", "options"}.
        draft_changed: a copy of `draft` whose change event follows it.
        classifiers: the titles and states of all classifiers; its change event updates the list.
        refresh_trigger: changes when a part is opened, another classifier is selected, or the classifier's state changes.
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
        """The options that the expert panel edits."""
        return panel.FieldSource(self.app, "classify", class_presets.CLASSIFY, self.draft, self.draft_changed, complete)


def classifiers(workspace: Workspace) -> list[RunView]:
    """All runs that train classifiers, newest first."""
    return [view for view in views(workspace) if view.task == "classify"]


def view_of(workspace: Workspace, run_id: str | None) -> RunView | None:
    """The classifier with this id; None if there is none."""
    try:
        view = RunView(workspace.run(run_id))
    except InputError:
        return None
    return view if view.task == "classify" else None


def set_of(workspace: Workspace, draft: object) -> str:
    """The id of a draft's dataset; if it is gone, the user's newest dataset, or the example."""
    datasets = class_sets.class_sets(workspace)
    wanted = draft.get("set") if isinstance(draft, dict) else None
    return wanted if wanted in (EXAMPLE, *datasets) else next(iter(datasets), EXAMPLE)


def complete(workspace: Workspace, draft: dict[str, Any], options: Options) -> Options:
    """The options of a run on the draft's dataset.

    Args:
        draft: as stored by the browser.
        options: the preset's and the user's options, merged.
    """
    chosen = draft.get("options") or {}
    return class_presets.completed(class_sets.find(workspace, set_of(workspace, draft)), options, chosen)


def values_of(context: ClassifyContext, workspace: Workspace, draft: dict[str, Any]) -> tuple[dict[str, Any], Options]:
    """The draft with the latest edits of the expert panel, and the options of its run.

    Raises: InputError if an option is invalid.
    """
    about = context.source()
    draft = about.with_pending_input(workspace, draft)
    options = merged(about.preset(draft).options(), draft.get("options") or {})
    return draft, complete(workspace, draft, options)


def start(context: ClassifyContext, workspace: Workspace, draft: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Start the run; returns the draft with the latest edits, and the run's id.

    Raises: InputError if an option is invalid or the dataset is not ready; no run is started then.
    """
    from webui import launching

    classes = class_sets.find(workspace, set_of(workspace, draft))
    if not class_sets.is_ready(classes):
        raise InputError(class_sets.warnings(classes)[0])
    if classes.kind == "own":
        class_sets.update_split(classes.data_dir)
    draft, values = values_of(context, workspace, draft)
    return draft, launching.start(workspace, "classify", values)


def command(context: ClassifyContext, workspace: Workspace, draft: dict[str, Any]) -> str:
    """The shell command that `start` runs.

    Raises: InputError if an option is invalid.
    """
    from webui import launching
    from webui.work import options as checked

    values = checked.cleaned(workspace, "classify", values_of(context, workspace, draft)[1])
    return launching.shown_command(launching.command("classify", values, workspace.runs / NEW_RUN))


def check_free(workspace: Workspace, folder: Path) -> None:
    """Raises: InputError if a queued or active run trains on the images in `folder`."""
    given = str(folder.absolute())
    for view in views(workspace):
        if view.is_active and view.launch_options.get("data", {}).get("data_dir") == given:
            raise InputError("A run is training on these images. Wait until it is done, or stop it first.")


def train_again(workspace: Workspace, record: RunRecord, files: Mapping[str, Sequence[Path]]) -> tuple[str, str]:
    """Add images labelled by the user to the training images of a run, and start a run with the same options.

    The images are added to the uploaded dataset that the run used. The example and local folders are never changed: the
    images that the run used are copied to a new dataset first. The new run keeps the test images of the old one and trains
    on all others.

    Args:
        files: the corrected images by the name of their class.
    Returns: the ids of the dataset and of the run.
    Raises: InputError if the run's images are gone, or no image was corrected.
    """
    from webui import launching

    if not any(files.values()):
        raise InputError("No image was corrected. Choose the true class below an image that was classified wrongly.")
    result = result_of(record)
    if result is None:
        raise InputError("This run is not done yet. Wait until it is.")
    folder = _folder_to_correct(workspace, record)
    _add_corrections(folder, files)
    options = launching.duplicate(workspace, record.path.name)
    data = {name: value for name, value in options.get("data", {}).items() if name not in DATASET_OPTIONS}
    values = class_presets.completed(
        class_sets.uploaded_set(folder),
        merged({**options, "data": data}, {"data": {"shots": ["all"]}}),
        {"data": {"shots": ["all"]}},
    )
    return folder.name, launching.start(workspace, "classify", values)


def _folder_to_correct(workspace: Workspace, record: RunRecord) -> Path:
    """The folder of the uploaded dataset that the run used; for any other dataset, a new folder with copies of its images."""
    set_id = class_sets.set_of_run(workspace, record)
    is_own = set_id not in (None, EXAMPLE) and class_sets.read_pointer(workspace.image_set(set_id)) is None
    return workspace.image_set(set_id) if is_own else copied_set(workspace, record)


def _add_corrections(folder: Path, files: Mapping[str, Sequence[Path]]) -> None:
    """Add the corrected images, by the name of their class, to the dataset in `folder`."""
    keys = {one.name: one.folder for one in read_set(folder).classes}
    missing = [name for name in files if name not in keys]
    if missing:
        raise InputError(f"The class {missing[0]} is no longer in the dataset. Add it again under Images.")
    added = class_sets.add_corrections(folder, {keys[name]: paths for name, paths in files.items()})
    if not added.names:
        raise InputError(f"None of the images could be added: {added.refused[0]}")


def copied_set(workspace: Workspace, record: RunRecord) -> Path:
    """Copy the images that a run used to a new dataset with the same test split; returns its folder.

    Raises: InputError if the images are gone.
    """
    split, names = _classifier_split(record)
    folder = workspace.new_image_set()
    try:
        parts = {part: _copied(record, folder, split[part], names) for part in ("test", "train", "val")}
        listed = {"train": parts["train"] + parts["val"], "test": parts["test"]}
        write_text_atomically(folder / SPLIT, json.dumps(listed, indent=1))
    except InputError:
        shutil.rmtree(folder)
        raise
    return folder


def _classifier_split(record: RunRecord) -> tuple[dict[str, list[list[Any]]], dict[str, str]]:
    """The split of the trial that was chosen as the run's classifier, and the class names by their keys."""
    result = result_of(record)
    shots, seed = result.trial.shots, result.trial.seed
    split = json.loads((record.path / "splits" / f"{shots}-shots-seed-{seed}.json").read_text(encoding="utf-8"))
    return split, dict(zip(split["keys"], result.classes, strict=False))


def _copied(record: RunRecord, folder: Path, listed: Iterable[Sequence[Any]], names: Mapping[str, str]) -> list[list[str]]:
    """Copy images of a run into a dataset; returns their new file names and class folders."""
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
