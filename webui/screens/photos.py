"""The screen Photos: the subject's images with the results of the image checks, or the bundled example."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from pipelines.errors import InputError
from pipelines.image_formats import UPLOAD_FORMATS, listed
from webui import subject_runs
from webui.cards import SCRIPT, STYLE, cards, sentences
from webui.context import QUIET, AppContext, show_errors
from webui.datasets import Dataset
from webui.draft import Draft
from webui.inference_worker import WORKER
from webui.workspace import Workspace

EXAMPLE_INTRO = """<h2>Example subject</h2>
<p>These five images of a toy come with the app. <b>Train</b> trains an adapter on them in about three minutes on an ordinary
computer; the adapted model then generates images of the toy in new scenes. To train on your own subject, drop your photos
below.</p>"""
UPLOAD_INTRO = """<h2>Your photos</h2>
<p>Use three to ten sharp photos of one subject, taken from several sides, in different places and lighting. Each photo is
checked for common problems. The checks never change a photo.</p>"""
GONE = "Your photos no longer exist, so the example is shown. Add your photos again."
# The initial signature: nothing was sent to the page yet.
NOTHING_SHOWN: list[Any] = []
# The number of updates of `_view`.
PARTS = 7


def build(context: AppContext) -> None:
    """Put the screen into the open tab."""
    about = gr.HTML(EXAMPLE_INTRO, elem_id="photos-about")
    upload = gr.File(
        label=f"Add photos ({listed(UPLOAD_FORMATS)}) with optional captions (.txt, .caption, metadata.csv, .jsonl), or a zip",
        file_count="multiple",
        height=130,
        elem_id="photos-upload",
    )
    message = gr.HTML(visible=False, elem_id="photos-message")
    cards = gr.HTML(css_template=STYLE, js_on_load=SCRIPT, elem_id="photos-cards")
    with gr.Row():
        train = gr.Button("Train", variant="primary", size="lg", elem_id="photos-train")
        check = gr.Button("Check first", size="lg", elem_id="photos-check")
        start_button = gr.Button("Use your own photos", size="lg", elem_id="photos-own")
        example = gr.Button("Back to the example", size="lg", visible=False, elem_id="photos-example")
    signature, examined = gr.State(NOTHING_SHOWN), gr.State(NOTHING_SHOWN)
    view = [about, cards, train, check, start_button, example, signature]
    _wire(context, upload, message, examined, view, {"train": train, "check": check, "own": start_button, "example": example})


def _wire(
    context: AppContext, upload: gr.File, message: gr.HTML, examined: gr.State, view: list[Any], buttons: dict[str, gr.Button]
) -> None:
    """Connect the events."""
    handlers, (cards, signature) = _Handlers(context), (view[1], view[-1])
    draft = context.draft
    check_images = {"fn": handlers.examine, "inputs": [draft, signature, examined], "outputs": [cards, examined], **QUIET}
    gone = gr.State(0.0)
    for begun in (context.page.load, context.draft_changed.change):
        begun(handlers.show, [draft, signature], [gone, *view], **QUIET).then(**check_images)
    # A separate event: Gradio would loop if the draft were an output of its own change event.
    gone.change(handlers.forget, [draft], [draft], **QUIET)
    upload.upload(handlers.add, [draft, upload], [draft, upload, message, *view], api_visibility="private").then(**check_images)
    cards.click(handlers.act, [draft], [draft, message, *view], **QUIET).then(**check_images)
    for name in ("own", "example"):
        wanted = gr.State(name)
        buttons[name].click(handlers.change_to, [draft, wanted], [draft, message, *view], **QUIET).then(**check_images)
    buttons["train"].click(handlers.start, [draft], [draft, *context.outputs], api_visibility="private")
    buttons["check"].click(lambda: gr.Tabs(selected="check"), outputs=[context.tabs], **QUIET)


@dataclass(frozen=True)
class _Handlers:
    """Event handlers of the screen."""

    context: AppContext

    @show_errors
    def show(self, stored: dict[str, Any], names: list[str], request: gr.Request) -> tuple[Any, ...]:
        """The current photos, before the image checks are done."""
        workspace, draft = self.context.settings.workspace(request), Draft.from_browser(stored)
        try:
            photos = Dataset.of(workspace, draft.set)
        except InputError:
            gr.Warning(GONE, title="Photos not found")
            return time.time(), *_view(Dataset.of(workspace, None), draft)
        if names and names == _signature(photos, draft):
            return (gr.skip(),) * (1 + PARTS)
        return gr.skip(), *_view(photos, draft)

    @show_errors
    def forget(self, stored: dict[str, Any]) -> dict[str, Any]:
        """The draft without photos that no longer exist."""
        return replace(Draft.from_browser(stored), set=None, previous_set=None).to_browser()

    @show_errors
    def examine(self, stored: dict[str, Any], names: list[str], before: list[str], request: gr.Request) -> tuple[Any, Any]:
        """The cards with the results of the image checks; skipped if they are on the page already.

        `stored` may be older than `names` if another dataset was chosen in the meantime. The signature of the photos that were
        checked is returned, so that the following call for the other dataset is not skipped.
        """
        draft = Draft.from_browser(stored)
        photos = Dataset.of(self.context.settings.workspace(request), draft.set)
        now = _signature(photos, draft)
        if now == names == before:
            return gr.skip(), gr.skip()
        return _examined(photos), now

    @show_errors
    def add(self, stored: dict[str, Any], files: list[str] | None, request: gr.Request) -> tuple[Any, ...]:
        """Add the dropped files; unusable ones are refused with a reason."""
        from webui.photo_uploads import add_photos

        workspace = self.context.settings.workspace(request)
        with _editable_photos(workspace, stored) as (photos, draft):
            added = add_photos(photos, files or [])
        return draft.to_browser(), None, _message([*added.refused, *added.notes]), *_view(photos, draft)

    @show_errors
    def act(self, stored: dict[str, Any], event: gr.EventData, request: gr.Request) -> tuple[Any, ...]:
        """Move or remove the photo whose button was clicked."""
        action, file = str(event.action), str(event.file)
        with _editable_photos(self.context.settings.workspace(request), stored) as (photos, draft):
            if action == "remove":
                photos.remove([file])
            else:
                photos.move(file, {"earlier": -1, "later": 1}[action])
        return draft.to_browser(), _message([]), *_view(photos, draft, _examined(photos))

    @show_errors
    def change_to(self, stored: dict[str, Any], wanted: str, request: gr.Request) -> tuple[Any, ...]:
        """Switch between the user's photos and the example."""
        workspace, draft = self.context.settings.workspace(request), Draft.from_browser(stored)
        if wanted == "example":
            draft = replace(draft, set=None, previous_set=draft.set or draft.previous_set)
        elif draft.set is None:
            draft = replace(draft, set=_existing(workspace, draft.previous_set) or workspace.new_image_set().name)
        return draft.to_browser(), _message([]), *_view(Dataset.of(workspace, draft.set), draft)

    @show_errors
    def start(self, stored: dict[str, Any], request: gr.Request) -> tuple[Any, ...]:
        """Start the run, or ask for the class word if it is missing."""
        workspace, draft = self.context.settings.workspace(request), Draft.from_browser(stored)
        if not draft.kind.strip() and Dataset.of(workspace, draft.set).photos():
            gr.Info(
                "Enter the class word: what the photos show, such as dog or toy. Then press Train.", title="Class word missing"
            )
            return gr.skip(), *self.context.show(workspace, tab="check")
        stored, run_id = subject_runs.start(self.context, workspace, stored)
        return stored, *self.context.show(workspace, run_id, "train")


@contextlib.contextmanager
def _editable_photos(workspace: Workspace, stored: dict[str, Any]) -> Iterator[tuple[Dataset, Draft]]:
    """The user's photos for editing: a new dataset in place of the example, a copy if a run was started with them."""
    draft = Draft.from_browser(stored)
    set_id = draft.set or workspace.new_image_set().name
    photos = Dataset.of(workspace, set_id).editable(workspace)
    yield photos, replace(draft, set=photos.id, previous_set=None)


def _message(refused: list[str]) -> gr.HTML:
    return gr.HTML(sentences(refused), visible=bool(refused))


def _existing(workspace: Workspace, set_id: str | None) -> str | None:
    if set_id is None:
        return None
    try:
        return workspace.image_set(set_id).name
    except InputError:
        return None


def _examined(photos: Dataset) -> str:
    """The cards with the results of the image checks."""
    if not photos.photos():
        return cards(photos, None)
    checked = WORKER.call("checked_images", photos)
    return cards(photos, checked.images, checked.together)


def _view(photos: Dataset, draft: Draft, checked: str | None = None) -> tuple[Any, ...]:
    """The updates of the `PARTS` components that show the photos.

    Args:
        checked: the cards with the results of the image checks; None if the checks have not run.
    """
    has_photos = bool(photos.photos())
    label = "Back to your photos" if draft.previous_set else "Use your own photos"
    return (
        EXAMPLE_INTRO if photos.is_example else UPLOAD_INTRO,
        cards(photos, None) if checked is None else checked,
        gr.Button(interactive=has_photos),
        gr.Button(interactive=has_photos),
        gr.Button(label, visible=photos.is_example),
        gr.Button(visible=not photos.is_example),
        _signature(photos, draft),
    )


def _signature(photos: Dataset, draft: Draft) -> list[str]:
    return [str(photos.id), str(draft.previous_set), *photos.signature()]
