"""Pictures on disk: reading them, PNG files that carry their settings, and grids of pictures."""

from __future__ import annotations

import json
import struct
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from pipelines.errors import InputError

PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
# Named, since whatever a file is called, Pillow tells its format by its content, and starts Ghostscript for some.
PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
# All that Pillow raises for damaged files.
UNREADABLE = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    struct.error,
)
SETTINGS_KEY, A1111_KEY = "nora_vision", "parameters"
MIN_CELL, MARGIN, LABEL_LINES, LABEL_SIZE = 192, 6, 3, 14


def has_picture_name(name: str) -> bool:
    """Whether a file of this name is taken for a picture: its suffix is a picture's, and it is not hidden."""
    base = Path(name)
    return base.suffix.lower() in PICTURE_SUFFIXES and not base.name.startswith(".")


def is_picture(path: Path) -> bool:
    """Whether `path` is a file with a picture's suffix; hidden files are none."""
    return has_picture_name(path.name) and path.is_file()


@contextmanager
def opened_picture(source: Path | BinaryIO, name: str | None = None) -> Iterator[Image.Image]:
    """A picture, opened but not decoded.

    Args:
        source, name: as in `read_picture`.
    Raises: InputError naming the picture if it cannot be read, here or while it is decoded.
    """
    try:
        with Image.open(source, formats=PICTURE_FORMATS) as opened:
            yield opened
    except UNREADABLE as error:
        called = repr(str(source)) if name is None else name
        raise InputError(f"{called} cannot be read as a picture ({error}). Remove it or replace it.") from error


def read_picture(source: Path | BinaryIO, name: str | None = None, max_pixels: int | None = None) -> Image.Image:
    """Read a picture as RGB, upright as its EXIF orientation says; transparent parts become white.

    Args:
        source: a file, or its content.
        name: what errors call it; None for the file's path.
        max_pixels: more are refused before they are decoded; None for Pillow's own limit.
    Raises: InputError naming the picture if it cannot be read.
    """
    name = repr(str(source)) if name is None else name
    with opened_picture(source, name) as opened:
        if max_pixels is None or opened.width * opened.height <= max_pixels:
            return upright_rgb(opened)
        size = opened.size
    raise InputError(f"{name} must have at most {max_pixels:,} pixels, got {size[0]} x {size[1]}. Shrink it.")


def upright_rgb(opened: Image.Image) -> Image.Image:
    """`opened` as RGB, upright as its EXIF orientation says; transparent parts become white."""
    upright = ImageOps.exif_transpose(opened)
    if upright.mode.startswith("I"):
        # 16 bits a pixel, which Pillow would clip at 255.
        upright = upright.convert("F").point(lambda value: value / 257).convert("L")
    if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        upright = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
    return upright.convert("RGB")


def as_grid(pictures: list[Image.Image], columns: int) -> Image.Image:
    """The pictures in rows of `columns`; the places left over in the last row are black."""
    # It brings a model library, which nothing else here needs: the web app reads pictures before it loads one.

    # Here, since it loads torch, which reading a picture does not need.
    from diffusers.utils import make_image_grid

    rows = -(-len(pictures) // columns)
    blank = Image.new("RGB", pictures[0].size)
    return make_image_grid(pictures + [blank] * (rows * columns - len(pictures)), rows=rows, cols=columns)


def save_picture(picture: Image.Image, path: Path, settings: dict[str, object]) -> None:
    """Write a PNG that carries `settings` as JSON, and in the words that other programs read.

    Args:
        settings: at least prompt, negative_prompt, seed, num_inference_steps, guidance_scale, sampler and model.
    """
    info = PngInfo()
    info.add_itxt(SETTINGS_KEY, json.dumps(settings))
    info.add_itxt(A1111_KEY, _as_parameters(settings, picture))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, pnginfo=info)


def read_settings(path: Path) -> dict[str, object]:
    """The settings that `save_picture` put into a PNG.

    Raises: InputError naming the file if it carries none.
    """
    with Image.open(path) as picture:
        text = picture.info.get(SETTINGS_KEY)
    if text is None:
        raise InputError(f"{str(path)!r} carries no settings. Only pictures made by pipelines.subject.generate do.")
    return json.loads(text)


def _as_parameters(settings: dict[str, object], picture: Image.Image) -> str:
    fields = {
        "Steps": settings["num_inference_steps"],
        "Sampler": settings["sampler"],
        "CFG scale": settings["guidance_scale"],
        "Seed": settings["seed"],
        "Size": f"{picture.width}x{picture.height}",
        "Model": Path(str(settings["model"])).name,
    }
    listed = ", ".join(f"{name}: {value}" for name, value in fields.items())
    return f"{settings['prompt']}\nNegative prompt: {settings['negative_prompt']}\n{listed}"


def labelled_grid(rows: Sequence[tuple[str, Sequence[Image.Image]]], labels: Sequence[str]) -> Image.Image:
    """Rows of square pictures, each row with its title above and each column with its label below; small pictures are enlarged.

    Rows may be shorter than `labels`.
    """
    side = max(MIN_CELL, max(picture.width for _, pictures in rows for picture in pictures))
    font = ImageFont.load_default(LABEL_SIZE)
    line = LABEL_SIZE + 4
    height = len(rows) * (side + line + 2 * MARGIN) + LABEL_LINES * line
    sheet = Image.new("RGB", (len(labels) * (side + MARGIN) + MARGIN, height), "white")
    draw = ImageDraw.Draw(sheet)
    top = 0
    for title, pictures in rows:
        draw.text((MARGIN, top + MARGIN), title, fill="black", font=font)
        top += line + MARGIN
        for column, picture in enumerate(pictures):
            sheet.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (MARGIN + column * (side + MARGIN), top))
        top += side + MARGIN
    for column, label in enumerate(labels):
        wrapped = "\n".join(textwrap.wrap(label, width=side // 7)[:LABEL_LINES])
        draw.text((MARGIN + column * (side + MARGIN), top), wrapped, fill="black", font=font)
    return sheet
