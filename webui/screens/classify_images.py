"""Classify, part 1: choose or upload a dataset, see what the base model knows of it, and edit its classes and images."""

from __future__ import annotations

import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import Markup

from pipelines.errors import InputError
from pipelines.fewshot.layouts import counted
from pipelines.image_formats import UPLOAD_SUFFIXES
from webui.classifiers import share
from webui.context import QUIET, AppContext
from webui.datasets import Dataset
from webui.draft import Draft
from webui.inference_worker import WORKER, ZeroShotAccuracy
from webui.labelled_datasets import (
    EXAMPLES,
    LabelledClasses,
    class_datasets,
    find_classes,
    point_to,
    rename_class,
    title,
    uploaded_dataset,
)
from webui.render import macros, parts, small, tile
from webui.runs import views
from webui.tasks import CLASSIFY
from webui.uploads import add_images, add_zip
from webui.workspace import Workspace

# Sends the clicks on the buttons of a template, for this screen's HTML: see there.
SCRIPT = Path(__file__).parents[1].joinpath("classify.js").read_text(encoding="utf-8")
SAVING = {"api_visibility": "private", "show_progress": "minimal"}
# Classification does not wait for the generation of images.
CLASSIFIER = {"concurrency_id": "classifier", "concurrency_limit": 1, "api_visibility": "private"}
classes_html = macros("classify_images.html", counted=counted, share=share, tile=tile, small=small)


def build(app: AppContext, tab: gr.Tab, steps: gr.Tabs) -> None:
    """Put the part into the open tab.

    Args:
        tab: of the screen.
        steps: the parts of the screen.
    """
    _Images(app, tab, steps)


class _Images:
    """The components and event handlers of the part."""

    def __init__(self, app: AppContext, tab: gr.Tab, steps: gr.Tabs) -> None:
        self.app, self.draft, self.open = app, app.class_draft, gr.State(None)
        self._lay_out(app.settings.is_local)
        self.dataset = [self.set, self.summary, self.cards, self.editor, self.go]
        self.redraw(tab.select)
        choose, chosen = (lambda stored, set_id: ({**stored, "set": set_id}, None)), [self.draft, self.open]
        self.redraw(self.set.input(choose, [self.draft, self.set], chosen, **QUIET).then)
        self.go.click(lambda: gr.Tabs(selected="train"), None, [steps], **QUIET)
        # The field lists its files before they have arrived.
        self.files.change(lambda files: gr.Button(interactive=bool(files)), [self.files], [self.add], **QUIET)
        fields, changed = [self.zip, self.name, self.files], [self.draft, self.open, self.message]
        uploaded = gr.on([self.zip.upload, self.add.click], self.upload, [self.draft, *fields], [*changed, *fields], **SAVING)
        self.redraw(uploaded.then)
        pointing = [self.point.click, self.path.submit]
        self.redraw(gr.on(pointing, self.use_folder, [self.draft, self.path], [*changed, self.path], **SAVING).then)
        gr.on([self.cards.click, self.editor.click], self.show_class, [self.draft], [self.open, self.editor], **QUIET)
        self.redraw(self.editor.select(self.edit, [self.draft, self.open], changed, **QUIET).then)

    def _lay_out(self, is_local: bool) -> None:
        choices = [(title(None, one), one) for one in EXAMPLES]
        self.set = gr.Dropdown(
            choices, value=choices[0][1], label="Dataset", elem_id="classify-set", filterable=False, interactive=True
        )
        self.summary = gr.HTML(elem_id="classify-summary")
        self.cards = gr.HTML(js_on_load=SCRIPT, elem_id="classify-classes")
        self.editor = gr.HTML(js_on_load=SCRIPT, apply_default_css=False, elem_id="classify-edit")
        self.go = gr.Button("Continue to Train", variant="primary", elem_id="classify-go-train")
        gr.HTML("<h3>Add your own images</h3>")
        with gr.Tabs():
            with gr.Tab("Zip of class folders"):
                gr.HTML(parts.note("One folder per class, named after the class, with its images inside."))
                self.zip = gr.File(label="Zip file", file_types=[".zip"], height=140, elem_id="classify-zip")
            with gr.Tab("One class at a time"):
                self.name = gr.Textbox(label="Class name", placeholder="e.g. red mug", max_lines=1, elem_id="classify-class-name")
                accepted = {"file_count": "multiple", "file_types": list(UPLOAD_SUFFIXES), "height": 140}
                self.files = gr.File(label="Images of this class", elem_id="classify-class-files", **accepted)
                self.add = gr.Button("Add images", interactive=False, elem_id="classify-add")
            with gr.Tab("Local folder", visible=is_local):
                info = "A folder on this machine with one subfolder per class."
                self.path = gr.Textbox(label="Folder", info=info, max_lines=1, elem_id="classify-folder")
                self.point = gr.Button("Use this folder", elem_id="classify-use-folder")
        self.message = gr.HTML(elem_id="classify-message")

    def redraw(self, event: Callable[..., Any]) -> None:
        """At `event`, show the draft's dataset, then the zero-shot accuracy."""
        updated = event(self.show_dataset, [self.draft, self.open], self.dataset, **QUIET)
        updated.then(self.measure, [self.draft], [self.summary, self.cards], show_progress="hidden", **CLASSIFIER)

    def show_dataset(self, stored: dict[str, Any], key: str | None, request: gr.Request) -> list[Any]:
        """Updates of the components that show the draft's dataset and its class `key`, without the zero-shot accuracy."""
        workspace = self.app.settings.workspace(request)
        classes = _classes_or_none(workspace, stored)
        choices = [(title(workspace, one), one) for one in (*EXAMPLES, *class_datasets(workspace))]
        return [
            gr.Dropdown(choices, value=classes.id),
            summary(classes, None),
            classes_html.cards(classes, None),
            classes_html.editor(classes, key),
            gr.Button(interactive=classes.is_ready),
        ]

    def measure(self, stored: dict[str, Any], request: gr.Request) -> tuple[Markup, Markup]:
        """The summary and the class cards, with the zero-shot accuracy of the built-in model."""
        classes = _classes_or_none(self.app.settings.workspace(request), stored)
        # Not skipped otherwise: a late result for the previous dataset may have replaced the summary.
        has_two = sum(bool(one.images) for one in classes.classes) > 1
        accuracy = WORKER.call("zero_shot", classes) if has_two else None
        return summary(classes, accuracy), classes_html.cards(classes, accuracy)

    def upload(
        self, stored: dict[str, Any], zipped: str | None, name: str, files: list[str] | None, request: gr.Request
    ) -> list[Any]:
        """Add the class folders of a zip, or images to a class: to the draft's dataset if it was uploaded, else to a new one.

        The zip is taken out of its field whether it can be used or not. If images are refused, the fields stay as they are.
        """
        if not zipped and not files:
            return [gr.skip()] * 6
        workspace = self.app.settings.workspace(request)
        dataset = uploaded_dataset(workspace, set_of(workspace, stored))
        target = dataset or Dataset(workspace.new_image_set())
        try:
            added = add_zip(target, zipped) if zipped else add_images(target, files, target.add_class(name))
        except InputError as error:
            if dataset is None:
                target.delete()
            return [gr.skip(), gr.skip(), parts.warning(str(error)), None, gr.skip(), gr.skip()]
        emptied = [None, gr.skip(), gr.skip()] if zipped else [gr.skip(), "", None]
        return [{**stored, "set": target.folder.name}, None, classes_html.upload(added), *emptied]

    def use_folder(self, stored: dict[str, Any], path: str, request: gr.Request) -> list[Any]:
        """Use a folder on this machine as a dataset."""
        return [{**stored, "set": point_to(self.app.settings.workspace(request), path)}, None, "", ""]

    def show_class(self, stored: dict[str, Any], event: gr.EventData, request: gr.Request) -> tuple[str | None, Markup]:
        """Open the class whose button was clicked; none for the button that closes it."""
        key = str(event.key) or None
        return key, classes_html.editor(_classes_or_none(self.app.settings.workspace(request), stored), key)

    def edit(self, stored: dict[str, Any], key: str | None, event: gr.EventData, request: gr.Request) -> list[Any]:
        """Rename or delete the open class, move or delete the chosen images of it, or delete the dataset."""
        workspace = self.app.settings.workspace(request)
        dataset, action = Dataset.of(workspace, set_of(workspace, stored)), event.action
        if action == "rename":
            rename_class(dataset, key, str(event.fields["name"]))
            return [stored, key, ""]
        check_free(workspace, dataset.folder)
        if action == "delete":
            dataset.delete()
            return [{**stored, "set": None}, None, ""]
        if action == "remove_class":
            dataset.remove_class(key)
            return [stored, None, ""]
        existing = {image.file for image in dataset.content().class_in(key).images}
        files = [file for file in event.files if file in existing]
        if action == "remove":
            dataset.remove(files)
        elif action == "move":
            for file in files:
                dataset.move_to_class(file, event.fields["target"])
        return [stored, key, ""]


def set_of(workspace: Workspace, stored: object) -> str:
    """The id of a stored draft's dataset; if it is gone, the user's newest dataset, or the first example."""
    return CLASSIFY.key(workspace, Draft.from_browser(stored))


def check_free(workspace: Workspace, folder: Path) -> None:
    """Raises: InputError if a queued or active run trains on the images in `folder`."""
    given = str(folder.absolute())
    for view in views(workspace):
        if view.is_active and view.launch_options.get("data", {}).get("data_dir") == given:
            raise InputError("A run is training on these images. Wait until it is done, or stop it first.")


def _classes_or_none(workspace: Workspace, stored: dict[str, Any]) -> LabelledClasses:
    """The draft's dataset; without classes, and with a warning on the page, if its local folder can no longer be used."""
    set_id = set_of(workspace, stored)
    try:
        return find_classes(workspace, set_id)
    except InputError as error:
        gr.Warning(html.escape(str(error)), title="These images cannot be used")
        return LabelledClasses(set_id, "folder", None, ())


def summary(classes: LabelledClasses, accuracy: ZeroShotAccuracy | None) -> Markup:
    """The number of classes and images, the zero-shot accuracy of the built-in model, and warnings."""
    warnings = [] if classes.kind == "example" else [*classes.warnings(), *classes.duplicates()]
    return classes_html.summary(classes, accuracy, warnings)
