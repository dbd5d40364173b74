"""Photos as cards: markup with buttons for mouse, touch and keyboard; user input is escaped."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from webui.datasets import Dataset
from webui.inference_worker import CheckedImage
from webui.render import thumbnail

CHIPS = {"good": "good", "look again": "warn", "left out": "bad"}
STYLE = """
.photo-cards { list-style: none; margin: 0; padding: 0; display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(205px, 1fr)); }
.photo-card { margin: 0 !important; display: flex; flex-direction: column; border: 1px solid var(--border-color-primary);
  border-radius: var(--radius-lg); overflow: hidden; background: var(--block-background-fill); }
.photo-card img { width: 100%; aspect-ratio: 1; object-fit: cover; display: block; background: var(--neutral-200); }
.photo-card .words { padding: .6rem .75rem; flex: 1; min-width: 0; }
.photo-card .title { display: flex; justify-content: space-between; gap: .5rem; align-items: center; }
.photo-card .title b { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; min-width: 0; }
.photo-card p { margin: .35rem 0 0; font-size: .88rem; line-height: 1.4; }
.photo-card .photo-actions { display: flex; padding: 0; gap: 0; border-top: 1px solid var(--border-color-primary); }
.photo-card button { flex: 1; min-width: 0; min-height: 40px; padding: 0; margin: 0; font-size: .85rem;
  background: none; border: 0; border-radius: 0; font-weight: 500; cursor: pointer; color: var(--body-text-color); }
.photo-card button + button { border-left: 1px solid var(--border-color-primary); }
.photo-card button:hover:not(:disabled) { background: var(--neutral-100); }
.photo-card button:focus-visible { outline: 2px solid var(--primary-500); outline-offset: -2px; }
.photo-card button:disabled { opacity: .35; cursor: default; }
.dark .photo-card button:hover:not(:disabled) { background: var(--neutral-800); }
.photo-findings { margin: 0 0 1rem; }
.photo-findings p { margin: 0; } .photo-findings p + p { margin-top: .4rem; }
@media (max-width: 480px) { .photo-cards { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .6rem; }
  .photo-card .words { padding: .5rem; } .photo-card .title { flex-direction: column; align-items: flex-start; gap: .2rem; }
  .photo-card .title b { max-width: 100%; } .photo-card button { font-size: .7rem; } }
"""
# One listener for all cards; the focus stays on the pressed button when its card moves.
SCRIPT = """
let pressed = null;
element.addEventListener('click', event => {
  const button = event.target.closest('button[data-action]');
  if (!button || button.disabled) return;
  pressed = {file: button.dataset.file, action: button.dataset.action};
  trigger('click', pressed);
});
watch('value', () => {
  if (!pressed) return;
  const of = action => [...element.querySelectorAll('button')].find(
    button => button.dataset.file === pressed.file && button.dataset.action === action && !button.disabled);
  const next = of(pressed.action) || of('later') || of('earlier') || element.querySelector('button:not(:disabled)');
  if (next) next.focus({preventScroll: true});
  pressed = null;
});
"""
EMPTY = """<div class="empty" id="photos-empty"><b>No photos yet.</b><br>
Drop three to ten photos of one subject above: sharp, from several sides, in different places, without similar objects.
</div>"""


def escaped(text: str) -> str:
    """`text` escaped for HTML and for Gradio's HTML templates."""
    return html.escape(text).replace("{", "&#123;").replace("}", "&#125;").replace("$", "&#36;").replace("`", "&#96;")


def cards(photos: Dataset, checked: Mapping[str, CheckedImage] | None, together: Sequence[str] = ()) -> str:
    """All photos as cards in their order, below the findings about the whole dataset.

    Args:
        checked: the results of the image checks by file; None while they run.
        together: findings about the whole dataset.
    """
    entries = photos.photos()
    if not entries:
        return EMPTY
    set_findings = "".join(f"<p>{escaped(sentence)}</p>" for sentence in together)
    items = []
    for index, entry in enumerate(entries):
        image_check = None if checked is None else checked.get(entry.file)
        buttons = "" if photos.is_example else _buttons(entry.file, entry.name, index == 0, index == len(entries) - 1)
        findings = "" if image_check is None else "".join(f"<p>{escaped(sentence)}</p>" for sentence in image_check.sentences)
        title = f'<div class="title"><b title="{escaped(entry.name)}">{escaped(entry.name)}</b>{_verdict(image_check)}</div>'
        words = f'<div class="words">{title}{_caption(entry.caption)}{findings}</div>'
        image = f'<img src="{thumbnail(photos.folder / entry.file)}" alt="Photo {index + 1}: {escaped(entry.name)}">'
        items.append(f'<li class="photo-card" data-file="{entry.file}">{image}{words}{buttons}</li>')
    above = f'<div class="photo-findings warning" role="status">{set_findings}</div>' if set_findings else ""
    return f'{above}<ol class="photo-cards">{"".join(items)}</ol>'


def _verdict(image_check: CheckedImage | None) -> str:
    if image_check is None:
        return '<span class="chip">checking</span>'
    return f'<span class="chip {CHIPS[image_check.verdict]}">{image_check.verdict}</span>'


def _caption(caption: str) -> str:
    return f'<p class="caption">Caption: {escaped(caption)}</p>' if caption else ""


def _buttons(file: str, name: str, is_first: bool, is_last: bool) -> str:
    def button(action: str, word: str, label: str, disabled: bool = False) -> str:
        off = " disabled" if disabled else ""
        return (
            f'<button type="button" data-action="{action}" data-file="{file}" aria-label="{escaped(label)}"{off}>{word}</button>'
        )

    return (
        '<div class="photo-actions">'
        + button("earlier", "Earlier", f"Move {name} one position earlier", is_first)
        + button("later", "Later", f"Move {name} one position later", is_last)
        + button("remove", "Remove", f"Remove {name}")
        + "</div>"
    )


def sentences(refused: Sequence[str]) -> str:
    """The sentences about refused files as HTML; empty if there are none."""
    listed = "".join(f"<p>{escaped(sentence)}</p>" for sentence in refused)
    return f'<div class="warning" role="alert">{listed}</div>' if listed else ""
