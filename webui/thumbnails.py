"""Small copies of labelled images, wherever they come from, as the page loads them: from gradio's own cache alone."""

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
from webui.images import address

SIDE, MAX_PIXELS = 128, 40_000_000


def image(source: DatasetSource | None, alt: str) -> str:
    """An image's small copy as HTML; a note where it is not there any more.

    Args:
        alt: what it shows, in users' words.
    """
    cached = None if source is None else small(source)
    if cached is None:
        return '<div class="gone">no longer there</div>'
    path, tiny = cached
    css = ' class="tiny"' if tiny else ""
    return f'<img src="{html.escape(address(path))}" alt="{html.escape(alt)}" loading="lazy"{css}>'


def images(figures: Iterable[tuple[str, str]], css: str = "") -> str:
    """Images side by side, each with what is said below it.

    Args:
        figures: HTML of `image`, and HTML of what is said.
    """
    cells = "".join(f"<figure>{tile}{f'<figcaption>{said}</figcaption>' if said else ''}</figure>" for tile, said in figures)
    return f'<div class="thumbs {css}">{cells}</div>'


def small(source: DatasetSource) -> tuple[str, bool] | None:
    """The small copy of an image in gradio's cache, and whether the image itself has no more pixels than are shown; None for
    one that is gone or cannot be read.
    """
    try:
        if isinstance(source, ImageFile):
            state = source.path.stat()
            thumbnail = _of_file(source, state.st_mtime_ns, state.st_size)
        else:
            thumbnail = _of_bytes(source.content())
        # Gradio forgets copies after a day.
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
    # Whoever reads it for training says what is to be known about it.
    picture_file = read_image_with_notes(io.BytesIO(content), "The image", MAX_PIXELS).image
    tiny = max(picture_file.size) < SIDE
    picture_file.thumbnail((2 * SIDE, 2 * SIDE), Image.Resampling.LANCZOS)
    return save_pil_to_cache(picture_file, get_upload_folder(), format="webp"), tiny
