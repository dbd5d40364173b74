"""Start classifier runs: from a draft, or from a finished run and corrected images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from pipelines.errors import InputError
from pipelines.fewshot.sources import DatasetSource
from training.runs.record import RunRecord
from webui import class_presets, panel
from webui.class_results import named_source, result_of
from webui.context import AppContext
from webui.datasets import Dataset
from webui.draft import Options, merged
from webui.labelled_datasets import EXAMPLE, class_datasets, dataset_of_run, find_classes, uploaded_classes
from webui.runs import RunView, views
from webui.uploads import Added, add_images
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
    datasets = class_datasets(workspace)
    wanted = draft.get("set") if isinstance(draft, dict) else None
    return wanted if wanted in (EXAMPLE, *datasets) else next(iter(datasets), EXAMPLE)


def complete(workspace: Workspace, draft: dict[str, Any], options: Options) -> Options:
    """The options of a run on the draft's dataset.

    Args:
        draft: as stored by the browser.
        options: the preset's and the user's options, merged.
    """
    chosen = draft.get("options") or {}
    return class_presets.completed(find_classes(workspace, set_of(workspace, draft)), options, chosen)


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

    classes = find_classes(workspace, set_of(workspace, draft))
    if not classes.is_ready:
        raise InputError(classes.warnings()[0])
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
    dataset = _dataset_to_correct(workspace, record)
    _add_corrections(dataset, files)
    options = launching.duplicate(workspace, record.path.name)
    data = {name: value for name, value in options.get("data", {}).items() if name not in DATASET_OPTIONS}
    values = class_presets.completed(
        uploaded_classes(dataset),
        merged({**options, "data": data}, {"data": {"shots": ["all"]}}),
        {"data": {"shots": ["all"]}},
    )
    return dataset.folder.name, launching.start(workspace, "classify", values)


def _dataset_to_correct(workspace: Workspace, record: RunRecord) -> Dataset:
    """The uploaded dataset that the run used; for any other dataset, a new one with copies of its images."""
    set_id = dataset_of_run(workspace, record)
    if set_id not in (None, EXAMPLE):
        dataset = Dataset.of(workspace, set_id)
        if dataset.content().local_folder is None:
            return dataset
    return copied_dataset(workspace, record)


def _add_corrections(dataset: Dataset, files: Mapping[str, Sequence[Path]]) -> None:
    """Add the corrected images, by the name of their class, to the training images of a dataset."""
    folders = {one.name: one.folder for one in dataset.content().classes}
    missing = [name for name in files if name not in folders]
    if missing:
        raise InputError(f"The class {missing[0]} is no longer in the dataset. Add it again under Images.")
    added = Added()
    for name, paths in files.items():
        added.extend(add_images(dataset, paths, folders[name], "train"))
    if not added.names:
        raise InputError(f"None of the images could be added: {added.refused[0]}")


def copied_dataset(workspace: Workspace, record: RunRecord) -> Dataset:
    """Copy the images that a run used to a new dataset with the same test split.

    Raises: InputError if the images are gone.
    """
    split, names = _classifier_split(record)
    dataset = Dataset(workspace.new_image_set())
    try:
        for part in ("test", "train", "val"):
            by_class: dict[str, list[DatasetSource]] = {}
            for name, _, key in split[part]:
                by_class.setdefault(key, []).append(_source(record, name))
            for key, sources in by_class.items():
                folder = dataset.add_class(names.get(key, key))
                added = add_images(dataset, sources, folder, "test" if part == "test" else "train")
                if added.refused:
                    raise InputError(f"{GONE} {added.refused[0]}")
    except InputError:
        dataset.delete()
        raise
    return dataset


def _classifier_split(record: RunRecord) -> tuple[dict[str, list[list[Any]]], dict[str, str]]:
    """The split of the trial that was chosen as the run's classifier, and the class names by their keys."""
    result = result_of(record)
    shots, seed = result.trial.shots, result.trial.seed
    split = json.loads((record.path / "splits" / f"{shots}-shots-seed-{seed}.json").read_text(encoding="utf-8"))
    return split, dict(zip(split["keys"], result.classes, strict=False))


def _source(record: RunRecord, name: str) -> DatasetSource:
    try:
        source = named_source(record, name)
    except (InputError, OSError) as error:
        raise InputError(GONE) from error
    if source is None:
        raise InputError(GONE)
    return source
