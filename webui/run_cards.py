"""The list of runs as cards, each a button; user input is escaped."""

from __future__ import annotations

import html
import time
from collections.abc import Sequence
from pathlib import Path

from training.subject.measured import newest_sheet, sampled_steps, samples
from webui.figures import figures
from webui.progress import duration, phase_title
from webui.render import CRISP_SIDE, thumbnail
from webui.runs import RunView

EMPTY = """<div class="empty"><p><b>There are no runs yet.</b></p>
<p>Train on your photos under Photos, or on classes of images under Classify. Runs started in a terminal appear here
too.</p></div>"""
THUMBNAIL = 192
BEFORE_AFTER = "before_after.png"
KINDS = {"subject": "Subject", "classify": "Classifier"}
# One listener for all cards.
SCRIPT = """
element.addEventListener('click', event => {
  const card = event.target.closest('button[data-run]');
  if (card) trigger('select', {run: card.dataset.run});
});
"""


def cards(views: Sequence[RunView], chosen: str | None) -> str:
    """The list, with the selected run marked."""
    if not views:
        return EMPTY
    return f'<ul class="runs">{"".join(f"<li>{_card(view, view.id == chosen)}</li>" for view in views)}</ul>'


def _card(view: RunView, is_chosen: bool) -> str:
    return (
        f'<button type="button" class="run" data-run="{html.escape(view.id)}" aria-pressed="{str(is_chosen).lower()}">'
        f'{_image(view)}<span class="words"><span class="top"><b>{html.escape(view.name)}</b>'
        f'<span class="chip {view.state}">{view.state}</span></span>'
        f'<span class="quiet">{KINDS[view.task]}, {_when(view)}</span>{_state_detail(view)}{_figures(view)}</span></button>'
    )


def _when(view: RunView) -> str:
    began = time.strftime("%d %b %Y %H:%M", time.localtime(view.created))
    seconds = None if view.ended is None else view.ended - view.created
    took = f", ended after {duration(seconds)}" if seconds is not None and seconds > 0 else ""
    return f"started {began}{took}"


def _state_detail(view: RunView) -> str:
    """Progress, queue position, or the reason why it ended."""
    detail = ""
    if view.runs_before:
        detail = f"{view.runs_before} {'run' if view.runs_before == 1 else 'runs'} ahead in the queue"
    elif view.state == "running":
        detail = phase_title(view.status)
    elif view.reason:
        detail = view.reason
    detail = " ".join([detail, *view.file_errors]).strip()
    bar = ""
    if view.state == "running" and view.share_done is not None:
        bar = f'<span class="bar running"><span style="width:{view.share_done:.0%}"></span></span>'
    return bar + (f'<span class="detail">{html.escape(detail)}</span>' if detail else "")


def _figures(view: RunView) -> str:
    items = "".join(f"<span><i>{html.escape(name)}</i> {html.escape(value)}</span>" for name, value in figures(view))
    return f'<span class="figures">{items}</span>'


def image_of(view: RunView) -> tuple[Path, str] | None:
    """The image that represents a run and its CSS class; None before there is one."""
    steps = sampled_steps(view.record)
    newest = samples(view.record, steps[-1]) if steps else []
    if newest:
        return newest[0].path, "pixel" if newest[0].side <= CRISP_SIDE else ""
    sheets = [view.record.path / BEFORE_AFTER, *sorted((view.record.path / "figures").glob("*.png"))]
    sheet = next((path for path in sheets if path.is_file()), newest_sheet(view.record))
    return None if sheet is None else (sheet, "")


def _image(view: RunView) -> str:
    image_and_css = image_of(view)
    if image_and_css is None:
        return '<span class="none" aria-hidden="true"></span>'
    path, css = image_and_css
    source = html.escape(thumbnail(path, THUMBNAIL))
    return f'<img class="{css}" src="{source}" alt="" loading="lazy">'


def heading(view: RunView) -> str:
    """The run that the buttons apply to."""
    return f"<p>Selected: <b>{html.escape(view.title)}</b></p>"


def question(view: RunView) -> str:
    """The confirmation before deletion."""
    return (
        f"<p><b>Delete {html.escape(view.title)}?</b> Its adapter, images and other files are deleted permanently. "
        "The training photos are kept.</p>"
    )
