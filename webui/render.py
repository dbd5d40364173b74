"""HTML from the Jinja2 templates of this package, the images in it, and updates of components that are sent only once.

Every text is escaped; HTML that was rendered before is `Markup` and stays as it is. Images are served as copies in the cache of
Gradio, the only folder that the server exposes.
"""

from __future__ import annotations

import base64
import io
import os
import tempfile
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr
from gradio.processing_utils import save_file_to_cache
from gradio.utils import get_upload_folder
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from pipelines.errors import InputError
from pipelines.fewshot.sources import DatasetSource, ImageFile
from pipelines.image_decoding import decode
from pipelines.images import opened_image
from training.subject.measured import Sample

# A component whose template says {{value}} evaluates these in its value, as Handlebars or as a JavaScript template string.
TEMPLATE_CHARACTERS = str.maketrans({"{": "&#123;", "}": "&#125;", "$": "&#36;", "`": "&#96;"})
# For a table cell of samples, for a large place, and for a tile of a dataset, on a screen with two device pixels per CSS pixel.
SMALL_SIDE, LARGE_SIDE, TILE_SIDE = 384, 512, 128
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


def macros(name: str, **helpers: object) -> Any:
    """The macros of a template as functions that return Markup; they may use `helpers`, functions and constants by name."""
    return TEMPLATES.get_template(name).make_module(helpers)


# What every screen shows: parts.warning("The disk is full.").
parts = macros("parts.html")


def render(name: str, **values: object) -> Markup:
    """The template `name` with `values`.

    Raises: jinja2.UndefinedError if the template needs a value that is missing.
    """
    return Markup(TEMPLATES.get_template(name).render(**values))


def sample_image(sample: Sample, alt: str = "", loading: str = "lazy") -> Markup:
    """A sample as an <img>."""
    return parts.image(thumbnail(sample.path), alt, "pixel" if sample.side <= CRISP_SIDE else "", loading)


def data_url(image: Image.Image) -> str:
    """A small image as a data URL, which leaves no file in the cache."""
    content = io.BytesIO()
    image.save(content, "webp")
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"


def in_cache(path: Path) -> str:
    """The copy of an image in Gradio's cache, from which the page may load it; its path contains the hash of its content."""
    return save_file_to_cache(path, get_upload_folder())


def address(cached: str) -> str:
    """The URL of a cached copy, relative to the page."""
    return f"gradio_api/file={quote(cached)}"


def thumbnail(source: Path | DatasetSource, side: int = SMALL_SIDE) -> str:
    """The URL of an image of any format, downscaled to at most `side` pixels.

    Raises: InputError if it cannot be read; OSError if it no longer exists.
    """
    return address(_cached(_thumbnail, source, side)[0])


def enlarged(path: Path, side: int = LARGE_SIDE) -> str:
    """The cached copy of an image for a large place; small images are enlarged without smoothing."""
    return _cached(_enlarged, path, side)[0]


def small(source: DatasetSource) -> tuple[str, bool] | None:
    """The cached copy of an image for a tile, and whether the image is smaller than the tile; None if it cannot be read."""
    try:
        cached, longest = _cached(_thumbnail, source, 2 * TILE_SIDE)
    except (OSError, InputError):
        return None
    return cached, longest < TILE_SIDE


def tile(source: DatasetSource | None, alt: str) -> Markup:
    """An image for a tile, or a note if it no longer exists."""
    cached = None if source is None else small(source)
    return parts.gone_image() if cached is None else parts.image(address(cached[0]), alt, "tiny" if cached[1] else "")


def _cached(make: Callable[..., tuple[str, int]], source: Path | DatasetSource, side: int) -> tuple[str, int]:
    """The cached result of `make`; made again if Gradio has deleted it because it was not used for a day."""
    path = source.path if isinstance(source, ImageFile) else source
    changed = path.stat().st_mtime_ns if isinstance(path, Path) else 0
    result = make(source, changed, side)
    if not Path(result[0]).exists():
        make.cache_clear()
        result = make(source, changed, side)
    os.utime(result[0])
    return result


@lru_cache(maxsize=256)
def _enlarged(path: Path, changed: int, side: int) -> tuple[str, int]:
    with Image.open(path) as image:
        longest = max(image.size)
        if longest > CRISP_SIDE:
            return in_cache(path), longest
        factor = -(-side // longest)
        large = image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
        return _image_in_cache(large, "png"), longest


@lru_cache(maxsize=4096)
def _thumbnail(source: Path | DatasetSource, changed: int, side: int) -> tuple[str, int]:
    """The cached copy, and the longest side of the image itself."""
    content = source if isinstance(source, Path) else io.BytesIO(source.content())
    with opened_image(content, "The image") as opened:
        longest = max(opened.size)
        # A JPEG is decoded at a lower resolution; other formats ignore it.
        opened.draft(None, (2 * side, 2 * side))
        image = decode(opened).image
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return _image_in_cache(image, "webp" if longest > side else "png"), longest


def _image_in_cache(image: Image.Image, suffix: str) -> str:
    """The cached copy of a new image. Unlike `save_pil_to_cache`, it writes no file again that a browser may be loading."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"image.{suffix}"
        image.save(path)
        return in_cache(path)


@dataclass(frozen=True)
class LazyUpdate:
    """The update of one component, made only when needed.

    Args:
        key: differs whenever the content differs.
        make: returns the update.
    """

    key: Hashable
    make: Callable[[], Any]


def text(value: str) -> LazyUpdate:
    """HTML, hidden if empty."""
    value = str(value).strip()
    return lazy_text(value, lambda: value)


def lazy_text(key: Hashable, make: Callable[[], str]) -> LazyUpdate:
    """HTML that is slow to make, hidden if empty."""

    def update() -> gr.HTML:
        value = str(make()).strip()
        return gr.HTML(value=value, visible=bool(value))

    return LazyUpdate(key, update)


def component(kind: type[gr.blocks.Block], visible: bool, **properties: Any) -> LazyUpdate:
    """A component of this kind, visible or hidden, with other properties of it."""
    return LazyUpdate((visible, *properties.values()), lambda: kind(visible=visible, **properties))


def updates(
    now: Mapping[str, LazyUpdate], seen: Mapping[str, Hashable], components: Mapping[str, gr.blocks.Block], sees: gr.State
) -> dict[gr.blocks.Block, Any]:
    """The updates of those `components` whose content has changed, and that of what the page has seen then.

    Args:
        now: the current content, by the names of the components; others stay as they are.
        seen: the keys of what was sent before, the value of the state `sees`.
    """
    changed = [name for name, update in now.items() if name not in seen or seen[name] != update.key]
    sent = {components[name]: now[name].make() for name in changed}
    return sent | {sees: {**seen, **{name: now[name].key for name in changed}}}
