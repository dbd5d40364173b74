"""HTML from the Jinja2 templates of this package, and the images in it.

Every text is escaped; HTML that was rendered before is `Markup` and stays as it is. Images are served as copies in the cache of
Gradio, the only folder that the server exposes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from gradio.processing_utils import save_file_to_cache, save_pil_to_cache
from gradio.utils import get_upload_folder
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from training.subject.measured import Sample

# A component whose template says {{value}} evaluates these in its value, as Handlebars or as a JavaScript template string.
TEMPLATE_CHARACTERS = str.maketrans({"{": "&#123;", "}": "&#125;", "$": "&#36;", "`": "&#96;"})
# For a table cell of samples, and for a large place, on a screen with two device pixels per CSS pixel.
SMALL_SIDE, LARGE_SIDE = 384, 512
# Images up to this side are enlarged without smoothing.
CRISP_SIDE = 128


def escaped(value: object) -> object:
    """`value` escaped for HTML and for the templates of gr.HTML; Markup and undefined values as they are."""
    return value if isinstance(value, Markup | StrictUndefined) else Markup(str(escape(value)).translate(TEMPLATE_CHARACTERS))


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    finalize=escaped,
)
# The macros of parts.html for Python: parts.warning("The disk is full.").
parts: Any = TEMPLATES.get_template("parts.html").module


def render(name: str, **values: object) -> Markup:
    """The template `name` with `values`.

    Raises: jinja2.UndefinedError if the template needs a value that is missing.
    """
    return Markup(TEMPLATES.get_template(name).render(**values))


def sample_image(sample: Sample, alt: str = "") -> Markup:
    """A sample as an <img>."""
    return parts.image(thumbnail(sample.path), alt, "pixel" if sample.side <= CRISP_SIDE else "")


def in_cache(path: Path) -> str:
    """The copy of an image in Gradio's cache, from which the page may load it; its path contains the hash of its content."""
    return save_file_to_cache(path, get_upload_folder())


def address(cached: str) -> str:
    """The URL of a cached copy, relative to the page."""
    return f"gradio_api/file={quote(cached)}"


def thumbnail(path: Path, side: int = SMALL_SIDE) -> str:
    """The URL of an image, downscaled to at most `side` pixels."""
    return address(_cached(_thumbnail, path, side))


def enlarged(path: Path, side: int = LARGE_SIDE) -> str:
    """The cached copy of an image for a large place; small images are enlarged without smoothing."""
    return _cached(_enlarged, path, side)


def _cached(make: Callable[[Path, int, int], str], path: Path, side: int) -> str:
    """The cached result of `make`; made again if Gradio has deleted it because it was not used for a day."""
    cached = make(path, path.stat().st_mtime_ns, side)
    if not Path(cached).exists():
        make.cache_clear()
        cached = make(path, path.stat().st_mtime_ns, side)
    os.utime(cached)
    return cached


@lru_cache(maxsize=256)
def _enlarged(path: Path, changed: int, side: int) -> str:
    with Image.open(path) as image:
        if max(image.size) > CRISP_SIDE:
            return in_cache(path)
        factor = -(-side // max(image.size))
        large = image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
        return save_pil_to_cache(large, get_upload_folder(), format="png")


@lru_cache(maxsize=4096)
def _thumbnail(path: Path, changed: int, side: int) -> str:
    with Image.open(path) as image:
        if max(image.size) <= side:
            return in_cache(path)
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        return save_pil_to_cache(image.convert("RGB"), get_upload_folder(), format="webp")
