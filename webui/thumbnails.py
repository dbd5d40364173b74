"""Thumbnails of labelled images from any source, in Gradio's cache, the only folder that the server exposes."""

from __future__ import annotations

import html
import io
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from gradio.processing_utils import save_pil_to_cache
from gradio.utils import get_upload_folder
from PIL import Image

from pipelines.errors import InputError
from pipelines.fewshot.sources import DatasetSource, ImageFile
from pipelines.images import read_image_with_notes
from webui.render import address

SIDE, MAX_PIXELS = 128, 40_000_000


def image(source: DatasetSource | None, alt: str) -> str:
    """The thumbnail of an image as HTML, or a note if the image no longer exists.

    Args:
        alt: the alternative text; escaped here.
    """
    cached = None if source is None else small(source)
    if cached is None:
        return '<div class="gone">no longer exists</div>'
    path, tiny = cached
    css = ' class="tiny"' if tiny else ""
    return f'<img src="{html.escape(address(path))}" alt="{html.escape(alt)}" loading="lazy"{css}>'


def images(figures: Iterable[tuple[str, str]], css: str = "") -> str:
    """Images side by side.

    Args:
        figures: the HTML of `image` and the HTML of the caption, for each image.
    """
    cells = "".join(f"<figure>{tile}{f'<figcaption>{text}</figcaption>' if text else ''}</figure>" for tile, text in figures)
    return f'<div class="thumbs {css}">{cells}</div>'


def small(source: DatasetSource) -> tuple[str, bool] | None:
    """The thumbnail of an image in Gradio's cache, and whether the image is smaller than its place on the page.

    Returns: None if the image no longer exists or cannot be read.
    """
    try:
        if isinstance(source, ImageFile):
            state = source.path.stat()
            thumbnail = _of_file(source, state.st_mtime_ns, state.st_size)
        else:
            thumbnail = _of_bytes(source.content())
        # Gradio deletes cached files after a day.
        return thumbnail if Path(thumbnail[0]).exists() else _made(source.content())
    except (OSError, InputError):
        return None


@lru_cache(maxsize=4096)
def _of_file(source: ImageFile, changed: int, size: int) -> tuple[str, bool]:
    return _made(source.content())


@lru_cache(maxsize=4096)
def _of_bytes(content: bytes) -> tuple[str, bool]:
    return _made(content)


def _made(content: bytes) -> tuple[str, bool]:
    # The notes are dropped: training reports them.
    opened = read_image_with_notes(io.BytesIO(content), "The image", MAX_PIXELS).image
    tiny = max(opened.size) < SIDE
    opened.thumbnail((2 * SIDE, 2 * SIDE), Image.Resampling.LANCZOS)
    return save_pil_to_cache(opened, get_upload_folder(), format="webp"), tiny
