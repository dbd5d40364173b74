"""Classify, part 4: a live answer for one image, predictions for many, corrections, and training again with them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import Markup

from pipelines.errors import InputError
from pipelines.fewshot.sources import DatasetSource, ImageFile
from pipelines.image_formats import UPLOAD_SUFFIXES
from training.options.values import merged
from training.runs.record import RunRecord
from webui import launching
from webui.classifiers import named_source, result_of, share, view_of, write_table
from webui.context import QUIET, AppContext
from webui.datasets import Dataset
from webui.inference_worker import WORKER
from webui.labelled_datasets import EXAMPLES, dataset_of_run, uploaded_classes
from webui.render import parts, tile
from webui.screens.classify_result import macros, method_choices, pending
from webui.tasks import fitted
from webui.uploads import Added, add_images
from webui.workspace import Workspace

MOST, LIVE_TOP, RIGHT = 100, 5, ""
# Options that depend on the images of one run; a run with other images does not take them over.
DATASET_OPTIONS = ("data_dir", "dataset", "class_names", "shots", "test_share")
ASK = parts.note("Drop, paste or photograph something: the answer appears here.")
GONE = "The training images of this run are gone. Choose or upload images under Images and train again."
INTRO = "An image that belongs to none of the classes is still assigned to one of them."
AGAIN = (
    "Where a prediction is wrong, choose the true class below the image. The corrected images become training images. The new "
    "classifier is tested on the same images as this one, so the two accuracies can be compared."
)
DEVICE = {"api_visibility": "private", "concurrency_id": "device", "concurrency_limit": 1}


def build(app: AppContext, run: gr.Dropdown, opened: gr.State) -> None:
    """Put the part into the open tab.

    Args:
        run: the classifiers.
        opened: changes when the part is opened, or another classifier is selected.
    """
    _Use(app, run, opened)


class _Use:
    """The components and event handlers of the part."""

    def __init__(self, app: AppContext, run: gr.Dropdown, opened: gr.State) -> None:
        self.app, self.run, seen = app, run, gr.State(None)
        empty = gr.HTML(pending(None), elem_id="classify-new-empty")
        with gr.Column(visible=False) as content:
            self._lay_out()
        outputs = [empty, content, self.method, self.live, self.answer, self.rows, self.table, seen]
        opened.change(self.refresh, [run, seen], outputs, **QUIET)
        events, given = [self.live.change, self.method.input], [run, self.method, self.live]
        gr.on(events, self.classify_one, given, self.answer, trigger_mode="always_last", **DEVICE)
        events, given = (
            [self.files.upload, self.files.clear, self.files.delete, self.method.input],
            [run, self.method, self.files],
        )
        gr.on(events, self.classify, given, [self.rows, self.table], show_progress="minimal", **DEVICE)

    def _lay_out(self) -> None:
        self.method = gr.Dropdown(label="Method", info=INTRO, filterable=False, interactive=True, elem_id="classify-new-method")
        with gr.Row(equal_height=False):
            named = {"label": "One image", "type": "filepath", "height": 300, "min_width": 280, "elem_id": "classify-live"}
            self.live = gr.Image(sources=["upload", "webcam", "clipboard"], **named)
            with gr.Column(min_width=280):
                self.answer = gr.HTML(ASK, elem_id="classify-answer")
        named = {"file_types": list(UPLOAD_SUFFIXES), "height": 140, "elem_id": "classify-new-files"}
        self.files = gr.File(label="Many images", file_count="multiple", **named)
        self.rows = gr.State([])
        gr.render(inputs=[self.rows, self.run], triggers=[self.rows.change], show_progress="hidden")(self.render_cards)
        self.table = gr.DownloadButton("Table of predictions (CSV)", visible=False, elem_id="classify-new-table")

    def refresh(self, run_id: str | None, before: Any, request: gr.Request) -> list[Any]:
        """Show the classifier, without the predictions of another one."""
        view = view_of(self.app.settings.workspace(request), run_id)
        result = None if view is None else result_of(view.record)
        now = view and (view.id, view.state)
        if now == before and now is not None:
            return [gr.skip()] * 8
        if result is None:
            return [gr.HTML(pending(view), visible=True), gr.Column(visible=False), *[gr.skip()] * 5, now]
        choices, hidden = method_choices(result, list(result.same_split())), gr.DownloadButton(visible=False)
        return [gr.HTML(visible=False), gr.Column(visible=True), choices, None, gr.skip(), [], hidden, now]

    def classify_one(self, run_id: str, trial: str | None, file: str | None, request: gr.Request) -> Markup:
        """The likeliest classes of the one image."""
        if file is None:
            return ASK
        (row,) = WORKER.call("classify", self.app.settings.workspace(request).run(run_id), [file], trial, LIVE_TOP)
        return prediction(row, "large")

    def classify(self, run_id: str, trial: str | None, files: list[str] | None, request: gr.Request) -> tuple[Any, ...]:
        """The predictions for many images, and a table of them."""
        if len(files or []) > MOST:
            raise InputError(f"At most {MOST} images can be classified at once, got {len(files)}. Choose fewer.")
        if not files:
            return [], gr.DownloadButton(visible=False)
        rows = WORKER.call("classify", self.app.settings.workspace(request).run(run_id), files, trial)
        has_table = any("class" in row for row in rows)
        table = gr.DownloadButton(value=write_table(table_of(rows)) if has_table else None, visible=has_table)
        return [{**row, "file": file} for row, file in zip(rows, files, strict=True)], table

    def render_cards(self, rows: list[dict[str, Any]], run_id: str | None, request: gr.Request) -> None:
        """A card for each image with a field for its true class; rendered again when the predictions change."""
        if not rows:
            return
        classes = result_of(self.app.settings.workspace(request).run(run_id)).classes
        answers: list[gr.Dropdown] = []
        with gr.Row(equal_height=False, elem_id="classify-predictions"):
            for row in rows:
                with gr.Column(min_width=240, elem_classes="prediction-card"):
                    gr.HTML(card(row))
                    if "class" in row:
                        choices = [(f"correct: {row['class']}", RIGHT), *(one for one in classes if one != row["class"])]
                        named = {"label": "True class", "interactive": True, "elem_id": f"classify-correct-{len(answers)}"}
                        answers.append(gr.Dropdown(choices, value=RIGHT, **named))
        if answers:
            gr.HTML(parts.note(AGAIN))
            again = gr.Button("Add the corrected images and train again", variant="primary", elem_id="classify-again")
            draft, outputs = self.app.class_draft, [self.app.class_draft, *self.app.outputs]
            inputs = [self.run, draft, self.rows, *answers]
            again.click(self.train_again, inputs, outputs, api_visibility="private", concurrency_limit=1)

    def train_again(self, run_id: str, draft: Any, rows: list[dict[str, Any]], request: gr.Request, *answers: str) -> list[Any]:
        """Start a run with the images whose true class was given, and show its progress."""
        workspace = self.app.settings.workspace(request)
        corrected: dict[str, list[Path]] = {}
        for row, name in zip((row for row in rows if "class" in row), answers, strict=True):
            if name != RIGHT:
                corrected.setdefault(name, []).append(Path(row["file"]))
        set_id, new = train_again(workspace, workspace.run(run_id), corrected)
        return [{**draft, "set": set_id}, *self.app.show(workspace, new, "train")]


def prediction(row: Mapping[str, Any], css: str = "") -> Markup:
    """The most likely classes of an image as bars, and how it was read; or why it could not be."""
    if "error" in row:
        return parts.warning(row["error"])
    bars = macros.bars([(name, value, share(value), "") for name, value in row["top"]], True, css)
    return bars + Markup("").join(map(parts.note, row.get("notes", ())))


def card(row: Mapping[str, Any]) -> Markup:
    """An image with its name and its most likely classes."""
    if "error" in row:
        return prediction(row)
    file = Path(row["file"])
    shown_image = tile(ImageFile(file.name, file.parent), row["image"])
    return parts.tiles([(shown_image, row["image"])]) + prediction(row)


def table_of(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A header, and a row for each image that was classified, with the likeliest classes and their probabilities."""
    classified = [row for row in rows if "class" in row]
    head = [word for rank, _ in enumerate(classified[0]["top"], 1) for word in (f"class {rank}", f"probability {rank}")]
    named = [(row["image"], [word for name, value in row["top"] for word in (name, f"{value:.6g}")]) for row in classified]
    return [["image", *head], *([name, *words] for name, words in named)]


def train_again(workspace: Workspace, record: RunRecord, files: Mapping[str, Sequence[Path]]) -> tuple[str, str]:
    """Add images labelled by the user to the training images of a run, and start a run with the same options.

    The images are added to the uploaded dataset that the run used. Examples and local folders are never changed: the images
    that the run used are copied to a new dataset first. The new run keeps the test images of the old one and trains on all
    others.

    Args:
        files: the corrected images by the name of their class.
    Returns: the ids of the dataset and of the run.
    Raises: InputError if the run's images are gone, or no image was corrected.
    """
    if not any(files.values()):
        raise InputError("No image was corrected. Choose the true class below an image that was classified wrongly.")
    if result_of(record) is None:
        raise InputError("This run is not done yet. Wait until it is.")
    dataset = _dataset_to_correct(workspace, record)
    folders, added = {one.name: one.folder for one in dataset.content().classes}, Added()
    if missing := [name for name in files if name not in folders]:
        raise InputError(f"The class {missing[0]} is no longer in the dataset. Add it again under Images.")
    for name, paths in files.items():
        added.extend(add_images(dataset, paths, folders[name], "train"))
    if not added.names:
        raise InputError(f"None of the images could be added: {added.refused[0]}")
    options = launching.duplicate(workspace, record.path.name)
    data = {name: value for name, value in options.get("data", {}).items() if name not in DATASET_OPTIONS}
    all_images = {"data": {"shots": ["all"]}}
    values = fitted(uploaded_classes(dataset), merged({**options, "data": data}, all_images), all_images)
    return dataset.folder.name, launching.start(workspace, "classify", values)


def _dataset_to_correct(workspace: Workspace, record: RunRecord) -> Dataset:
    """The uploaded dataset that the run used; for any other dataset, a new one with copies of its images."""
    set_id = dataset_of_run(workspace, record)
    if set_id is not None and set_id not in EXAMPLES:
        dataset = Dataset.of(workspace, set_id)
        if dataset.content().local_folder is None:
            return dataset
    return copied_dataset(workspace, record)


def copied_dataset(workspace: Workspace, record: RunRecord) -> Dataset:
    """Copy the images that a run used to a new dataset with the same test split. Raises: InputError if they are gone."""
    trial = result_of(record).trial
    split = json.loads((record.path / "splits" / f"{trial.shots}-shots-seed-{trial.seed}.json").read_text(encoding="utf-8"))
    names = dict(zip(split["keys"], result_of(record).classes, strict=False))
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


def _source(record: RunRecord, name: str) -> DatasetSource:
    try:
        source = named_source(record, name)
    except (InputError, OSError) as error:
        raise InputError(GONE) from error
    if source is None:
        raise InputError(GONE)
    return source
