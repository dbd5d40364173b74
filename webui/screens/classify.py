"""The screen Classify: its parts for images and training, beside those of `classify_result`. Train shows the progress."""

from __future__ import annotations

import html
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import Markup

from pipelines.errors import InputError
from pipelines.fewshot.layouts import counted
from pipelines.image_formats import UPLOAD_SUFFIXES
from webui import panel
from webui.classifiers import share
from webui.context import QUIET, SAVING, AppContext, followed, take_files
from webui.datasets import Dataset
from webui.inference_worker import WORKER
from webui.labelled_datasets import EXAMPLES, LabelledClasses, point_to, titles, uploaded_dataset
from webui.render import macros, parts, small, tile
from webui.runs import views
from webui.screens.classify_result import CLASSIFIER, SCRIPT, ClassifierParts
from webui.tasks import ClassifierPlan
from webui.uploads import Added, add_images, add_zip
from webui.workspace import Workspace

INTRO = "Train an image classifier for your own classes from a few images of each."
classes_html = macros("classify_images.html", counted=counted, share=share, tile=tile, small=small)


def build(app: AppContext) -> None:
    """Put the screen into the open tab."""
    gr.HTML(parts.note(INTRO))
    with gr.Row():
        chosen = {"visible": False, "interactive": True, "min_width": 240}
        run = gr.Dropdown(label="Classifier", info="Result and Use show this classifier.", elem_id="classify-run", **chosen)
        method = gr.Dropdown(label="Method", info="Result and Use show this method.", elem_id="classify-method", **chosen)
    # Outside of the tabs, which count every component inside them.
    opened, draft_changed = gr.State(0.0), followed(app.class_draft)
    classifier = ClassifierParts(app, run, method, opened)
    with gr.Tabs(elem_id="classify-steps") as steps:
        with gr.Tab("1 Images", id="pictures", elem_id="classify-part-pictures"):
            _Images(app, steps.parent, steps)
        with gr.Tab("2 Train", id="train", elem_id="classify-part-train"):
            _build_train(app, steps, draft_changed, opened)
        with gr.Tab("3 Result", id="result", elem_id="classify-part-result"):
            classifier.build_result()
        with gr.Tab("4 Use", id="new", elem_id="classify-part-new"):
            classifier.build_use()
    classifier.connect()
    _follow(app, steps, run, opened)


def _follow(app: AppContext, steps: gr.Tabs, run: gr.Dropdown, opened: gr.State) -> None:
    """Keep the list of classifiers up to date, and show the classifier that is selected on other screens."""
    last_elsewhere, refreshed = gr.State(None), app.refreshes["classify"]

    def renew(elsewhere: str | None, chosen: str | None, before: str | None, request: gr.Request) -> list[Any]:
        runs = {view.id: view for view in views(app.settings.workspace(request)) if view.task == "classify"}
        is_new = elsewhere != before and elsewhere in runs
        part = gr.Tabs(selected="result") if is_new and runs[elsewhere].state == "done" else gr.skip()
        # The newest one, if none is chosen or it was deleted.
        value = next((run_id for run_id in (elsewhere if is_new else chosen, *runs) if run_id in runs), None)
        choices = [(view.label, run_id) for run_id, view in runs.items()]
        return [gr.Dropdown(choices, value=value, visible=bool(runs)), part, elsewhere]

    given, outputs = [app.class_run, run, last_elsewhere], [run, steps, last_elsewhere]
    gr.on([app.page.load, refreshed.click], renew, given, outputs, trigger_mode="multiple", **QUIET)
    gr.on([refreshed.click, steps.select, run.change], time.time, None, opened, trigger_mode="always_last", **QUIET)


def _build_train(app: AppContext, steps: gr.Tabs, draft_changed: gr.State, opened: gr.State) -> None:
    """Put the part with the training settings into the open tab."""
    draft, settings = app.class_draft, app.settings
    about = gr.HTML(elem_id="classify-about")
    widgets = panel.build_settings(ClassifierPlan, draft, settings.is_local, "classify")
    panel.build_plan(app, ClassifierPlan, draft, draft_changed, "classify")
    start = gr.Button("Train", variant="primary", size="lg", elem_id="classify-start")

    def describe(stored: dict[str, Any], request: gr.Request) -> tuple[Any, ...]:
        """The dataset and the settings of the next run."""
        plan = ClassifierPlan.of(settings.workspace(request), stored)
        return classes_html.about(titles(plan.workspace)[plan.key], plan.classes), *panel.settings_updates(plan)

    def begin(stored: dict[str, Any], request: gr.Request) -> list[Any]:
        plan = ClassifierPlan.of(settings.workspace(request), stored)
        return [gr.Tabs(selected="result"), *app.show(plan.workspace, plan.start(), "train")]

    app.show_while_open("classify", describe, draft, [about, *widgets], opened, draft_changed)
    start.click(begin, [draft], [steps, *app.outputs], api_visibility="private", concurrency_limit=1)


class _Images:
    """The part for images: choose or upload a dataset, see what the base model knows of it, edit its classes and images.

    Args:
        tab: of the screen.
        steps: the parts of the screen.
    """

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
        changed = [self.draft, self.open, self.message]
        zipped, fields = gr.File(visible="hidden", file_count="multiple"), [self.name, self.files]
        take_files(self.zip.upload, self.zip, zipped)
        self.redraw(zipped.change(self.add_zips, [self.draft, zipped], changed, trigger_mode="multiple", **SAVING).then)
        self.redraw(self.add.click(self.add_to_class, [self.draft, *fields], [*changed, *fields], **SAVING).then)
        pointing = [self.point.click, self.path.submit]
        self.redraw(gr.on(pointing, self.use_folder, [self.draft, self.path], [*changed, self.path], **SAVING).then)
        gr.on([self.cards.click, self.editor.click], self.show_class, [self.draft], [self.open, self.editor], **QUIET)
        self.redraw(self.editor.select(self.edit, [self.draft, self.open], changed, **QUIET).then)

    def _lay_out(self, is_local: bool) -> None:
        choices = [(title, name) for name, (title, _) in EXAMPLES.items()]
        self.set = gr.Dropdown(
            choices, value=choices[0][1], label="Dataset", elem_id="classify-set", filterable=False, interactive=True
        )
        self.summary = gr.HTML(elem_id="classify-summary")
        self.cards = gr.HTML(js_on_load=SCRIPT, elem_id="classify-classes")
        self.editor = gr.HTML(js_on_load=SCRIPT, apply_default_css=False, elem_id="classify-edit")
        self.go = gr.Button("Continue to Train", variant="primary", elem_id="classify-go-train")
        gr.HTML("<h3>Add your own images</h3>")
        with gr.Tabs(overflow_behavior="wrap"):
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
        classes = self.classes(stored, request)
        choices = [(title, set_id) for set_id, title in titles(self.app.settings.workspace(request)).items()]
        return [
            gr.Dropdown(choices, value=classes.id),
            classes_html.summary(classes, None),
            classes_html.cards(classes, None),
            classes_html.editor(classes, key),
            gr.Button(interactive=not classes.problems),
        ]

    def measure(self, stored: dict[str, Any], request: gr.Request) -> tuple[Markup, Markup]:
        """The summary and the class cards, with the zero-shot accuracy of the built-in model."""
        classes = self.classes(stored, request)
        # Not skipped otherwise: a late result for the previous dataset may have replaced the summary.
        has_two = sum(bool(one.images) for one in classes.classes) > 1
        accuracy = WORKER.call("zero_shot", classes) if has_two else None
        return classes_html.summary(classes, accuracy), classes_html.cards(classes, accuracy)

    def add_zips(self, stored: dict[str, Any], zipped: list[str], request: gr.Request) -> dict[Any, Any]:
        """Add the class folders of a zip."""
        (path,) = zipped
        return self._add(stored, lambda dataset: add_zip(dataset, path), request)

    def add_to_class(self, stored: dict[str, Any], name: str, files: list[str], request: gr.Request) -> dict[Any, Any]:
        """Add images to a class, a new one if there is none of this name. If they are refused, the fields stay as they are."""
        updates = self._add(stored, lambda dataset: add_images(dataset, files, dataset.add_class(name)), request)
        return updates | ({self.name: "", self.files: None} if self.draft in updates else {})

    def _add(self, stored: dict[str, Any], add: Callable[[Dataset], Added], request: gr.Request) -> dict[Any, Any]:
        """Call `add` for the draft's dataset if it was uploaded, else for a new one."""
        plan = self.plan(stored, request)
        dataset = uploaded_dataset(plan.workspace, plan.key)
        target = dataset or Dataset(plan.workspace.new_image_set())
        try:
            added = add(target)
        except InputError as error:
            if dataset is None:
                target.delete()
            return {self.message: parts.warning(str(error))}
        return {self.draft: {**stored, "set": target.id}, self.open: None, self.message: classes_html.upload(added)}

    def use_folder(self, stored: dict[str, Any], path: str, request: gr.Request) -> list[Any]:
        """Use a folder on this machine as a dataset."""
        return [{**stored, "set": point_to(self.app.settings.workspace(request), path)}, None, "", ""]

    def show_class(self, stored: dict[str, Any], event: gr.EventData, request: gr.Request) -> tuple[str | None, Markup]:
        """Open the class whose button was clicked; none for the button that closes it."""
        key = str(event.key) or None
        return key, classes_html.editor(self.classes(stored, request), key)

    def edit(self, stored: dict[str, Any], key: str | None, event: gr.EventData, request: gr.Request) -> list[Any]:
        """Rename or delete the open class, move or delete the chosen images of it, or delete the dataset."""
        plan = self.plan(stored, request)
        dataset = Dataset.of(plan.workspace, plan.key)
        if event.action != "rename":
            check_free(plan.workspace, dataset.folder)
        match event.action:
            case "rename":
                dataset.rename_class(key, str(event.fields["name"]))
            case "delete":
                dataset.delete()
                stored, key = {**stored, "set": None}, None
            case "remove_class":
                dataset.remove_class(key)
                key = None
            case "remove" | "move":
                existing = {image.file for image in dataset.content().class_in(key).images}
                files = [file for file in event.files if file in existing]
                if event.action == "remove":
                    dataset.remove(files)
                else:
                    dataset.move_to_class(files, event.fields["target"])
        return [stored, key, ""]

    def plan(self, stored: object, request: gr.Request) -> ClassifierPlan:
        """The next run with the draft that the browser stored."""
        return ClassifierPlan.of(self.app.settings.workspace(request), stored)

    def classes(self, stored: object, request: gr.Request) -> LabelledClasses:
        """The draft's dataset; without classes, and with a warning on the page, if its local folder can no longer be used."""
        plan = self.plan(stored, request)
        try:
            return plan.classes
        except InputError as error:
            gr.Warning(html.escape(str(error)), title="These images cannot be used")
            return LabelledClasses(plan.key, "folder", None, ())


def check_free(workspace: Workspace, folder: Path) -> None:
    """Raises: InputError if a queued or active run trains on the images in `folder`."""
    given = str(folder.absolute())
    for view in views(workspace):
        data = view.launch_options.get("data", {})
        if view.is_active and given in (data.get("data_dir"), *data.get("folders", ())):
            raise InputError("A run is training on these images. Wait until it is done, or stop it first.")
