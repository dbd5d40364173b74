"""The screen Photos: what the app does, the subject's photos with the results of the image checks, and the base model."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import gradio as gr
from markupsafe import Markup
from PIL import Image

from pipelines.built_in import ASSETS
from pipelines.errors import InputError
from pipelines.image_formats import UPLOAD_FORMATS, listed
from pipelines.subject.folder_names import words_of
from pipelines.subject.usage import SDXL
from training.options.values import merged, without
from webui import panel
from webui.context import QUIET, SAVING, AppContext, take_files
from webui.datasets import Dataset
from webui.draft import EXAMPLE, Draft, RunSettings
from webui.inference_worker import WORKER, CheckedImages
from webui.render import address, in_cache, parts, render, thumbnail
from webui.screens.check import start_on_click
from webui.tasks import SubjectPlan, on_this_machine
from webui.uploads import add_crop, add_photos
from webui.workspace import Workspace

GONE = "Your photos no longer exist, so the example is shown. Add your photos again."
SCRIPTS = {name: Path(__file__).parents[1].joinpath(f"{name}.js").read_text(encoding="utf-8") for name in ("photos", "crop")}
CHOICES_JS = """element.addEventListener('click', event => {
  const button = event.target.closest('button');
  if (button) trigger(button.dataset.action === 'classify' ? 'select' : 'click', {action: button.dataset.action, files: []});
});"""
# Images of the run in assets/before-after.png, four in a square each, and of three of the bundled classes.
FIRST_SCREEN = ASSETS / "first-screen"
DEMO, CHECKPOINT = "demo", "checkpoint"
MODEL = "pretrained_model_name_or_path"
CROP_SIDE = 1024
# Held while it is decided which photos a request edits.
_BEGINNING = Lock()


def build(context: AppContext) -> None:
    """Put the screen into the open tab."""
    _Photos(context)


class _Photos:
    """The components of the screen and the handlers of their events."""

    def __init__(self, context: AppContext) -> None:
        self.context, self.draft = context, context.draft
        self.about = gr.HTML(js_on_load=CHOICES_JS, elem_id="photos-about")
        self._lay_out_uploads()
        self.message = gr.HTML(visible=False, elem_id="photos-message")
        self.crop = gr.HTML("", js_on_load=SCRIPTS["crop"], elem_id="photos-crop")
        self.cards = gr.HTML(js_on_load=SCRIPTS["photos"], elem_id="photos-cards")
        self._lay_out_model()
        with gr.Column(elem_id="photos-actions"):
            panel.build_plan(context, SubjectPlan, self.draft, context.draft_changed, "photos")
            with gr.Row():
                self.train = gr.Button("Train", min_width=120, variant="primary", size="lg", elem_id="photos-train")
                self.check = gr.Button("Check first", min_width=120, size="lg", elem_id="photos-check")
        # The signatures of the photos that the page shows, and of those whose checks it shows.
        self.signature, self.examined = gr.State([]), gr.State([])
        # The id of photos that are gone.
        self.lost = gr.State(None)
        self._wire()

    def _lay_out_uploads(self) -> None:
        small = {"size": "md", "scale": 0, "min_width": 160}
        label = "Photos, captions (.txt, .csv, .jsonl) or a zip"
        self.upload = gr.File(label=label, file_count="multiple", height=130, elem_id="photos-upload")
        with gr.Row(elem_classes="buttons"):
            self.folder = gr.UploadButton("Add a folder", file_count="directory", elem_id="photos-folder", **small)
            camera = gr.Button("Use the camera", elem_id="photos-camera-open", **small)
            formats = f"{listed(UPLOAD_FORMATS)}. Ctrl+V adds an image from the clipboard."
            gr.HTML(parts.note(formats), elem_id="photos-formats")
        webcam = {"sources": ["webcam"], "type": "filepath", "label": "Camera"}
        self.camera = gr.Image(visible=False, elem_id="photos-camera", **webcam)
        camera.click(lambda: gr.Image(visible=True), None, self.camera, **QUIET)
        # The files of the newest upload.
        self.files = gr.File(file_count="multiple", visible="hidden")

    def _lay_out_model(self) -> None:
        settings, titles = self.context.settings, {DEMO: "Demo model (64 px, offline)", SDXL: "SDXL 1.0 (1024 px)"}
        choices = [(titles.get(name, Path(name).name), name) for name in (DEMO, *settings.base_models)]
        if settings.is_local:
            choices = [*((title, name) for name, title in titles.items()), ("Own checkpoint", CHECKPOINT)]
        info = "A hub name, a folder in diffusers' layout, or a .safetensors file on this machine, of SDXL's architecture."
        with gr.Group():
            self.model = gr.Radio(choices, value=DEMO, label="Base model", info=" ", elem_id="photos-model")
            self.path = gr.Textbox(label="Own checkpoint", info=info, max_lines=1, visible=False, elem_id="photos-model-path")

    def _wire(self) -> None:
        """Connect the events."""
        draft = self.draft
        view = [self.about, self.cards, self.model, self.path, self.train, self.check, self.signature, self.examined]
        begun = [
            event(self.show, [draft, self.signature], [self.lost, *view], **QUIET)
            for event in (self.context.page.load, self.context.draft_changed.change)
        ]
        # A separate event: Gradio would loop if the draft were an output of its own change event.
        self.lost.change(self.forget, draft, draft, **QUIET)
        uploads = [(self.upload, self.upload.upload), (self.folder, self.folder.upload), (self.camera, self.camera.input)]
        for source, event in uploads:
            take_files(event, source, self.files)
        busy = SAVING | {"show_progress_on": [self.upload]}
        added = [draft, self.message, *view]
        begun.append(self.files.change(self.add, [draft, self.files], added, trigger_mode="multiple", **busy))
        edited = [draft, self.message, self.crop, *view]
        begun += [clicked.click(self.act, draft, edited, **QUIET) for clicked in (self.about, self.cards, self.crop)]
        for event in begun:
            inputs = [draft, self.signature, self.examined]
            event.then(self.examine, inputs, [self.cards, self.examined], trigger_mode="always_last", **QUIET)
        picked = [self.model.input, self.path.submit, self.path.blur]
        gr.on(picked, self.choose_model, [draft, self.model, self.path], [draft, *view], **QUIET)
        start_on_click(self.context, self.train)
        for opened, name in ((self.check.click, "check"), (self.about.select, "classify")):
            opened(lambda name=name: gr.Tabs(selected=name), None, self.context.tabs, **QUIET)

    def show(self, stored: dict[str, Any], sent: list[str], request: gr.Request) -> dict[Any, Any]:
        """The current photos, before the image checks are done, or the example if they no longer exist."""
        photos, draft = self._photos(stored, request)
        if photos.id != draft.set:
            gr.Warning(GONE, title="Photos not found")
            return {self.lost: draft.set, **self._view(photos, draft)}
        return gr.skip() if sent == _signature(photos, draft) else self._view(photos, draft)

    def forget(self, stored: dict[str, Any]) -> dict[str, Any]:
        """The draft without photos that no longer exist."""
        return replace(Draft.from_browser(stored), set=None, previous_set=None).to_browser()

    def examine(self, stored: dict[str, Any], sent: list[str], examined: list[str], request: gr.Request) -> dict[Any, Any]:
        """The cards with the results of the image checks; skipped if they are on the page already.

        `stored` may be older than `sent` if another dataset was chosen in the meantime. The signature of the photos that were
        checked is returned, so that the following call for the other dataset is not skipped.
        """
        photos, draft = self._photos(stored, request)
        now = _signature(photos, draft)
        if now == sent == examined:
            return gr.skip()
        return {self.cards: cards(photos, draft, _checks(photos)), self.examined: now}

    def add(self, stored: dict[str, Any], files: list[str] | None, request: gr.Request) -> dict[Any, Any]:
        """Add files, or a photo of the camera; unusable ones are refused with a reason."""
        if not files:
            return gr.skip()
        workspace, draft = self._now(stored, request)
        photos, draft = _editable(workspace, draft, request)
        added = add_photos(photos, files)
        notes = Markup("").join(map(parts.warning, (*added.refused, *added.notes)))
        message = gr.HTML(notes, visible=bool(notes))
        return {self.draft: draft.to_browser(), self.message: message, **self._view(photos, draft)}

    def act(self, stored: dict[str, Any], event: gr.EventData, request: gr.Request) -> dict[Any, Any]:
        """Do what the clicked button says: switch between the user's photos and the example, or edit photos."""
        workspace, draft = self._now(stored, request)
        action, editor, checked = str(event.action), "", None
        if action == "example":
            draft = replace(draft, set=None, previous_set=draft.set or draft.previous_set)
        elif action == "own":
            existing = draft.set or _existing(workspace, draft.previous_set)
            draft = replace(draft, set=existing or workspace.new_image_set().name)
        elif action != "cancel":
            photos, draft = _editable(workspace, draft, request)
            editor = _edit(photos, action, [str(file) for file in event.files], event)
            checked = None if action == "crop" else _checks(photos)
        view = self._view(Dataset.of(workspace, draft.set), draft, checked)
        return {self.draft: draft.to_browser(), self.message: gr.HTML(visible=False), self.crop: editor, **view}

    def choose_model(self, stored: dict[str, Any], model: str, path: str, request: gr.Request) -> dict[Any, Any]:
        """Store the base model in the draft. Until the name of an own checkpoint is entered, it is the demo model."""
        workspace, draft = self._now(stored, request)
        name = {DEMO: "", CHECKPOINT: path.strip()}.get(model, model)
        settings = _settings(draft)
        options = merged(without(settings.options, {"model": [MODEL]}), {"model": {MODEL: name}} if name else {})
        draft = draft.with_settings(draft.set or EXAMPLE, replace(settings, options=options))
        view = self._view(Dataset.of(workspace, draft.set), draft)
        if model == CHECKPOINT and not name:
            view |= {self.model: gr.skip(), self.path: gr.Textbox(visible=True)}
        return {self.draft: draft.to_browser(), **view}

    def _now(self, stored: dict[str, Any], request: gr.Request) -> tuple[Workspace, Draft]:
        return self.context.settings.workspace(request), Draft.from_browser(stored)

    def _photos(self, stored: dict[str, Any], request: gr.Request) -> tuple[Dataset, Draft]:
        """The photos of the draft, or the example if they no longer exist."""
        workspace, draft = self._now(stored, request)
        return Dataset.of(workspace, _existing(workspace, draft.set)), draft

    def _view(self, photos: Dataset, draft: Draft, checked: CheckedImages | None = None) -> dict[Any, Any]:
        """The components that show the photos and the draft.

        Args:
            checked: the results of the image checks; None if they have not run.
        """
        model = _settings(draft).options.get("model", {}).get(MODEL) or DEMO
        choice = model if model in (DEMO, SDXL) else CHECKPOINT
        images = {path.stem: address(in_cache(path)) for path in FIRST_SCREEN.glob("*.webp")} if photos.is_example else {}
        signature = _signature(photos, draft)
        return {
            self.about: render("photos_intro.html", images=images, has_own=draft.previous_set is not None),
            self.cards: cards(photos, draft, checked),
            self.model: gr.Radio(value=choice, info=on_this_machine(model == DEMO)),
            self.path: gr.Textbox(model if choice == CHECKPOINT else "", visible=choice == CHECKPOINT),
            self.train: gr.Button(interactive=bool(photos.photos())),
            self.check: gr.Button(interactive=bool(photos.photos())),
            self.signature: signature,
            # An examination may have ended between an upload and this view of it, and its results are then replaced.
            self.examined: [] if checked is None else signature,
        }


def _editable(workspace: Workspace, draft: Draft, request: gr.Request | None) -> tuple[Dataset, Draft]:
    """The user's photos for editing: a new dataset in place of the example, a copy if a run was started with them."""
    session = None if request is None else request.session_hash
    with _BEGINNING:
        photos = Dataset.of(workspace, draft.set)
        if photos.is_example or photos.content().is_sealed:
            begun = _begun(workspace, session, draft.set, draft.previous_set, draft.version)
            # A run may have been started with it in the meantime.
            photos = Dataset.of(workspace, begun).editable(workspace)
    return photos, draft.moved_to(photos.id)


@lru_cache(maxsize=1024)
def _begun(workspace: Workspace, session: str | None, set_id: str | None, previous: str | None, version: float) -> str:
    """The id of a new dataset or of the copy of `set_id`: the same for all requests that were sent before the page knew it."""
    return str(Dataset.of(workspace, set_id or workspace.new_image_set().name).editable(workspace).id)


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


def _crop_editor(photos: Dataset, file: str) -> str:
    _, photo = photos.content().find(file)
    with Image.open(photos.folder / file) as opened:
        ratio = opened.width / opened.height
    return render("crop.html", file=file, title=photo.name, src=thumbnail(photos.folder / file, CROP_SIDE), ratio=ratio)


def _existing(workspace: Workspace, set_id: str | None) -> str | None:
    """`set_id`, or None if there is no such dataset."""
    try:
        return Dataset.of(workspace, set_id).id
    except InputError:
        return None


def _checks(photos: Dataset) -> CheckedImages | None:
    """The results of the image checks; None without photos."""
    return WORKER.call("checked_images", photos) if photos.photos() else None


def cards(photos: Dataset, draft: Draft, checked: CheckedImages | None = None) -> str:
    """All photos as cards in their order, below the findings about the whole dataset.

    Args:
        checked: the results of the image checks; None while they run.
    """
    prompt = _settings(draft).prompt
    proposals = {photo.file: _proposal(prompt, photo.name) for photo in photos.photos() if not photo.caption}
    values = {"dataset": photos, "checked": checked, "thumbnail": thumbnail, "proposals": proposals}
    return photos.read(lambda: render("photos.html", **values))


def _proposal(prompt: str, name: str) -> str:
    """A caption made of the prompt and a file's name; empty if the name says nothing new."""
    words = " ".join(words_of(name)).lower()
    return f"{prompt}, {words}" if words and words not in prompt else ""


def _signature(photos: Dataset, draft: Draft) -> list[str]:
    settings = _settings(draft)
    values = (draft.previous_set, settings.prompt, settings.options.get("model"))
    return [str(photos.id), *map(str, values), *photos.signature()]


def _settings(draft: Draft) -> RunSettings:
    return draft.settings_of(draft.set or EXAMPLE)
