"""The gallery of generated images."""

from __future__ import annotations

import functools
import html
from pathlib import Path
from typing import Any

import gradio as gr

from webui.generation import GeneratedImages, settings_of
from webui.render import CRISP_SIDE, in_cache
from webui.workspace import Workspace

GALLERY_SIZE = 48
HINT = "<p class='quiet'>Click an image to see its settings. They are also stored in its file.</p>"
NO_IMAGES = """<div class="empty"><p>Generated images appear here, newest first. They stay when you close the page.</p></div>"""


def gallery_of(workspace: Workspace) -> list[Any]:
    """Updates of the gallery, with the user's newest images and their settings as captions, and of the hint below it."""
    items = [_cached(path, path.stat().st_mtime_ns) for path in GeneratedImages.of(workspace).newest()[:GALLERY_SIZE]]
    if any(not Path(cached).exists() for cached, *_ in items):
        _cached.cache_clear()
        return gallery_of(workspace)
    classes = ["captioned", *(["pixel"] if all(side <= CRISP_SIDE for *_, side in items) else [])]
    value = [(cached, line) for cached, line, _ in items]
    gallery = gr.Gallery(value=value, visible=bool(items), elem_classes=classes, selected_index=None)
    return [gallery, HINT if items else NO_IMAGES]


@functools.lru_cache(maxsize=4096)
def _cached(path: Path, changed: int) -> tuple[str, str, int]:
    """The cached copy of an image, its settings in one line, and its width in pixels."""
    settings, side = settings_of(path)
    return in_cache(path), one_line(settings), side


def one_line(settings: dict[str, Any]) -> str:
    """An image's settings in one line; escape it before it goes into HTML."""
    used = " + ".join(f"{each['name']} x {each['scale']:g}" for each in settings.get("adapters", [])) or "base model"
    return f"{settings['prompt']}; {used}; seed {settings['seed']}"


def bar_of(words: str, done: int, total: int) -> str:
    """The progress bar of a generation, with labels for screen readers."""
    share = 100 * done / max(1, total)
    return (
        f"<div class='bar' role='progressbar' aria-valuenow='{share:.0f}' aria-valuemin='0' aria-valuemax='100' "
        f"aria-label='{html.escape(words)}'><div style='width:{share:.1f}%'></div></div>"
        f"<p class='quiet'>{html.escape(words)}, step {done} of {total}</p>"
    )


def details_of(settings: dict[str, Any]) -> str:
    """An image's settings as a list."""
    used = settings.get("adapters") or []
    rows = {
        "Prompt": settings["prompt"],
        "Negative prompt": settings["negative_prompt"],
        "Adapters": ", ".join(f"{each['name']} at {each['scale']:g}" for each in used) or "none (base model)",
        "Seed": settings["seed"],
        "Steps, guidance scale": f"{settings['num_inference_steps']}, {settings['guidance_scale']:g}",
        "Model, sampler": f"{settings['model']}, {settings['sampler']}",
    }
    listed = "".join(f"<dt>{name}</dt><dd>{html.escape(str(value))}</dd>" for name, value in rows.items() if value != "")
    return f"<dl class='facts'>{listed}</dl>"
