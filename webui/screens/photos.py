"""The screen Photos: the images of the subject, the image check's findings, and the bundled example to begin with."""

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
from webui.app_context import QUIET, AppContext
from webui.cards import SCRIPT, STYLE, cards, sentences
from webui.draft import Draft
from webui.errors import in_plain_words
from webui.image_dataset import SubjectDataset
from webui.workspace import Workspace

OF_THE_EXAMPLE = """<h2>An example to begin with</h2>
<p>These five images of a made-up toy come with the app. <b>Train</b> shows the whole way with them, in about three minutes on a
plain computer: the app learns what the toy looks like and draws it in places where it never was.
Or drop photos of your own subject here.</p>"""
OF_YOUR_OWN = """<h2>Your photos</h2>
<p>Three to ten photos of one subject: sharp, from several sides, in several places and lights. The photo doctor looks at each and
says what it would change; it never changes a photo itself.</p>"""
GONE = "Your earlier photos are no longer there, so the example is shown. Add your photos again."
# What is shown last, so that what has not changed is not sent again.
NOTHING_SHOWN: list[Any] = []
# How many updates `_view` makes.
PARTS = 7


def build(context: AppContext) -> None:
    """Put the screen into the open tab."""
    about = gr.HTML(OF_THE_EXAMPLE, elem_id="photos-about")
    upload = gr.File(
        label=f"Add photos ({listed(UPLOAD_FORMATS)}), with captions (.txt, .caption, metadata.csv or .jsonl), or a zip of them",
        file_count="multiple",
        height=130,
        elem_id="photos-upload",
    )
    message = gr.HTML(visible=False, elem_id="photos-message")
    cards = gr.HTML(css_template=STYLE, js_on_load=SCRIPT, elem_id="photos-cards")
    with gr.Row():
        train = gr.Button("Train", variant="primary", size="lg", elem_id="photos-train")
        check = gr.Button("Check first", size="lg", elem_id="photos-check")
        start_button = gr.Button("Start with your own photos", size="lg", elem_id="photos-own")
        example = gr.Button("Back to the example", size="lg", visible=False, elem_id="photos-example")
    signature, examined = gr.State(NOTHING_SHOWN), gr.State(NOTHING_SHOWN)
    view = [about, cards, train, check, start_button, example, signature]
    _wire(context, upload, message, examined, view, {"train": train, "check": check, "own": start_button, "example": example})


def _wire(
    context: AppContext, upload: gr.File, message: gr.HTML, examined: gr.State, view: list[Any], buttons: dict[str, gr.Button]
) -> None:
    """Have everything listen."""
    does, (cards, signature) = _Handlers(context), (view[1], view[-1])
    draft = context.draft
    doctor = {"fn": does.examine, "inputs": [draft, signature, examined], "outputs": [cards, examined], **QUIET}
    gone = gr.State(0.0)
    for begun in (context.page.load, context.draft_changed.change):
        begun(does.look, [draft, signature], [gone, *view], **QUIET).then(**doctor)
    # By itself: a draft that is an output of its own change changes without end, whatever is put out.
    gone.change(does.forget, [draft], [draft], **QUIET)
    upload.upload(does.add, [draft, upload], [draft, upload, message, *view], api_visibility="private").then(**doctor)
    cards.click(does.act, [draft], [draft, message, *view], **QUIET).then(**doctor)
    for name in ("own", "example"):
        wanted = gr.State(name)
        buttons[name].click(does.change_to, [draft, wanted], [draft, message, *view], **QUIET).then(**doctor)
    buttons["train"].click(does.start, [draft], [draft, *context.outputs], api_visibility="private")
    buttons["check"].click(lambda: gr.Tabs(selected="check"), outputs=[context.tabs], **QUIET)


@dataclass(frozen=True)
class _Handlers:
    """What the screen does when something is pressed, dropped or changed."""

    context: AppContext

    @in_plain_words
    def look(self, stored: dict[str, Any], names: list[str], request: gr.Request) -> tuple[Any, ...]:
        """The photos as they are on the disk now, without waiting for the image check."""
        workspace, draft = self.context.settings.workspace(request), Draft.from_browser(stored)
        try:
            photos = SubjectDataset.of(workspace, draft.set)
        except InputError:
            gr.Warning(GONE, title="Photos are gone")
            return time.time(), *_view(SubjectDataset.of(workspace, None), draft)
        if names and names == _signature(photos, draft):
            return (gr.skip(),) * (1 + PARTS)
        return gr.skip(), *_view(photos, draft)

    @in_plain_words
    def forget(self, stored: dict[str, Any]) -> dict[str, Any]:
        """The draft without photos that are gone."""
        return replace(Draft.from_browser(stored), set=None, own=None).to_browser()

    @in_plain_words
    def examine(self, stored: dict[str, Any], names: list[str], before: list[str], request: gr.Request) -> tuple[Any, Any]:
        """The same with the image check's findings, unless that is what is shown.

        `stored` may be of a moment before `names`, where another set was chosen meanwhile: what is noted is what was examined, so
        that the call which follows for the other set has something to do.
        """
        draft = Draft.from_browser(stored)
        photos = SubjectDataset.of(self.context.settings.workspace(request), draft.set)
        now = _signature(photos, draft)
        if now == names == before:
            return gr.skip(), gr.skip()
        return _examined(photos), now

    @in_plain_words
    def add(self, stored: dict[str, Any], files: list[str] | None, request: gr.Request) -> tuple[Any, ...]:
        """Add what was dropped; what cannot be used is refused in a sentence, and the rest added."""
        from webui.photo_uploads import add_photos

        workspace = self.context.settings.workspace(request)
        with _own_photos(workspace, stored) as (photos, draft):
            added = add_photos(photos.folder, files or [])
        return draft.to_browser(), None, _message([*added.refused, *added.notes]), *_view(photos, draft)

    @in_plain_words
    def act(self, stored: dict[str, Any], event: gr.EventData, request: gr.Request) -> tuple[Any, ...]:
        """Move or remove the photo whose button was pressed."""
        action, file = str(event.action), str(event.file)
        with _own_photos(self.context.settings.workspace(request), stored) as (photos, draft):
            if action == "remove":
                photos.remove(file)
            else:
                photos.move(file, {"earlier": -1, "later": 1}[action])
        return draft.to_browser(), _message([]), *_view(photos, draft, _examined(photos))

    @in_plain_words
    def change_to(self, stored: dict[str, Any], wanted: str, request: gr.Request) -> tuple[Any, ...]:
        """To the user's own photos, which may be none yet, or to the example; neither loses the other."""
        workspace, draft = self.context.settings.workspace(request), Draft.from_browser(stored)
        if wanted == "example":
            draft = replace(draft, set=None, own=draft.set or draft.own)
        elif draft.set is None:
            draft = replace(draft, set=_still_there(workspace, draft.own) or workspace.new_image_set().name)
        return draft.to_browser(), _message([]), *_view(SubjectDataset.of(workspace, draft.set), draft)

    @in_plain_words
    def start(self, stored: dict[str, Any], request: gr.Request) -> tuple[Any, ...]:
        """Start the run, or ask for the one word that is missing first."""
        workspace, draft = self.context.settings.workspace(request), Draft.from_browser(stored)
        if not draft.kind.strip() and SubjectDataset.of(workspace, draft.set).entries():
            gr.Info("Say in a word what the photos show, such as dog or toy, and press Train here.", title="One word first")
            return gr.skip(), *self.context.show(workspace, tab="check")
        stored, run_id = subject_runs.start(self.context, workspace, stored)
        return stored, *self.context.show(workspace, run_id, "train")


@contextlib.contextmanager
def _own_photos(workspace: Workspace, stored: dict[str, Any]) -> Iterator[tuple[SubjectDataset, Draft]]:
    """The user's own photos, to be changed: a new set beside the example, a copy of what a run was started with."""
    draft = Draft.from_browser(stored)
    set_id = draft.set or workspace.new_image_set().name
    photos = SubjectDataset.of(workspace, set_id).editable(workspace)
    yield photos, replace(draft, set=photos.id, own=None)


def _message(refused: list[str]) -> gr.HTML:
    return gr.HTML(sentences(refused), visible=bool(refused))


def _still_there(workspace: Workspace, set_id: str | None) -> str | None:
    if set_id is None:
        return None
    try:
        return workspace.image_set(set_id).name
    except InputError:
        return None


def _examined(photos: SubjectDataset) -> str:
    """The cards with the image check's findings; the first time this loads libraries."""
    if not photos.entries():
        return cards(photos, None)
    from webui.work import photos as work_photos

    opinions = work_photos.opinions(photos)
    return cards(photos, opinions.images, opinions.together)


def _view(photos: SubjectDataset, draft: Draft, signature: str | None = None) -> tuple[Any, ...]:
    """Updates of what the screen shows: `signature`, or the cards before the image check has run."""
    has_photos = bool(photos.entries())
    label = "Back to your photos" if draft.own else "Start with your own photos"
    return (
        OF_THE_EXAMPLE if photos.is_example else OF_YOUR_OWN,
        cards(photos, None) if signature is None else signature,
        gr.Button(interactive=has_photos),
        gr.Button(interactive=has_photos),
        gr.Button(label, visible=photos.is_example),
        gr.Button(visible=not photos.is_example),
        _signature(photos, draft),
    )


def _signature(photos: SubjectDataset, draft: Draft) -> list[str]:
    return [str(photos.id), str(draft.own), *photos.signature()]
