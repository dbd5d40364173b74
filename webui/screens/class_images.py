"""Classify, part 1: add, view, rename and edit classes and their images."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

from pipelines.errors import InputError
from pipelines.image_formats import UPLOAD_SUFFIXES
from webui.class_html import class_cards, share
from webui.class_runs import ClassifyContext, check_free, set_of
from webui.context import QUIET, show_errors
from webui.datasets import Dataset
from webui.inference_worker import WORKER
from webui.labelled_datasets import (
    EXAMPLE,
    LabelledClasses,
    class_datasets,
    find_classes,
    point_to,
    rename_class,
    title,
)
from webui.render import small
from webui.settings import Settings
from webui.uploads import Added, add_images, add_zip
from webui.workspace import Workspace

MOST_SHOWN = 100
EXAMPLE_NOTE = (
    "<p class='quiet'>This example comes with the app: the handwritten digits of scikit-learn. Train on it to try everything "
    "out, or add your own images below; they become a dataset of their own.</p>"
)
OWN_NOTE = "<p class='quiet'>To start another dataset, choose the example above and add images.</p>"
FOLDER_NOTE = (
    "<p class='quiet'>These images stay in their folder on this machine, which the app never changes. Images that you add "
    "become a dataset of their own.</p>"
)


def build(context: ClassifyContext) -> None:
    """Put the part into the open tab."""
    parts = _layout(context)
    _wire_class(context, parts)
    _wire_dataset(context, parts)
    _wire_adding(context, parts)
    _wire_editing(context, parts)


def _layout(context: ClassifyContext) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    parts["set"] = gr.Dropdown(
        [("Example: handwritten digits", EXAMPLE)],
        value=EXAMPLE,
        label="Dataset",
        elem_id="classify-set",
        filterable=False,
        interactive=True,
    )
    parts["summary"] = gr.HTML(elem_id="classify-summary")
    parts["cards"] = gr.HTML(elem_id="classify-classes")
    _lay_out_adding(parts, context.app.settings.is_local)
    parts["message"] = gr.HTML(elem_id="classify-message")
    _lay_out_editing(parts)
    with gr.Row(elem_classes="buttons"):
        parts["delete"] = gr.Button("Delete this dataset", size="sm", elem_id="classify-delete-set", visible=False)
    with gr.Row(visible=False) as parts["confirm"]:
        parts["yes"] = gr.Button("Delete it and all its images", variant="stop", elem_id="classify-delete-yes")
        parts["no"] = gr.Button("Keep it", elem_id="classify-delete-no")
    parts["go"] = gr.Button("Continue to Train", variant="primary", elem_id="classify-go-train")
    return parts


def _lay_out_adding(parts: dict[str, Any], is_local: bool) -> None:
    gr.HTML("<h3>Add your own images</h3>")
    with gr.Tabs():
        with gr.Tab("Zip of class folders"):
            gr.HTML("<p class='quiet'>One folder per class, named after the class, with its images inside.</p>")
            parts["zip"] = gr.File(label="Zip file", file_types=[".zip"], height=140, elem_id="classify-zip")
        with gr.Tab("One class at a time"):
            parts["new_name"] = gr.Textbox(
                label="Class name", placeholder="e.g. red mug", max_lines=1, elem_id="classify-class-name"
            )
            parts["files"] = gr.File(
                label="Images of this class",
                file_count="multiple",
                file_types=list(UPLOAD_SUFFIXES),
                height=140,
                elem_id="classify-class-files",
            )
            parts["add"] = gr.Button("Add images", interactive=False, elem_id="classify-add")
        if is_local:
            with gr.Tab("Local folder"):
                parts["path"] = gr.Textbox(
                    label="Folder",
                    info="A folder on this machine with one subfolder per class.",
                    max_lines=1,
                    elem_id="classify-folder",
                )
                parts["point"] = gr.Button("Use this folder", elem_id="classify-use-folder")


def _lay_out_editing(parts: dict[str, Any]) -> None:
    with gr.Accordion("View and edit a class", open=False, elem_id="classify-edit") as parts["edit"]:
        with gr.Row():
            parts["class"] = gr.Dropdown(label="Class", elem_id="classify-class", interactive=True)
            parts["name"] = gr.Textbox(label="New name", max_lines=1, elem_id="classify-rename-to")
        with gr.Row(elem_classes="buttons"):
            parts["rename"] = gr.Button("Rename", size="sm", elem_id="classify-rename")
            parts["remove_class"] = gr.Button("Remove class", size="sm", elem_id="classify-remove-class")
        gr.HTML("<p class='quiet'>Choose an image to move or remove it.</p>")
        parts["gallery"] = gr.Gallery(
            show_label=False,
            columns=8,
            height=280,
            object_fit="cover",
            allow_preview=False,
            elem_id="classify-class-images",
        )
        parts["chosen"] = gr.State(None)
        with gr.Column(visible=False) as parts["one"]:
            parts["target"] = gr.Dropdown(label="Move the chosen image to class", elem_id="classify-move-to", interactive=True)
            with gr.Row(elem_classes="buttons"):
                parts["move"] = gr.Button("Move image", size="sm", elem_id="classify-move")
                parts["remove"] = gr.Button("Remove image", size="sm", elem_id="classify-remove")


def _wire_dataset(context: ClassifyContext, parts: dict[str, Any]) -> None:
    """Show the draft's dataset, then its zero-shot accuracy."""
    settings = context.app.settings
    widgets = [parts[name] for name in ("set", "delete", "confirm", "summary", "cards", "class", "edit", "go")]

    @show_errors
    def list_sets(draft: dict[str, Any], request: gr.Request) -> gr.Dropdown:
        workspace = settings.workspace(request)
        return gr.Dropdown(_choices(workspace), value=set_of(workspace, draft))

    @show_errors
    def show_dataset(draft: dict[str, Any], request: gr.Request) -> list[Any]:
        workspace = settings.workspace(request)
        set_id = set_of(workspace, draft)
        return [gr.Dropdown(_choices(workspace), value=set_id), *_dataset_updates(_dataset_or_empty(workspace, set_id))]

    @show_errors
    def measure(draft: dict[str, Any], request: gr.Request) -> tuple[Any, Any]:
        workspace = settings.workspace(request)
        return _measured(_dataset_or_empty(workspace, set_of(workspace, draft)))

    @show_errors
    def choose(set_id: str, draft: dict[str, Any]) -> dict[str, Any]:
        return {**draft, "set": set_id}

    def redraw(event: Any) -> None:
        updated = parts["show_class"](event.then(show_dataset, [context.draft], widgets, **QUIET))
        outputs = [parts["summary"], parts["cards"]]
        updated.then(measure, [context.draft], outputs, concurrency_id="device", concurrency_limit=1, **QUIET)

    parts["redraw"] = redraw
    context.app.page.load(list_sets, [context.draft], [parts["set"]], **QUIET)
    redraw(context.tab.select(list_sets, [context.draft], [parts["set"]], **QUIET))
    redraw(parts["set"].input(choose, [parts["set"], context.draft], [context.draft], **QUIET))
    parts["go"].click(lambda: gr.Tabs(selected="train"), None, [context.steps], **QUIET)


def _measured(classes: LabelledClasses) -> tuple[Any, Any]:
    """The summary and the class cards of a dataset, with its zero-shot accuracy."""
    if sum(bool(one.images) for one in classes.classes) < 2:
        # Not skipped: a late result for the previous dataset may have replaced the summary.
        return _summary(classes, None), class_cards(classes, {})
    zero_shot_result = WORKER.call("zero_shot", classes)
    return _summary(classes, (zero_shot_result.right, zero_shot_result.count)), class_cards(classes, zero_shot_result.by_class)


def _dataset_updates(classes: LabelledClasses) -> list[Any]:
    """Updates of the components that show a dataset, without its zero-shot accuracy."""
    keys = [(one.name, one.key) for one in classes.classes]
    return [
        gr.Button(visible=classes.kind != "example"),
        gr.Row(visible=False),
        _summary(classes, None),
        class_cards(classes, {}),
        gr.Dropdown(keys, value=keys[0][1] if keys else None),
        gr.Accordion(visible=bool(keys)),
        gr.Button(interactive=classes.is_ready),
    ]


def _wire_adding(context: ClassifyContext, parts: dict[str, Any]) -> None:
    settings, redraw = context.app.settings, parts["redraw"]

    @show_errors
    def take_zip(file: str | None, draft: dict[str, Any], request: gr.Request) -> tuple[Any, ...]:
        if file is None:
            return gr.skip(), gr.skip(), gr.skip()
        with _upload_dataset(settings.workspace(request), draft) as dataset:
            added = add_zip(dataset, file)
        return {**draft, "set": dataset.id}, _upload_summary(added), None

    @show_errors
    def add(name: str, files: list[str] | None, draft: dict[str, Any], request: gr.Request) -> tuple[Any, ...]:
        if not files:
            raise InputError("No images were chosen. Drop some into the field above.")
        with _upload_dataset(settings.workspace(request), draft) as dataset:
            added = add_images(dataset, files, dataset.add_class(name))
        return {**draft, "set": dataset.id}, _upload_summary(added), "", None

    @show_errors
    def point(path: str, draft: dict[str, Any], request: gr.Request) -> tuple[Any, ...]:
        return {**draft, "set": point_to(settings.workspace(request), path)}, "", ""

    quiet = {"api_visibility": "private", "show_progress": "minimal"}
    redraw(parts["zip"].upload(take_zip, [parts["zip"], context.draft], [context.draft, parts["message"], parts["zip"]], **quiet))
    # The field lists its files before they have arrived.
    parts["files"].change(lambda files: gr.Button(interactive=bool(files)), [parts["files"]], [parts["add"]], **QUIET)
    given = [parts["new_name"], parts["files"], context.draft]
    redraw(parts["add"].click(add, given, [context.draft, parts["message"], parts["new_name"], parts["files"]], **quiet))
    if "point" in parts:
        inputs, outputs = [parts["path"], context.draft], [context.draft, parts["message"], parts["path"]]
        redraw(gr.on([parts["point"].click, parts["path"].submit], point, inputs, outputs, **quiet))


@contextmanager
def _upload_dataset(workspace: Workspace, draft: dict[str, Any]) -> Iterator[Dataset]:
    """The dataset that uploads go to; a new one is deleted again if the upload is refused."""
    dataset, is_new = _dataset_of_draft(workspace, draft)
    try:
        yield dataset
    except InputError:
        if is_new:
            dataset.delete()
        raise


def _wire_class(context: ClassifyContext, parts: dict[str, Any]) -> None:
    """Show the images of the chosen class, and remember the image that is clicked."""
    settings = context.app.settings
    of_class = [parts["class"], context.draft]
    outputs = [parts[name] for name in ("name", "gallery", "chosen", "one", "target", "rename", "remove_class")]
    opened = gr.State(False)

    @show_errors
    def show(key: str | None, draft: dict[str, Any], is_open: bool, request: gr.Request) -> list[Any]:
        if not is_open:
            return [gr.skip()] * len(outputs)
        workspace = settings.workspace(request)
        return _class_updates(_dataset_or_empty(workspace, set_of(workspace, draft)), key)

    @show_errors
    def choose(key: str, draft: dict[str, Any], event: gr.SelectData, request: gr.Request) -> tuple[Any, Any]:
        workspace = settings.workspace(request)
        classes = find_classes(workspace, set_of(workspace, draft))
        readable = [one for one in classes.class_named(key).images[:MOST_SHOWN] if small(one) is not None]
        is_there = classes.kind == "own" and isinstance(event.index, int) and 0 <= event.index < len(readable)
        return (readable[event.index].name if is_there else None), gr.Column(visible=is_there)

    parts["class"].change(show, [*of_class, opened], outputs, **QUIET)
    parts["edit"].expand(lambda: True, None, [opened], **QUIET).then(show, [*of_class, opened], outputs, **QUIET)
    parts["edit"].collapse(lambda: False, None, [opened], **QUIET)
    parts["gallery"].select(choose, of_class, [parts["chosen"], parts["one"]], **QUIET)
    # After the list of classes was updated, so that the chosen class is one of them.
    parts["show_class"] = lambda event: event.then(show, [*of_class, opened], outputs, **QUIET)


def _class_updates(classes: LabelledClasses, key: str | None) -> list[Any]:
    """Updates of the components that show and edit the class `key`."""
    entry = next((one for one in classes.classes if one.key == key), None)
    if entry is None:
        return ["", [], None, gr.Column(visible=False), gr.Dropdown([]), *[gr.Button(interactive=False)] * 2]
    cached = [small(source) for source in entry.images[:MOST_SHOWN]]
    others = [(one.name, one.key) for one in classes.classes if one.key != key]
    return [
        entry.name,
        [one[0] for one in cached if one is not None],
        None,
        gr.Column(visible=False),
        gr.Dropdown(others, value=others[0][1] if others else None),
        gr.Button(interactive=classes.kind != "example"),
        gr.Button(interactive=classes.kind == "own"),
    ]


def _wire_editing(context: ClassifyContext, parts: dict[str, Any]) -> None:
    """Rename or remove a class, move or remove one of its images."""
    settings, redraw = context.app.settings, parts["redraw"]

    @show_errors
    def rename(key: str, name: str, draft: dict[str, Any], request: gr.Request) -> str:
        workspace = settings.workspace(request)
        rename_class(Dataset.of(workspace, set_of(workspace, draft)), key, name)
        return ""

    given = [parts["class"], parts["name"], context.draft]
    redraw(gr.on([parts["rename"].click, parts["name"].submit], rename, given, [parts["message"]], **QUIET))
    given = [parts["class"], parts["chosen"], parts["target"], context.draft]
    changes = {
        "remove_class": lambda dataset, key, chosen, target: dataset.remove_class(key),
        "remove": lambda dataset, key, chosen, target: dataset.remove([chosen]),
        "move": lambda dataset, key, chosen, target: dataset.move_to_class(chosen, target),
    }
    for name, change in changes.items():
        redraw(parts[name].click(_changing(settings, change), given, [parts["message"]], **QUIET))
    _wire_deleting(context, parts)


def _changing(settings: Settings, change: Callable[[Dataset, str, str | None, str | None], object]) -> Callable[..., str]:
    """A handler that changes an uploaded dataset.

    Args:
        change: called with the dataset, the class, the chosen image and the class to move it to.
    """

    @show_errors
    def changed(key: str, chosen: str | None, target: str | None, draft: dict[str, Any], request: gr.Request) -> str:
        workspace = settings.workspace(request)
        dataset = Dataset.of(workspace, set_of(workspace, draft))
        check_free(workspace, dataset.folder)
        change(dataset, key, chosen, target)
        return ""

    return changed


def _wire_deleting(context: ClassifyContext, parts: dict[str, Any]) -> None:
    settings = context.app.settings

    @show_errors
    def delete(draft: dict[str, Any], request: gr.Request) -> dict[str, Any]:
        workspace = settings.workspace(request)
        dataset = Dataset.of(workspace, set_of(workspace, draft))
        check_free(workspace, dataset.folder)
        dataset.delete()
        return {**draft, "set": None}

    parts["delete"].click(lambda: gr.Row(visible=True), None, [parts["confirm"]], **QUIET)
    parts["no"].click(lambda: gr.Row(visible=False), None, [parts["confirm"]], **QUIET)
    parts["redraw"](parts["yes"].click(delete, [context.draft], [context.draft], **QUIET))


def _choices(workspace: Workspace) -> list[tuple[str, str]]:
    return [(title(workspace, one), one) for one in (*class_datasets(workspace), EXAMPLE)]


def _dataset_or_empty(workspace: Workspace, set_id: str) -> LabelledClasses:
    """The dataset; without classes, and with a warning on the page, if its local folder can no longer be used."""
    try:
        return find_classes(workspace, set_id)
    except InputError as error:
        gr.Warning(html.escape(str(error)), title="These images cannot be used")
        return LabelledClasses(set_id, "folder", None, ())


def _dataset_of_draft(workspace: Workspace, draft: dict[str, Any]) -> tuple[Dataset, bool]:
    """The draft's dataset if it was uploaded, else a new one, and whether it is new."""
    set_id = set_of(workspace, draft)
    if set_id != EXAMPLE and Dataset.of(workspace, set_id).content().local_folder is None:
        return Dataset.of(workspace, set_id), False
    return Dataset(workspace.new_image_set()), True


def _upload_summary(added: Added) -> str:
    """The result of an upload, as HTML."""
    count = len(added.names)
    text = f"<p>{count} image{'' if count == 1 else 's'} added.</p>"
    refused = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in added.refused)
    notes = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in added.notes)
    text += f"<div class='warning'>Not added:<ul>{refused}</ul></div>" if refused else ""
    return text + (f"<div class='warning'>Notes:<ul>{notes}</ul></div>" if notes else "")


def _summary(classes: LabelledClasses, accuracy: tuple[int, int] | None) -> str:
    """The number of classes and images, the zero-shot accuracy and warnings, as HTML."""
    notes = {"example": EXAMPLE_NOTE, "folder": FOLDER_NOTE, "own": OWN_NOTE}
    count = len(classes.classes)
    text = f"<p><b>{count} class{'' if count == 1 else 'es'}, {classes.count} images.</b> "
    if accuracy is not None:
        right, tested = accuracy
        text += (
            f"Zero-shot accuracy of the built-in model, from the class names alone: <b>{share(right / tested)}</b> ({right} of "
            f"{tested} images). Random guessing: {share(1 / count)}."
        )
    warned = [*classes.warnings(), *classes.duplicates()] if classes.kind != "example" else []
    read = "".join(f"<p class='quiet'>{html.escape(note)}</p>" for note in classes.notes)
    return f"{notes[classes.kind]}{text}</p>{read}" + "".join(f"<p class='warning'>{html.escape(one)}</p>" for one in warned)
