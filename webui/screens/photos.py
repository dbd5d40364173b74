"""The screen Photos: what the app does, the subject's photos with the results of the image checks, and the base model."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from pipelines.built_in import ASSETS
from pipelines.errors import InputError
from pipelines.image_formats import UPLOAD_FORMATS, listed
from pipelines.subject.folder_names import words_of
from pipelines.subject.usage import SDXL
from training.options.values import merged, without
from webui import panel
from webui.context import QUIET, AppContext
from webui.datasets import Dataset
from webui.draft import EXAMPLE, Draft, RunSettings
from webui.inference_worker import WORKER, CheckedImage, CheckedImages
from webui.render import data_url, parts, render, thumbnail
from webui.screens.check import start_on_click
from webui.tasks import SubjectPlan, on_this_machine
from webui.uploads import add_crop, add_photos
from webui.workspace import Workspace

CHIPS = {"good": "good", "look again": "warn", "left out": "bad", "checking": ""}
CHECKING = CheckedImage("checking", ())
GONE = "Your photos no longer exist, so the example is shown. Add your photos again."
SCRIPTS = {name: Path(__file__).parents[1].joinpath(f"{name}.js").read_text(encoding="utf-8") for name in ("photos", "crop")}
CHOICES_JS = """element.addEventListener('click', event => {
  const button = event.target.closest('button');
  if (button) trigger(button.dataset.action === 'classify' ? 'select' : 'click', {action: button.dataset.action, files: []});
});"""
# Empties the field at once. Gradio breaks an upload off when the server empties its field, and ignores one that ends while the
# files of another are added.
TAKE_FILES = "files => [null, [files ?? []].flat()]"
# The bundled run: photos, before and after are four cells each of assets/before-after.png, by row and first column.
FIRST_RESULT, FIRST_CELLS = ASSETS / "before-after.png", ((0, 0), (1, 1), (3, 1))
CELL, CELL_STEP, CELL_TOP = 192, (198, 222), (6, 24)
CLASSES, CLASS_NAMES = ASSETS / "sample-classes" / "coloured-shapes.zip", ("red star", "green heart", "blue ring")
DEMO, CHECKPOINT = "demo", "checkpoint"
MODEL = "pretrained_model_name_or_path"
CROP_SIDE = 1024
# The components that show the photos and the draft.
VIEW = ("about", "cards", "model", "path", "train", "check", "signature")
SKIPPED = (gr.skip(),) * len(VIEW)


def build(context: AppContext) -> None:
    """Put the screen into the open tab."""
    small = {"size": "md", "scale": 0, "min_width": 160}
    widgets: dict[str, Any] = {"about": gr.HTML(js_on_load=CHOICES_JS, elem_id="photos-about")}
    label = "Photos, captions (.txt, .csv, .jsonl) or a zip"
    widgets["upload"] = gr.File(label=label, file_count="multiple", height=130, elem_id="photos-upload")
    with gr.Row(elem_classes="buttons"):
        widgets["folder"] = gr.UploadButton("Add a folder", file_count="directory", elem_id="photos-folder", **small)
        camera = gr.Button("Use the camera", elem_id="photos-camera-open", **small)
        formats = f"{listed(UPLOAD_FORMATS)}. Ctrl+V adds an image from the clipboard."
        gr.HTML(parts.note(formats), elem_id="photos-formats")
    widgets["camera"] = gr.Image(sources=["webcam"], type="filepath", label="Camera", visible=False, elem_id="photos-camera")
    camera.click(lambda: gr.Image(visible=True), None, [widgets["camera"]], **QUIET)
    # The files of the newest upload.
    widgets["files"] = gr.File(file_count="multiple", visible="hidden")
    widgets["message"] = gr.HTML(visible=False, elem_id="photos-message")
    widgets["crop"] = gr.HTML("", js_on_load=SCRIPTS["crop"], elem_id="photos-crop")
    widgets["cards"] = gr.HTML(js_on_load=SCRIPTS["photos"], elem_id="photos-cards")
    _lay_out_model(context, widgets)
    with gr.Column(elem_id="photos-actions"):
        panel.build_plan(context, SubjectPlan, context.draft, context.draft_changed, "photos")
        with gr.Row():
            widgets["train"] = gr.Button("Train", min_width=120, variant="primary", size="lg", elem_id="photos-train")
            widgets["check"] = gr.Button("Check first", min_width=120, size="lg", elem_id="photos-check")
    # Nothing was sent to the page or checked yet.
    widgets["signature"], widgets["examined"] = gr.State([]), gr.State([])
    _wire(context, widgets)


def _lay_out_model(context: AppContext, widgets: dict[str, Any]) -> None:
    is_local = context.settings.is_local
    titles = {DEMO: "Demo model (64 px, offline)", SDXL: "SDXL 1.0 (1024 px)", CHECKPOINT: "Own checkpoint"}
    names = [DEMO, SDXL, CHECKPOINT] if is_local else [DEMO, *context.settings.base_models]
    choices = [(titles.get(name, Path(name).name), name) for name in names]
    info = "A hub name, a folder in diffusers' layout, or a .safetensors file on this machine, of SDXL's architecture."
    with gr.Group():
        widgets["model"] = gr.Radio(choices, value=DEMO, label="Base model", info=" ", elem_id="photos-model")
        widgets["path"] = gr.Textbox(label="Own checkpoint", info=info, max_lines=1, visible=False, elem_id="photos-model-path")


def _wire(context: AppContext, widgets: dict[str, Any]) -> None:
    """Connect the events."""
    handlers, draft, view = _Handlers(context), context.draft, [widgets[name] for name in VIEW]

    def then_check(event: Any) -> None:
        """After `event`, show the results of the image checks."""
        inputs, outputs = [draft, widgets["signature"], widgets["examined"]], [widgets["cards"], widgets["examined"]]
        event.then(handlers.examine, inputs, outputs, **QUIET)

    lost = gr.State(None)
    for begun in (context.page.load, context.draft_changed.change):
        then_check(begun(handlers.show, [draft, widgets["signature"]], [lost, *view], **QUIET))
    # A separate event: Gradio would loop if the draft were an output of its own change event.
    lost.change(handlers.forget, [draft], [draft], **QUIET)
    for source, event in (("upload", "upload"), ("folder", "upload"), ("camera", "input")):
        getattr(widgets[source], event)(None, [widgets[source]], [widgets[source], widgets["files"]], js=TAKE_FILES, **QUIET)
    previous = gr.State(None)
    inputs, outputs = [draft, widgets["files"], previous], [draft, widgets["message"], previous, *view]
    busy = {"api_visibility": "private", "show_progress": "minimal", "show_progress_on": [widgets["upload"]]}
    then_check(widgets["files"].change(handlers.add, inputs, outputs, trigger_mode="multiple", **busy))
    outputs = [draft, widgets["message"], widgets["crop"], *view]
    for name in ("about", "cards", "crop"):
        then_check(widgets[name].click(handlers.act, [draft], outputs, **QUIET))
    picked = [widgets["model"].input, widgets["path"].submit, widgets["path"].blur]
    gr.on(picked, handlers.choose_model, [draft, widgets["model"], widgets["path"]], [draft, *view], **QUIET)
    start_on_click(context, widgets["train"])
    for opened, name in ((widgets["check"].click, "check"), (widgets["about"].select, "classify")):
        opened(lambda name=name: gr.Tabs(selected=name), outputs=[context.tabs], **QUIET)


@dataclass(frozen=True)
class _Handlers:
    """Event handlers of the screen."""

    context: AppContext

    def show(self, stored: dict[str, Any], sent: list[str], request: gr.Request) -> tuple[Any, ...]:
        """The id of the draft's photos if they no longer exist, and the current photos, before the image checks are done."""
        photos, draft = self._shown(stored, request)
        if photos.id != draft.set:
            gr.Warning(GONE, title="Photos not found")
            return draft.set, *_view(photos, draft)
        return gr.skip(), *(SKIPPED if sent == _signature(photos, draft) else _view(photos, draft))

    def forget(self, stored: dict[str, Any]) -> dict[str, Any]:
        """The draft without photos that no longer exist."""
        return replace(Draft.from_browser(stored), set=None, previous_set=None).to_browser()

    def examine(self, stored: dict[str, Any], sent: list[str], before: list[str], request: gr.Request) -> tuple[Any, Any]:
        """The cards with the results of the image checks; skipped if they are on the page already.

        `stored` may be older than `sent` if another dataset was chosen in the meantime. The signature of the photos that were
        checked is returned, so that the following call for the other dataset is not skipped.
        """
        photos, draft = self._shown(stored, request)
        now = _signature(photos, draft)
        return (gr.skip(), gr.skip()) if now == sent == before else (_examined(photos, draft), now)

    def add(
        self, stored: dict[str, Any], files: list[str] | None, previous: tuple[Any, str] | None, request: gr.Request
    ) -> tuple[Any, ...]:
        """Add files, or a photo of the camera; unusable ones are refused with a reason.

        Args:
            previous: the draft of the previous call and the photos that it added to. A call with the same draft was sent before
                the page had the response, and adds to the same photos.
        """
        if not files:
            return (gr.skip(),) * 3 + SKIPPED
        workspace, draft = self._now(stored, request)
        is_same = previous is not None and previous[0] == stored
        photos, draft = _editable(workspace, draft.moved_to(previous[1]) if is_same else draft)
        added = add_photos(photos, files)
        return draft.to_browser(), _message([*added.refused, *added.notes]), (stored, photos.id), *_view(photos, draft)

    def act(self, stored: dict[str, Any], event: gr.EventData, request: gr.Request) -> tuple[Any, ...]:
        """Do what the clicked button says: switch between the user's photos and the example, or edit photos."""
        workspace, draft = self._now(stored, request)
        action, files, editor, checked = str(event.action), [str(file) for file in event.files], "", None
        if action == "example":
            draft = replace(draft, set=None, previous_set=draft.set or draft.previous_set)
        elif action == "own":
            existing = draft.set or _existing(workspace, draft.previous_set)
            draft = replace(draft, set=existing or workspace.new_image_set().name)
        elif action != "cancel":
            photos, draft = _editable(workspace, draft)
            editor = _edit(photos, action, files, event)
            checked = None if action == "crop" else _examined(photos, draft)
        return draft.to_browser(), _message([]), editor, *_view(Dataset.of(workspace, draft.set), draft, checked)

    def choose_model(self, stored: dict[str, Any], model: str, path: str, request: gr.Request) -> tuple[Any, ...]:
        """Store the base model in the draft. Until the name of an own checkpoint is entered, it is the demo model."""
        workspace, draft = self._now(stored, request)
        name = {DEMO: "", CHECKPOINT: path.strip()}.get(model, model)
        settings = _settings(draft)
        options = merged(without(settings.options, {"model": [MODEL]}), {"model": {MODEL: name}} if name else {})
        draft = draft.with_settings(draft.set or EXAMPLE, replace(settings, options=options))
        view = dict(zip(VIEW, _view(Dataset.of(workspace, draft.set), draft), strict=True))
        if model == CHECKPOINT and not name:
            view |= {"model": gr.skip(), "path": gr.Textbox(visible=True)}
        return draft.to_browser(), *view.values()

    def _now(self, stored: dict[str, Any], request: gr.Request) -> tuple[Workspace, Draft]:
        return self.context.settings.workspace(request), Draft.from_browser(stored)

    def _shown(self, stored: dict[str, Any], request: gr.Request) -> tuple[Dataset, Draft]:
        """The photos of the draft, or the example if they no longer exist."""
        workspace, draft = self._now(stored, request)
        return Dataset.of(workspace, _existing(workspace, draft.set)), draft


def _editable(workspace: Workspace, draft: Draft) -> tuple[Dataset, Draft]:
    """The user's photos for editing: a new dataset in place of the example, a copy if a run was started with them."""
    photos = Dataset.of(workspace, draft.set or workspace.new_image_set().name).editable(workspace)
    return photos, draft.moved_to(photos.id)


def _edit(photos: Dataset, action: str, files: list[str], event: gr.EventData) -> str:
    """Edit the photos whose button was clicked; returns the crop editor if it is to be opened."""
    match action:
        case "crop":
            return _crop_editor(photos, files[0])
        case "save":
            add_crop(photos, files[0], float(event.x), float(event.y), float(event.side))
        case "remove":
            photos.remove(files)
        case "caption":
            photos.set_caption(files[0], str(event.text))
        case _:
            photos.move(files[0], {"earlier": -1, "later": 1}[action])
    return ""


def _message(sentences: list[str]) -> gr.HTML:
    return gr.HTML("".join(parts.warning(each) for each in sentences), visible=bool(sentences))


def _existing(workspace: Workspace, set_id: str | None) -> str | None:
    """`set_id`, or None if there is no such dataset."""
    try:
        return Dataset.of(workspace, set_id).id
    except InputError:
        return None


def _examined(photos: Dataset, draft: Draft) -> str:
    """The cards with the results of the image checks."""
    return cards(photos, draft, WORKER.call("checked_images", photos) if photos.photos() else None)


def cards(photos: Dataset, draft: Draft, checked: CheckedImages | None = None) -> str:
    """All photos as cards in their order, below the findings about the whole dataset.

    Args:
        checked: the results of the image checks; None while they run.
    """
    prompt, checked = _settings(draft).prompt, checked or CheckedImages({}, ())
    photo_cards = [
        {
            "entry": photo,
            "src": thumbnail(photos.folder / photo.file),
            "checked": checked.images.get(photo.file, CHECKING),
            "proposal": "" if photo.caption else _proposal(prompt, photo.name),
        }
        for photo in photos.photos()
    ]
    return render("photos.html", photos=photo_cards, chips=CHIPS, together=checked.together, may_change=not photos.is_example)


def _proposal(prompt: str, name: str) -> str:
    words = " ".join(words_of(name)).lower()
    return f"{prompt}, {words}" if words and words not in prompt else ""


def _crop_editor(photos: Dataset, file: str) -> str:
    _, photo = photos.content().find(file)
    with Image.open(photos.folder / file) as opened:
        ratio = opened.width / opened.height
    return render("crop.html", file=file, title=photo.name, src=thumbnail(photos.folder / file, CROP_SIDE), ratio=ratio)


def _view(photos: Dataset, draft: Draft, checked: str | None = None) -> tuple[Any, ...]:
    """The updates of `VIEW`.

    Args:
        checked: the cards with the results of the image checks; None if the checks have not run.
    """
    has_photos = bool(photos.photos())
    model = _settings(draft).options.get("model", {}).get(MODEL) or DEMO
    choice = model if model in (DEMO, SDXL) else CHECKPOINT
    first = first_screen() if photos.is_example else {"images": ()}
    return (
        render("photos_intro.html", **first, has_own=draft.previous_set is not None),
        cards(photos, draft) if checked is None else checked,
        gr.Radio(value=choice, info=on_this_machine(model == DEMO)),
        gr.Textbox(model if choice == CHECKPOINT else "", visible=choice == CHECKPOINT),
        gr.Button(interactive=has_photos),
        gr.Button(interactive=has_photos),
        _signature(photos, draft),
    )


def _signature(photos: Dataset, draft: Draft) -> list[str]:
    settings = _settings(draft)
    values = (draft.previous_set, settings.prompt, settings.options.get("model"))
    return [str(photos.id), *map(str, values), *photos.signature()]


def _settings(draft: Draft) -> RunSettings:
    return draft.settings_of(draft.set or EXAMPLE)


@lru_cache(maxsize=1)
def first_screen() -> dict[str, list[Any]]:
    """The parts of the bundled run, four of its images in a square each, and images of the bundled classes with their names."""
    with Image.open(FIRST_RESULT) as opened:
        sheet = opened.convert("RGB")
    squares = []
    for row, first in FIRST_CELLS:
        square = Image.new("RGB", (2 * CELL, 2 * CELL))
        for index in range(4):
            left, top = CELL_TOP[0] + CELL_STEP[0] * (first + index), CELL_TOP[1] + CELL_STEP[1] * row
            square.paste(sheet.crop((left, top, left + CELL, top + CELL)), (CELL * (index % 2), CELL * (index // 2)))
        squares.append(data_url(square))
    with zipfile.ZipFile(CLASSES) as archive:
        shapes = [Image.open(io.BytesIO(archive.read(f"{name}/00.jpg"))) for name in CLASS_NAMES]
    return {"images": squares, "classes": [(data_url(image), name) for image, name in zip(shapes, CLASS_NAMES, strict=True)]}
