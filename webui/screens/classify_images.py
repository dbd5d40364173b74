"""Classify, part 1: choose or upload a dataset, see what the base model knows of it, and edit its classes and images."""

from __future__ import annotations

import html
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import Markup

from pipelines.errors import InputError
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
)
from webui.render import parts as shared
from webui.render import small, tile
from webui.runs import views
from webui.screens.classify_result import macros
from webui.tasks import CLASSIFY
from webui.uploads import Added, add_images, add_zip
from webui.workspace import Workspace

MOST_SHOWN, IN_CARD = 200, 8
NOTES = {
    "example": "This example comes with the app. Train on it to try everything out, or add your own images below.",
    "folder": "These images stay in their folder on this machine, which the app never changes.",
    "own": "Images that you add below join this dataset. To start another one, choose an example first.",
}
# Handles clicks on images: which are chosen is known to the page alone until a button needs it.
CHOOSE_JS = """element.addEventListener('change', () => {
  trigger('select', {files: [...element.querySelectorAll('input:checked')].map((box) => box.dataset.file)});
});"""
SAVING = {"api_visibility": "private", "show_progress": "minimal"}


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
        self.app, self.draft = app, app.class_draft
        self._lay_out_dataset(app.settings.is_local)
        self._lay_out_editing()
        self.dataset = [self.set, self.delete, self.confirm, self.summary, self.cards, self.class_, self.edit, self.go]
        self.editor = [self.name, self.grid, self.chosen, self.target, self.move, self.remove, self.rename, self.remove_class]
        app.page.load(self.list_sets, [self.draft], [self.set], **QUIET)
        self.redraw(tab.select(self.list_sets, [self.draft], [self.set], **QUIET))
        chosen = self.set.input(lambda set_id, draft: {**draft, "set": set_id}, [self.set, self.draft], [self.draft], **QUIET)
        self.redraw(chosen)
        self.go.click(lambda: gr.Tabs(selected="train"), None, [steps], **QUIET)
        self._wire_adding()
        self._wire_editing()

    def _lay_out_dataset(self, is_local: bool) -> None:
        choices = [(title(None, one), one) for one in EXAMPLES]
        self.set = gr.Dropdown(
            choices, value=choices[0][1], label="Dataset", elem_id="classify-set", filterable=False, interactive=True
        )
        self.summary = gr.HTML(elem_id="classify-summary")
        self.cards = gr.HTML(elem_id="classify-classes")
        self.go = gr.Button("Continue to Train", variant="primary", elem_id="classify-go-train")
        gr.HTML("<h3>Add your own images</h3>")
        with gr.Tabs():
            with gr.Tab("Zip of class folders"):
                gr.HTML(shared.note("One folder per class, named after the class, with its images inside."))
                self.zip = gr.File(label="Zip file", file_types=[".zip"], height=140, elem_id="classify-zip")
            with gr.Tab("One class at a time"):
                self.new_name = gr.Textbox(
                    label="Class name", placeholder="e.g. red mug", max_lines=1, elem_id="classify-class-name"
                )
                self.files = gr.File(
                    label="Images of this class",
                    file_count="multiple",
                    file_types=list(UPLOAD_SUFFIXES),
                    height=140,
                    elem_id="classify-class-files",
                )
                self.add = gr.Button("Add images", interactive=False, elem_id="classify-add")
            with gr.Tab("Local folder", visible=is_local):
                info = "A folder on this machine with one subfolder per class."
                self.path = gr.Textbox(label="Folder", info=info, max_lines=1, elem_id="classify-folder")
                self.point = gr.Button("Use this folder", elem_id="classify-use-folder")
        self.message = gr.HTML(elem_id="classify-message")

    def _lay_out_editing(self) -> None:
        with gr.Accordion("View and edit a class", open=False, elem_id="classify-edit") as self.edit:
            with gr.Row():
                self.class_ = gr.Dropdown(label="Class", elem_id="classify-class", interactive=True)
                self.name = gr.Textbox(label="New name", max_lines=1, elem_id="classify-rename-to")
            with gr.Row(elem_classes="buttons"):
                self.rename = gr.Button("Rename", size="sm", elem_id="classify-rename")
                self.remove_class = gr.Button("Delete class", size="sm", elem_id="classify-remove-class")
            self.grid = gr.HTML(js_on_load=CHOOSE_JS, apply_default_css=False, elem_id="classify-class-images")
            self.chosen, self.is_open = gr.State([]), gr.State(False)
            with gr.Row(elem_classes="buttons"):
                self.target = gr.Dropdown(label="Move to class", elem_id="classify-move-to", interactive=True, visible=False)
                self.move = gr.Button("Move", size="sm", elem_id="classify-move", visible=False)
                self.remove = gr.Button("Delete", size="sm", elem_id="classify-remove", visible=False)
        with gr.Row(elem_classes="buttons"):
            self.delete = gr.Button("Delete this dataset", size="sm", elem_id="classify-delete-set", visible=False)
        self.asked = gr.State("")
        with gr.Row(visible=False, elem_classes="buttons") as self.confirm:
            self.yes = gr.Button("Delete", variant="stop", elem_id="classify-delete-yes")
            self.no = gr.Button("Keep", elem_id="classify-delete-no")

    def _wire_adding(self) -> None:
        outputs = [self.draft, self.message]
        self.redraw(self.zip.upload(self.take_zip, [self.zip, self.draft], [*outputs, self.zip], **SAVING))
        # The field lists its files before they have arrived.
        self.files.change(lambda files: gr.Button(interactive=bool(files)), [self.files], [self.add], **QUIET)
        given = [self.new_name, self.files, self.draft]
        self.redraw(self.add.click(self.take_images, given, [*outputs, self.new_name, self.files], **SAVING))
        events = [self.point.click, self.path.submit]
        self.redraw(gr.on(events, self.use_folder, [self.path, self.draft], [*outputs, self.path], **SAVING))

    def _wire_editing(self) -> None:
        of_class = [self.class_, self.draft, self.is_open]
        self.class_.change(self.show_class, of_class, self.editor, **QUIET)
        self.edit.expand(lambda: True, None, [self.is_open], **QUIET).then(self.show_class, of_class, self.editor, **QUIET)
        self.edit.collapse(lambda: False, None, [self.is_open], **QUIET)
        self.grid.select(self.choose, [self.class_, self.draft], [self.chosen, self.target, self.move, self.remove], **QUIET)
        given = [self.class_, self.name, self.draft]
        self.redraw(gr.on([self.rename.click, self.name.submit], self.rename_class_to, given, [self.message], **QUIET))
        moved = self.move.click(self.move_chosen, [self.chosen, self.target, self.draft], [self.message], **QUIET)
        self.redraw(moved)
        for what, button in (("images", self.remove), ("class", self.remove_class), ("dataset", self.delete)):
            given = [gr.State(what), self.class_, self.chosen, self.draft]
            button.click(self.ask, given, [self.asked, self.confirm, self.yes], **QUIET)
        self.no.click(lambda: gr.Row(visible=False), None, [self.confirm], **QUIET)
        given = [self.asked, self.class_, self.chosen, self.draft]
        self.redraw(self.yes.click(self.delete_asked, given, [self.draft, self.message], **QUIET))

    def redraw(self, event: Any) -> None:
        """After `event`, show the draft's dataset, then the open class, then the zero-shot accuracy."""
        updated = event.then(self.show_dataset, [self.draft, self.class_], self.dataset, **QUIET)
        # After the list of classes was updated, so that the chosen class is one of them.
        updated = updated.then(self.show_class, [self.class_, self.draft, self.is_open], self.editor, **QUIET)
        device = {"concurrency_id": "device", "concurrency_limit": 1}
        updated.then(self.measure, [self.draft], [self.summary, self.cards], **device, **QUIET)

    def list_sets(self, draft: dict[str, Any], request: gr.Request) -> gr.Dropdown:
        """The datasets, with the draft's selected."""
        return _sets(self.app.settings.workspace(request), draft)

    def show_dataset(self, draft: dict[str, Any], key: str | None, request: gr.Request) -> list[Any]:
        """Updates of the components that show the draft's dataset, without its zero-shot accuracy."""
        workspace = self.app.settings.workspace(request)
        classes = _classes_or_none(workspace, draft)
        keys = {one.key: one.name for one in classes.classes}
        return [
            _sets(workspace, draft),
            gr.Button(visible=classes.kind != "example"),
            gr.Row(visible=False),
            summary(classes, None),
            class_cards(classes, None),
            gr.Dropdown([(name, one) for one, name in keys.items()], value=key if key in keys else next(iter(keys), None)),
            gr.Accordion(visible=bool(keys)),
            gr.Button(interactive=classes.is_ready),
        ]

    def measure(self, draft: dict[str, Any], request: gr.Request) -> tuple[Any, Any]:
        """The summary and the class cards, with the zero-shot accuracy of the built-in model."""
        classes = _classes_or_none(self.app.settings.workspace(request), draft)
        # Not skipped otherwise: a late result for the previous dataset may have replaced the summary.
        has_two = sum(bool(one.images) for one in classes.classes) > 1
        accuracy = WORKER.call("zero_shot", classes) if has_two else None
        return summary(classes, accuracy), class_cards(classes, accuracy)

    def take_zip(self, file: str | None, draft: dict[str, Any], request: gr.Request) -> tuple[Any, ...]:
        """Add the class folders of a zip; the field is emptied whether it can be used or not."""
        if file is None:
            return gr.skip(), gr.skip(), gr.skip()
        try:
            with self.uploading(draft, request) as dataset:
                added = add_zip(dataset, file)
        except InputError as error:
            return gr.skip(), shared.warning(str(error)), None
        return {**draft, "set": dataset.folder.name}, upload_summary(added), None

    def take_images(self, name: str, files: list[str] | None, draft: dict[str, Any], request: gr.Request) -> tuple[Any, ...]:
        """Add images to a class."""
        if not files:
            raise InputError("No images were chosen. Drop some into the field above.")
        with self.uploading(draft, request) as dataset:
            added = add_images(dataset, files, dataset.add_class(name))
        return {**draft, "set": dataset.folder.name}, upload_summary(added), "", None

    def use_folder(self, path: str, draft: dict[str, Any], request: gr.Request) -> tuple[Any, ...]:
        """Use a folder on this machine as a dataset."""
        return {**draft, "set": point_to(self.app.settings.workspace(request), path)}, "", ""

    @contextmanager
    def uploading(self, draft: dict[str, Any], request: gr.Request) -> Iterator[Dataset]:
        """The draft's dataset if it was uploaded, else a new one, which is deleted again if the upload is refused."""
        workspace = self.app.settings.workspace(request)
        set_id = set_of(workspace, draft)
        dataset = None if set_id in EXAMPLES else Dataset.of(workspace, set_id)
        is_new = dataset is None or dataset.content().local_folder is not None
        dataset = Dataset(workspace.new_image_set()) if is_new else dataset
        try:
            yield dataset
        except InputError:
            if is_new:
                dataset.delete()
            raise

    def show_class(self, key: str | None, draft: dict[str, Any], is_open: bool, request: gr.Request) -> list[Any]:
        """Updates of the components that show and edit the class `key`."""
        if not is_open:
            return [gr.skip()] * len(self.editor)
        classes = _classes_or_none(self.app.settings.workspace(request), draft)
        entry = next((one for one in classes.classes if one.key == key), None)
        others = [(one.name, one.key) for one in classes.classes if one.key != key]
        is_own = classes.kind == "own" and entry is not None
        images = [] if entry is None else entry.images[:MOST_SHOWN]
        tiles = [(one.name, tile(one, one.name)) for one in images if small(one) is not None]
        return [
            "" if entry is None else entry.name,
            macros.choices(tiles, is_own),
            [],
            gr.Dropdown(others, value=others[0][1] if others else None, visible=False),
            *[gr.Button(visible=False)] * 2,
            gr.Button(interactive=entry is not None and classes.kind != "example"),
            gr.Button(interactive=is_own),
        ]

    def choose(self, key: str, draft: dict[str, Any], event: gr.EventData, request: gr.Request) -> list[Any]:
        """Remember the chosen images, and offer what can be done with them."""
        files = {one.name for one in find_classes(*self.named(draft, request)).class_named(key).images}
        chosen = [file for file in event.files if file in files]
        count = f"{len(chosen)} image{'' if len(chosen) == 1 else 's'}"
        has_any = bool(chosen)
        labels = (f"Move {count}", f"Delete {count}")
        return [chosen, gr.Dropdown(visible=has_any), *(gr.Button(label, visible=has_any) for label in labels)]

    def rename_class_to(self, key: str, name: str, draft: dict[str, Any], request: gr.Request) -> str:
        """Rename a class; a local folder itself is not changed."""
        rename_class(Dataset.of(*self.named(draft, request)), key, name)
        return ""

    def move_chosen(self, chosen: list[str], target: str, draft: dict[str, Any], request: gr.Request) -> str:
        """Move images to another class."""
        dataset = self.free(draft, request)
        for file in chosen:
            dataset.move_to_class(file, target)
        return ""

    def ask(self, what: str, key: str, chosen: list[str], draft: dict[str, Any], request: gr.Request) -> list[Any]:
        """Ask whether to delete the chosen images, a class or the dataset."""
        classes = find_classes(*self.named(draft, request))
        if what == "dataset":
            label = "Forget this folder" if classes.kind == "folder" else f"Delete the dataset and its {classes.count} images"
        elif what == "class":
            one = classes.class_named(key)
            label = f"Delete {one.name} and its {len(one.images)} images"
        else:
            label = f"Delete {len(chosen)} image{'' if len(chosen) == 1 else 's'}"
        return [what, gr.Row(visible=True), gr.Button(label)]

    def delete_asked(self, what: str, key: str, chosen: list[str], draft: dict[str, Any], request: gr.Request) -> tuple[Any, str]:
        """Delete what was asked about."""
        dataset = self.free(draft, request)
        if what == "dataset":
            dataset.delete()
            return {**draft, "set": None}, ""
        if what == "class":
            dataset.remove_class(key)
        else:
            dataset.remove(chosen)
        return draft, ""

    def named(self, draft: dict[str, Any], request: gr.Request) -> tuple[Workspace, str]:
        """The user's workspace and the id of the draft's dataset."""
        workspace = self.app.settings.workspace(request)
        return workspace, set_of(workspace, draft)

    def free(self, draft: dict[str, Any], request: gr.Request) -> Dataset:
        """The draft's dataset. Raises: InputError if a run is training on it."""
        workspace, set_id = self.named(draft, request)
        dataset = Dataset.of(workspace, set_id)
        check_free(workspace, dataset.folder)
        return dataset


def set_of(workspace: Workspace, stored: object) -> str:
    """The id of a stored draft's dataset; if it is gone, the user's newest dataset, or the first example."""
    return CLASSIFY.key(workspace, Draft.from_browser(stored))


def check_free(workspace: Workspace, folder: Path) -> None:
    """Raises: InputError if a queued or active run trains on the images in `folder`."""
    given = str(folder.absolute())
    for view in views(workspace):
        if view.is_active and view.launch_options.get("data", {}).get("data_dir") == given:
            raise InputError("A run is training on these images. Wait until it is done, or stop it first.")


def _sets(workspace: Workspace, draft: dict[str, Any]) -> gr.Dropdown:
    choices = [(title(workspace, one), one) for one in (*EXAMPLES, *class_datasets(workspace))]
    return gr.Dropdown(choices, value=set_of(workspace, draft))


def _classes_or_none(workspace: Workspace, draft: dict[str, Any]) -> LabelledClasses:
    """The draft's dataset; without classes, and with a warning on the page, if its local folder can no longer be used."""
    set_id = set_of(workspace, draft)
    try:
        return find_classes(workspace, set_id)
    except InputError as error:
        gr.Warning(html.escape(str(error)), title="These images cannot be used")
        return LabelledClasses(set_id, "folder", None, ())


def upload_summary(added: Added) -> Markup:
    """The result of an upload."""
    count = len(added.names)
    said = shared.note(f"{count} image{'' if count == 1 else 's'} added.")
    lists = (("Not added:", added.refused), ("Notes:", added.notes))
    return said + Markup("").join(macros.listed(head, sentences) for head, sentences in lists if sentences)


def summary(classes: LabelledClasses, accuracy: ZeroShotAccuracy | None) -> Markup:
    """The number of classes and images, the zero-shot accuracy of the built-in model, and warnings."""
    count = len(classes.classes)
    size = f"{count} class{'' if count == 1 else 'es'}, {classes.count} images."
    warnings = [] if classes.kind == "example" else [*classes.warnings(), *classes.duplicates()]
    below = (NOTES[classes.kind], [*classes.notes, *warnings])
    if accuracy is None:
        return macros.dataset("", "", size, "", *below)
    value = accuracy.right / accuracy.count
    lead = (
        f"zero-shot accuracy: the built-in model classifies {accuracy.right} of {accuracy.count} images correctly before any "
        f"training, from the class names alone. Random guessing: {share(1 / count)}."
    )
    return macros.dataset(share(value), lead, size, verdict(value, count), *below)


def verdict(accuracy: float, count: int) -> str:
    """What the zero-shot accuracy on `count` classes means for training."""
    chance = 1 / count
    if accuracy <= chance + 0.1 * (1 - chance):
        return "The built-in model does not know these class names, so it has to learn everything from your images."
    if accuracy >= chance + 0.7 * (1 - chance):
        return "The built-in model knows these classes from their names alone. Training teaches it your images."
    return "The built-in model knows some of these classes from their names. Training should help."


def class_cards(classes: LabelledClasses, accuracy: ZeroShotAccuracy | None) -> Markup:
    """Every class with its number of images, some of them, and its zero-shot accuracy."""
    cards = []
    for one in classes.classes:
        some = one.images[:: max(1, len(one.images) // IN_CARD)][:IN_CARD]
        right = accuracy and accuracy.by_class.get(one.key)
        zero_shot = f"zero-shot: {right[0]} of {right[1]} correct" if right else ""
        count = f"{len(one.images)} image{'' if len(one.images) == 1 else 's'}"
        cards.append((one.name, count, zero_shot, [(tile(source, f"an image of {one.name}"), "") for source in some]))
    return macros.classes(cards)
