"""The screen Photos: what the app does, the subject's photos with the results of the image checks, and the base model."""

from __future__ import annotations

import contextlib
import io
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
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
from webui import panel
from webui.context import QUIET, AppContext
from webui.datasets import Dataset
from webui.draft import EXAMPLE, Draft, RunSettings
from webui.inference_worker import WORKER
from webui.render import data_url, parts, render, thumbnail
from webui.tasks import SUBJECT, on_this_machine
from webui.uploads import add_crop, add_photos
from webui.workspace import Workspace

CHIPS = {"good": "good", "look again": "warn", "left out": "bad"}
GONE = "Your photos no longer exist, so the example is shown. Add your photos again."
SCRIPTS = {name: Path(__file__).parents[1].joinpath(f"{name}.js").read_text(encoding="utf-8") for name in ("photos", "crop")}
# The bundled run: cells of assets/before-after.png, by row and first column, with their titles.
FIRST_RESULT = ASSETS / "before-after.png"
CELL, CELL_STEP, CELL_TOP = 192, (198, 222), (6, 24)
FIRST_RESULT_PARTS = (
    (0, 0, "The photos", "Four images of a toy monster with one eye."),
    (1, 1, "Before: the model does not know it", "Four blurred toys of other shapes and colours."),
    (3, 1, "After three minutes of training", "The toy monster in the snow, in the forest, at night and in the water."),
)
CLASSES, CLASS_NAMES = ASSETS / "sample-classes" / "coloured-shapes.zip", ("red star", "green heart", "blue ring")
DEMO, CHECKPOINT = "demo", "checkpoint"
CROP_SIDE = 1024
# The components that show the photos and the draft.
VIEW = ("about", "cards", "model", "path", "machine", "train", "check", "own", "example", "classify", "signature")
# The initial signature: nothing was sent to the page yet.
NOTHING_SENT: list[Any] = []


def build(context: AppContext) -> None:
    """Put the screen into the open tab."""
    widgets = {"about": gr.HTML(elem_id="photos-about")}
    with gr.Row(elem_classes="buttons"):
        for name, label in (("own", "Use your own photos"), ("example", "Back to the example"), ("classify", "Classify images")):
            widgets[name] = gr.Button(
                label, size="md", scale=0, min_width=200, visible=name != "example", elem_id=f"photos-{name}"
            )
    widgets["upload"] = gr.File(
        label="Photos, captions (.txt, .csv, .jsonl) or a zip",
        file_count="multiple",
        height=130,
        elem_id="photos-upload",
    )
    with gr.Row(elem_classes="buttons"):
        widgets["folder"] = gr.UploadButton(
            "Add a folder", file_count="directory", size="md", scale=0, min_width=130, elem_id="photos-folder"
        )
        camera = gr.Button("Use the camera", size="md", scale=0, min_width=160, elem_id="photos-camera-open")
        gr.HTML(
            f"<p class='quiet'>{listed(UPLOAD_FORMATS)}. Ctrl+V adds an image from the clipboard.</p>", elem_id="photos-formats"
        )
    widgets["camera"] = gr.Image(sources=["webcam"], type="filepath", label="Camera", visible=False, elem_id="photos-camera")
    widgets["message"] = gr.HTML(visible=False, elem_id="photos-message")
    widgets["crop"] = gr.HTML("", js_on_load=SCRIPTS["crop"], elem_id="photos-crop")
    widgets["cards"] = gr.HTML(js_on_load=SCRIPTS["photos"], elem_id="photos-cards")
    _lay_out_model(context, widgets)
    with gr.Column(elem_id="photos-actions"):
        panel.build_plan(context, SUBJECT, context.draft, context.draft_changed, "photos")
        with gr.Row():
            widgets["train"] = gr.Button("Train", min_width=120, variant="primary", size="lg", elem_id="photos-train")
            widgets["check"] = gr.Button("Check first", min_width=120, size="lg", elem_id="photos-check")
    widgets["signature"], widgets["examined"] = gr.State(NOTHING_SENT), gr.State(NOTHING_SENT)
    camera.click(lambda: gr.Image(visible=True), None, [widgets["camera"]], **QUIET)
    _wire(context, widgets)


def _lay_out_model(context: AppContext, widgets: dict[str, Any]) -> None:
    settings = context.settings
    offered = (SDXL,) if settings.is_local else settings.base_models
    choices = [("Demo model (64 px, offline)", DEMO), *((_model_name(name), name) for name in offered)]
    choices += [("Own checkpoint", CHECKPOINT)] if settings.is_local else []
    with gr.Group(elem_id="photos-model-group"):
        widgets["model"] = gr.Radio(choices, value=DEMO, label="Base model", elem_id="photos-model")
        widgets["path"] = gr.Textbox(
            label="Own checkpoint",
            info="A hub name, a folder in diffusers' layout, or a .safetensors file on this machine, of SDXL's architecture.",
            max_lines=1,
            visible=False,
            elem_id="photos-model-path",
        )
        widgets["machine"] = gr.HTML(elem_id="photos-machine")


def _wire(context: AppContext, widgets: dict[str, Any]) -> None:
    """Connect the events."""
    handlers, draft = _Handlers(context), context.draft
    view = [widgets[name] for name in VIEW]
    check_images = {
        "fn": handlers.examine,
        "inputs": [draft, widgets["signature"], widgets["examined"]],
        "outputs": [widgets["cards"], widgets["examined"]],
        **QUIET,
    }
    gone = gr.State(0.0)
    for begun in (context.page.load, context.draft_changed.change):
        begun(handlers.show, [draft, widgets["signature"]], [gone, *view], **QUIET).then(**check_images)
    # A separate event: Gradio would loop if the draft were an output of its own change event.
    gone.change(handlers.forget, [draft], [draft], **QUIET)
    added = {"api_visibility": "private", "show_progress": "minimal", "show_progress_on": [widgets["upload"]]}
    for source in ("upload", "folder", "camera"):
        event = widgets[source].input if source == "camera" else widgets[source].upload
        outputs = [draft, widgets[source], widgets["message"], *view]
        event(handlers.add, [draft, widgets[source]], outputs, **added).then(**check_images)
    changed = [draft, widgets["message"], widgets["crop"], *view]
    widgets["cards"].click(handlers.act, [draft], changed, **QUIET).then(**check_images)
    widgets["crop"].click(handlers.crop, [draft], changed, **QUIET).then(**check_images)
    for name in ("own", "example"):
        wanted = gr.State(name)
        widgets[name].click(handlers.change_to, [draft, wanted], [draft, widgets["message"], *view], **QUIET).then(**check_images)
    picked = [widgets["model"].input, widgets["path"].submit, widgets["path"].blur]
    gr.on(picked, handlers.choose_model, [draft, widgets["model"], widgets["path"]], [draft, *view], **QUIET)
    widgets["train"].click(handlers.start, [draft], context.outputs, api_visibility="private")
    for name in ("check", "classify"):
        widgets[name].click(lambda name=name: gr.Tabs(selected=name), outputs=[context.tabs], **QUIET)


@dataclass(frozen=True)
class _Handlers:
    """Event handlers of the screen."""

    context: AppContext

    def show(self, stored: dict[str, Any], sent: list[str], request: gr.Request) -> tuple[Any, ...]:
        """The current photos, before the image checks are done."""
        workspace, draft = self.context.settings.workspace(request), Draft.from_browser(stored)
        try:
            photos = Dataset.of(workspace, draft.set)
        except InputError:
            gr.Warning(GONE, title="Photos not found")
            return time.time(), *_view(Dataset.of(workspace, None), draft)
        if sent and sent == _signature(photos, draft):
            return (gr.skip(),) * (1 + len(VIEW))
        return gr.skip(), *_view(photos, draft)

    def forget(self, stored: dict[str, Any]) -> dict[str, Any]:
        """The draft without photos that no longer exist."""
        return replace(Draft.from_browser(stored), set=None, previous_set=None).to_browser()

    def examine(self, stored: dict[str, Any], sent: list[str], before: list[str], request: gr.Request) -> tuple[Any, Any]:
        """The cards with the results of the image checks; skipped if they are on the page already.

        `stored` may be older than `sent` if another dataset was chosen in the meantime. The signature of the photos that were
        checked is returned, so that the following call for the other dataset is not skipped.
        """
        draft = Draft.from_browser(stored)
        photos = Dataset.of(self.context.settings.workspace(request), draft.set)
        now = _signature(photos, draft)
        if now == sent == before:
            return gr.skip(), gr.skip()
        return _examined(photos, draft), now

    def add(self, stored: dict[str, Any], files: str | list[str] | None, request: gr.Request) -> tuple[Any, ...]:
        """Add files, or a photo of the camera; unusable ones are refused with a reason."""
        if not files:
            return (gr.skip(),) * (3 + len(VIEW))
        with _editable_photos(self.context.settings.workspace(request), stored) as (photos, draft):
            added = add_photos(photos, [files] if isinstance(files, str) else files)
        return draft.to_browser(), None, _message([*added.refused, *added.notes]), *_view(photos, draft)

    def act(self, stored: dict[str, Any], event: gr.EventData, request: gr.Request) -> tuple[Any, ...]:
        """Move, remove, caption or begin to crop the photos whose button was clicked."""
        action, files = str(event.action), [str(file) for file in event.files]
        with _editable_photos(self.context.settings.workspace(request), stored) as (photos, draft):
            if action == "crop":
                return draft.to_browser(), _message([]), _crop_editor(photos, files[0]), *_view(photos, draft)
            if action == "remove":
                photos.remove(files)
            elif action == "caption":
                photos.set_caption(files[0], str(event.text))
            else:
                photos.move(files[0], {"earlier": -1, "later": 1}[action])
        return draft.to_browser(), _message([]), gr.skip(), *_view(photos, draft, _examined(photos, draft))

    def crop(self, stored: dict[str, Any], event: gr.EventData, request: gr.Request) -> tuple[Any, ...]:
        """Add the chosen square as a new photo, or close the editor."""
        if event.action != "save":
            return (gr.skip(), gr.skip(), "", *(gr.skip(),) * len(VIEW))
        with _editable_photos(self.context.settings.workspace(request), stored) as (photos, draft):
            add_crop(photos, str(event.file), float(event.x), float(event.y), float(event.side))
        return draft.to_browser(), _message([]), "", *_view(photos, draft)

    def change_to(self, stored: dict[str, Any], wanted: str, request: gr.Request) -> tuple[Any, ...]:
        """Switch between the user's photos and the example."""
        workspace, draft = self.context.settings.workspace(request), Draft.from_browser(stored)
        if wanted == "example":
            draft = replace(draft, set=None, previous_set=draft.set or draft.previous_set)
        elif draft.set is None:
            draft = replace(draft, set=_existing(workspace, draft.previous_set) or workspace.new_image_set().name)
        return draft.to_browser(), _message([]), *_view(Dataset.of(workspace, draft.set), draft)

    def choose_model(self, stored: dict[str, Any], model: str, path: str, request: gr.Request) -> tuple[Any, ...]:
        """Store the base model in the draft."""
        workspace, draft = self.context.settings.workspace(request), Draft.from_browser(stored)
        name = path.strip() if model == CHECKPOINT else None if model == DEMO else model
        settings = _settings(draft)
        options = {group: dict(fields) for group, fields in settings.options.items()}
        options.setdefault("model", {}).pop("pretrained_model_name_or_path", None)
        if name:
            options["model"]["pretrained_model_name_or_path"] = name
        options = {group: fields for group, fields in options.items() if fields}
        draft = draft.with_settings(draft.set or EXAMPLE, replace(settings, options=options))
        updates = list(_view(Dataset.of(workspace, draft.set), draft))
        if model == CHECKPOINT and not name:
            # Until a name is entered, the demo model is the base model.
            updates[VIEW.index("model")], updates[VIEW.index("path")] = gr.skip(), gr.Textbox(visible=True)
        return draft.to_browser(), *updates

    def start(self, stored: dict[str, Any], request: gr.Request) -> list[Any]:
        """Start the run, or ask for the class word if it is missing."""
        workspace, draft = self.context.settings.workspace(request), Draft.from_browser(stored)
        if not _settings(draft).kind and Dataset.of(workspace, draft.set).photos():
            gr.Info(
                "Enter the class word: what the photos show, such as dog or toy. Then press Train.", title="Class word missing"
            )
            return self.context.show(workspace, tab="check")
        return self.context.show(workspace, SUBJECT.start(workspace, draft), "train")


@contextlib.contextmanager
def _editable_photos(workspace: Workspace, stored: dict[str, Any]) -> Iterator[tuple[Dataset, Draft]]:
    """The user's photos for editing: a new dataset in place of the example, a copy if a run was started with them."""
    draft = Draft.from_browser(stored)
    photos = Dataset.of(workspace, draft.set or workspace.new_image_set().name).editable(workspace)
    yield photos, draft.moved_to(photos.id)


def _message(sentences: list[str]) -> gr.HTML:
    return gr.HTML("".join(parts.warning(each) for each in sentences), visible=bool(sentences))


def _existing(workspace: Workspace, set_id: str | None) -> str | None:
    if set_id is None:
        return None
    try:
        return workspace.image_set(set_id).name
    except InputError:
        return None


def _examined(photos: Dataset, draft: Draft) -> str:
    """The cards with the results of the image checks."""
    if not photos.photos():
        return cards(photos, draft)
    checked = WORKER.call("checked_images", photos)
    return cards(photos, draft, checked.images, checked.together)


def cards(photos: Dataset, draft: Draft, checked: Mapping[str, Any] | None = None, together: Sequence[str] = ()) -> str:
    """All photos as cards in their order, below the findings about the whole dataset.

    Args:
        checked: the results of the image checks by file; None while they run.
        together: findings about the whole dataset.
    """
    values = []
    for photo in photos.photos():
        result = None if checked is None else checked.get(photo.file)
        verdict = "checking" if result is None else result.verdict
        values.append(
            {
                "file": photo.file,
                "name": photo.name,
                "caption": photo.caption,
                "src": thumbnail(photos.folder / photo.file),
                "verdict": verdict,
                "chip": CHIPS.get(verdict, ""),
                "findings": () if result is None else result.sentences,
                "proposal": "" if photo.caption else _proposal(_settings(draft).prompt, photo.name),
            }
        )
    return render("photos.html", photos=values, together=together, may_change=not photos.is_example)


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
    model = _settings(draft).options.get("model", {}).get("pretrained_model_name_or_path") or DEMO
    choice = model if model in (DEMO, SDXL) else CHECKPOINT
    return (
        render("photos_intro.html", **(first_screen() if photos.is_example else {"images": ()})),
        cards(photos, draft) if checked is None else checked,
        choice,
        gr.Textbox(model if choice == CHECKPOINT else "", visible=choice == CHECKPOINT),
        parts.note(on_this_machine(model == DEMO)),
        gr.Button(interactive=has_photos),
        gr.Button(interactive=has_photos),
        gr.Button("Back to your photos" if draft.previous_set else "Use your own photos", visible=photos.is_example),
        gr.Button(visible=not photos.is_example),
        gr.Button(visible=photos.is_example),
        _signature(photos, draft),
    )


def _model_name(name: str) -> str:
    return {DEMO: "demo model", SDXL: "SDXL 1.0 (1024 px)"}.get(name, Path(name).name)


def _signature(photos: Dataset, draft: Draft) -> list[str]:
    settings = _settings(draft)
    values = (draft.previous_set, settings.prompt, settings.options.get("model"))
    return [str(photos.id), *map(str, values), *photos.signature()]


def _settings(draft: Draft) -> RunSettings:
    return draft.settings_of(draft.set or EXAMPLE)


@lru_cache(maxsize=1)
def first_screen() -> dict[str, list[tuple[str, ...]]]:
    """The parts of the bundled run, four of its images in a square each, and images of the bundled classes."""
    with Image.open(FIRST_RESULT) as opened:
        sheet = opened.convert("RGB")
    made = []
    for row, first, title, alt in FIRST_RESULT_PARTS:
        square = Image.new("RGB", (2 * CELL, 2 * CELL))
        for index in range(4):
            left, top = CELL_TOP[0] + CELL_STEP[0] * (first + index), CELL_TOP[1] + CELL_STEP[1] * row
            square.paste(sheet.crop((left, top, left + CELL, top + CELL)), (CELL * (index % 2), CELL * (index // 2)))
        made.append((data_url(square), title, alt))
    with zipfile.ZipFile(CLASSES) as archive:
        shapes = [Image.open(io.BytesIO(archive.read(f"{name}/00.jpg"))) for name in CLASS_NAMES]
    return {"images": made, "classes": [(data_url(image), name) for image, name in zip(shapes, CLASS_NAMES, strict=True)]}
