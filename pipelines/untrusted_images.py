"""Images of strangers: identified by their content, checked against limits before they are decoded, and re-encoded.

Only the pixels are kept, so that neither metadata nor hidden content is stored.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pipelines.errors import InputError
from pipelines.fewshot.sources import DatasetSource
from pipelines.image_decoding import SEVERAL_JPEGS, TURNED, ReadImage, decode
from pipelines.image_formats import HEIC, JPEG, UPLOAD_FORMATS, DecoderMissingError, UnsupportedFormatError, listed
from pipelines.images import UNREADABLE, open_image

MAX_BYTES = 25 * 2**20
# Larger photos of phones are halved until they have at most MAX_PIXELS. A JPEG is halved while it is decoded, a HEIC only
# afterwards, so it needs more memory. Images of other formats are refused: a bomb of few bytes can have any number of pixels.
MAX_PIXELS = 40_000_000
MAX_PHOTO_PIXELS = {JPEG.pillow: 128_000_000, SEVERAL_JPEGS: 128_000_000, HEIC.pillow: 64_000_000}
# Just below the limits of JPEG and WebP.
MAX_SIDE = 16_000
# Images up to SDXL's resolution are stored losslessly. Larger ones are downscaled for training anyway, which hides the loss of
# JPEG at quality 95 without chroma subsampling; a PNG of a 24-megapixel photograph takes 40 MB and ten seconds.
LOSSLESS_PIXELS = 1024 * 1280
JPEG_QUALITY = 95


@dataclass(frozen=True)
class UploadedImage:
    """A re-encoded image.

    Args:
        content: the content of the file.
        suffix: ".png" or ".jpg".
        notes: sentences on how it was read.
    """

    content: bytes
    suffix: str
    notes: tuple[str, ...] = ()


def reencode(file: Path | DatasetSource, name: str) -> UploadedImage:
    """An image: upright, in sRGB, without metadata, with at most `MAX_PIXELS`.

    Args:
        name: its name in error messages.
    Raises: InputError if it is not an image, too large or damaged.
    """
    content = _content(file, name)
    try:
        with open_image(io.BytesIO(content), name, UPLOAD_FORMATS) as opened:
            size = opened.size
            read = _decoded(opened, name)
        notes = [f"{name}: {note.words} {note.advice}" for note in read.notes if note is not TURNED]
        if read.image.width * read.image.height < size[0] * size[1]:
            notes.append(_downscaled(name, size, read.image.size))
        return encoded(read.image, tuple(notes))
    except DecoderMissingError:
        raise
    except (UnsupportedFormatError, Image.UnidentifiedImageError) as error:
        raise InputError(f"{name} is not a {listed(UPLOAD_FORMATS)} image. Save it in one of these formats.") from error
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"{name} has too many pixels. Downscale it and add it again.") from error
    except UNREADABLE as error:
        raise InputError(f"{name} is damaged or truncated. Add it again, or export it again from the original.") from error


def _content(file: Path | DatasetSource, name: str) -> bytes:
    try:
        size = file.stat().st_size if isinstance(file, Path) else file.size()
        if size > MAX_BYTES:
            raise InputError(
                f"{name} is {size / 2**20:.0f} MB; an image may be at most {MAX_BYTES >> 20} MB. Save it as JPEG or downscale it."
            )
        return file.read_bytes() if isinstance(file, Path) else file.content()
    except OSError as error:
        raise InputError(f"{name} could not be read. Add it again.") from error


def _decoded(opened: Image.Image, name: str) -> ReadImage:
    width, height = opened.size
    most = MAX_PHOTO_PIXELS.get(opened.format, MAX_PIXELS)
    if width * height > most or max(opened.size) > MAX_SIDE:
        raise InputError(
            f"{name} is {width:,} x {height:,}; a {opened.format} image may have at most {most // 1_000_000} million pixels and "
            f"{MAX_SIDE:,} pixels per side. Downscale it, or save it as JPEG, and add it again."
        )
    factor = 1
    while width * height > MAX_PIXELS * factor**2:
        factor *= 2
    if factor > 1:
        opened.draft(None, (width // factor, height // factor))
    read = decode(opened)
    is_full = read.image.width * read.image.height > MAX_PIXELS
    return ReadImage(read.image.reduce(factor), read.notes) if is_full else read


def _downscaled(name: str, before: tuple[int, int], after: tuple[int, int]) -> str:
    pixels = before[0] * before[1] / 1_000_000
    return f"{name} has {pixels:.0f} million pixels. It was downscaled to {after[0]:,} x {after[1]:,}, more than training uses."


def encoded(image: Image.Image, notes: tuple[str, ...] = ()) -> UploadedImage:
    """The pixels of an image alone, as a file."""
    plain = Image.new("RGB", image.size)
    plain.paste(image)
    stream = io.BytesIO()
    if plain.width * plain.height <= LOSSLESS_PIXELS:
        plain.save(stream, "PNG")
        return UploadedImage(stream.getvalue(), ".png", notes)
    plain.save(stream, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return UploadedImage(stream.getvalue(), ".jpg", notes)
