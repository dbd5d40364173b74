"""Reading images, PNG files with their generation settings, and grids of images."""

from __future__ import annotations

import io
import json
import struct
import textwrap
import warnings
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from pipelines.errors import InputError
from pipelines.image_decoding import CODE_POINTS, TURNED, ReadImage, decode
from pipelines.image_formats import (
    FORMATS,
    HEAD_BYTES,
    IMAGE_SUFFIXES,
    PNG,
    TIFF,
    ImageFormat,
    UnsupportedFormatError,
    format_of,
    listed,
)
from pipelines.png_chunks import PngParts, split_png
from pipelines.text_files import write_atomically

# Increase this when the code reads other pixels from the same files, so that cached results are not reused.
READING_VERSION = 2
# Every exception that Pillow raises for damaged files.
UNREADABLE = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    RuntimeError,
    struct.error,
    zlib.error,
)
# TIFF tags of a camera's raw file, whose first page is only a preview.
TIFF_SUBFILE_TYPE, REDUCED, DNG_VERSION = 254, 1, 50706
SETTINGS_KEY, A1111_KEY = "nora_vision", "parameters"
MIN_CELL, MARGIN, LABEL_LINES, LABEL_SIZE = 192, 6, 3, 14


def has_image_name(name: str) -> bool:
    """Whether a file's name is that of an image: it has an image's suffix and is not hidden."""
    base = Path(name)
    return base.suffix.lower() in IMAGE_SUFFIXES and not base.name.startswith(".")


def is_image(path: Path) -> bool:
    """Whether `path` is a file with an image's suffix that is not hidden."""
    return has_image_name(path.name) and path.is_file()


@contextmanager
def open_image(source: Path | BinaryIO, name: str, formats: Collection[ImageFormat] = FORMATS) -> Iterator[Image.Image]:
    """Open an image without decoding it. Its format is recognised by its content, not by its name.

    Texts in a PNG are not decompressed, and those that are not needed are removed.

    Args:
        source: a file, or its content.
        name: the image's name in error messages.
        formats: the allowed ones.
    Raises: UnsupportedFormatError for another format, or one that this machine cannot decode; any of `UNREADABLE` for a
        damaged file or one that is not an image.
    """
    is_file = isinstance(source, Path)
    with source.open("rb") if is_file else nullcontext(source) as stream:
        stream.seek(0)
        image_format = format_of(stream.read(HEAD_BYTES), source.suffix if is_file else "", name)
        if image_format not in formats:
            raise UnsupportedFormatError(f"{name} cannot be read here: it is {image_format.name}. Save it as {listed(formats)}.")
        stream.seek(0)
        parts = split_png(stream, {SETTINGS_KEY}) if image_format is PNG else PngParts(stream)
        with _opened_as(image_format, parts.content) as opened:
            if parts.profile is not None:
                opened.info["icc_profile"] = parts.profile
            if parts.code_points is not None:
                opened.info[CODE_POINTS] = parts.code_points
            if image_format is TIFF and (DNG_VERSION in opened.tag_v2 or opened.tag_v2.get(TIFF_SUBFILE_TYPE, 0) & REDUCED):
                raise UnsupportedFormatError(
                    f"{name} cannot be read as an image: it is a camera's raw file. Save it as JPEG or PNG."
                )
            yield opened


def _opened_as(image_format: ImageFormat, content: BinaryIO) -> Image.Image:
    try:
        return Image.open(content, formats=(image_format.pillow,))
    except UnidentifiedImageError as error:
        # Pillow's message names the Python object that it read from.
        raise UnidentifiedImageError(f"it begins like {image_format.name}, but its header is damaged") from error


@contextmanager
def opened_image(source: Path | BinaryIO, name: str | None = None) -> Iterator[Image.Image]:
    """Open an image without decoding it.

    Args:
        source, name: as in `read_image`.
    Raises: InputError naming the image if it cannot be read, also while it is decoded within the context.
    """
    name = repr(str(source)) if name is None else name
    try:
        with open_image(source, name) as opened:
            yield opened
    except InputError:
        raise
    except UNREADABLE as error:
        raise InputError(f"{name} cannot be read as an image ({error}). Remove it or replace it.") from error


def read_image_with_notes(source: Path | BinaryIO, name: str | None = None, max_pixels: int | None = None) -> ReadImage:
    """Read an image as sRGB, upright by its EXIF orientation and with transparent parts white, with notes on how it was read.

    Args:
        source, name, max_pixels: as in `read_image`.
    Raises: InputError naming the image if it cannot be read.
    """
    name = repr(str(source)) if name is None else name
    with opened_image(source, name) as opened:
        if max_pixels is None or opened.width * opened.height <= max_pixels:
            return decode(opened)
        size = opened.size
    raise InputError(f"{name} must have at most {max_pixels:,} pixels, got {size[0]} x {size[1]}. Shrink it.")


def read_image(source: Path | BinaryIO, name: str | None = None, max_pixels: int | None = None) -> Image.Image:
    """Read an image as `read_image_with_notes` does; every note except that on its orientation becomes a warning.

    Args:
        source: a file, or its content.
        name: the image's name in messages; None for the file's path.
        max_pixels: images with more pixels are refused before decoding; None for Pillow's own limit.
    Raises: InputError naming the image if it cannot be read.
    """
    name = repr(str(source)) if name is None else name
    decoded = read_image_with_notes(source, name, max_pixels)
    _warn(decoded, name)
    return decoded.image


def upright_rgb(opened: Image.Image, name: str = "The image") -> Image.Image:
    """Decode an opened image as `read_image` does, with the same warnings."""
    decoded = decode(opened)
    _warn(decoded, name)
    return decoded.image


def _warn(decoded: ReadImage, name: str) -> None:
    for note in decoded.notes:
        if note is not TURNED:
            warnings.warn(f"{name}: {note.words} {note.advice}", stacklevel=3)


def as_grid(images: list[Image.Image], columns: int) -> Image.Image:
    """A grid of images with `columns` columns; unused cells in the last row are black."""
    # Imported here, as it imports torch, which the web app does not need to read images.
    from diffusers.utils import make_image_grid

    rows = -(-len(images) // columns)
    blank = Image.new("RGB", images[0].size)
    return make_image_grid(images + [blank] * (rows * columns - len(images)), rows=rows, cols=columns)


def save_image(image: Image.Image, path: Path, settings: dict[str, object]) -> None:
    """Write a PNG with its `settings` as JSON and in A1111's text format, which other programs read.

    Args:
        settings: at least prompt, negative_prompt, seed, num_inference_steps, guidance_scale, sampler and model.
    """
    info = PngInfo()
    info.add_itxt(SETTINGS_KEY, json.dumps(settings))
    info.add_itxt(A1111_KEY, _as_parameters(settings, image))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(image, path, info)


def save_png(image: Image.Image, path: Path, info: PngInfo | None = None) -> None:
    """Write a PNG with `info`. A reader, such as the web app, never sees half of it."""
    content = io.BytesIO()
    image.save(content, "PNG", pnginfo=info)
    write_atomically(path, content.getvalue())


def read_settings(path: Path) -> dict[str, object]:
    """The settings that `save_image` wrote into a PNG; keys of earlier versions become the current ones.

    Raises: InputError naming the file if it has none.
    """
    with opened_image(path) as image:
        text = image.info.get(SETTINGS_KEY)
    if text is None:
        raise InputError(f"{str(path)!r} holds no generation settings. Choose an image that was generated here.")
    settings = json.loads(text)
    if settings.get("adapters"):
        settings["adapters"] = [
            {"scale" if key == "strength" else key: value for key, value in adapter.items()} for adapter in settings["adapters"]
        ]
    return settings


def _as_parameters(settings: dict[str, object], image: Image.Image) -> str:
    fields = {
        "Steps": settings["num_inference_steps"],
        "Sampler": settings["sampler"],
        "CFG scale": settings["guidance_scale"],
        "Seed": settings["seed"],
        "Size": f"{image.width}x{image.height}",
        "Model": Path(str(settings["model"])).name,
    }
    listed = ", ".join(f"{name}: {value}" for name, value in fields.items())
    return f"{settings['prompt']}\nNegative prompt: {settings['negative_prompt']}\n{listed}"


def labelled_grid(rows: Sequence[tuple[str, Sequence[Image.Image]]], labels: Sequence[str]) -> Image.Image:
    """Rows of square images, each row with its title above and each column with its label below; small images are enlarged.

    Rows may be shorter than `labels`.
    """
    side = max(MIN_CELL, max(image.width for _, images in rows for image in images))
    font = ImageFont.load_default(LABEL_SIZE)
    line = LABEL_SIZE + 4
    height = len(rows) * (side + line + 2 * MARGIN) + LABEL_LINES * line
    sheet = Image.new("RGB", (len(labels) * (side + MARGIN) + MARGIN, height), "white")
    draw = ImageDraw.Draw(sheet)
    top = 0
    for title, images in rows:
        draw.text((MARGIN, top + MARGIN), title, fill="black", font=font)
        top += line + MARGIN
        for column, image in enumerate(images):
            sheet.paste(image.resize((side, side), Image.Resampling.LANCZOS), (MARGIN + column * (side + MARGIN), top))
        top += side + MARGIN
    for column, label in enumerate(labels):
        wrapped = "\n".join(textwrap.wrap(label, width=side // 7)[:LABEL_LINES])
        draw.text((MARGIN + column * (side + MARGIN), top), wrapped, fill="black", font=font)
    return sheet
