"""An image from outside, checked before it is decoded and written anew, so that nothing but its pixels gets in."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pipelines.errors import InputError
from pipelines.image_decoding import TURNED, decode
from pipelines.image_formats import UPLOAD_FORMATS, DecoderMissingError, UnsupportedFormatError, listed
from pipelines.images import UNREADABLE, open_image

MAX_BYTES = 25 * 2**20
MAX_PIXELS = 40_000_000
# JPEG and WebP have limits of their own not far above.
MAX_SIDE = 16_000
# Up to SDXL's own size an image is kept pixel by pixel. A larger one is shrunk for training anyway, which hides what JPEG at
# 95 without chroma subsampling loses, while as PNG a photograph of 24 megapixels takes 40 MB and ten seconds.
LOSSLESS_PIXELS = 1024 * 1280
JPEG_QUALITY = 95
NAME_LENGTH = 100


@dataclass(frozen=True)
class UploadedImage:
    """An image, written anew.

    Args:
        content: the file.
        suffix: ".png" or ".jpg".
        notes: what is to be known about how it was read, each a sentence.
    """

    content: bytes
    suffix: str
    notes: tuple[str, ...] = ()


def read_upload(path: Path, name: str) -> UploadedImage:
    """The image in the file at `path`, upright, in sRGB and without metadata.

    Args:
        name: what errors call it.
    Raises: InputError in one sentence if it is none, too large or damaged.
    """
    try:
        size = path.stat().st_size
        check_size(size, name)
        return reencoded(path.read_bytes(), name)
    except OSError as error:
        raise InputError(f"{name} could not be read. Add it again.") from error


def check_size(size: int, name: str) -> None:
    """Raise InputError if an image's file of `size` bytes is too large."""
    if size > MAX_BYTES:
        raise InputError(
            f"{name} has {size / 2**20:.0f} MB, and an image may have {MAX_BYTES // 2**20} MB at most. "
            "Save it as JPEG, or smaller."
        )


def reencoded(content: bytes, name: str) -> UploadedImage:
    """The image in `content`, as of `read_upload`.

    Args:
        content: a whole file of whatever format.
        name: what errors call it.
    Raises: InputError as `read_upload`.
    """
    try:
        with open_image(io.BytesIO(content), name, UPLOAD_FORMATS) as opened:
            _check_extent(opened.size, name)
            read = decode(opened)
        notes = tuple(f"{name}: {note.words} {note.advice}" for note in read.notes if note is not TURNED)
        return _encoded(read.image, notes)
    except DecoderMissingError:
        raise
    except UnsupportedFormatError as error:
        raise _is_none(name) from error
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"{name} has more than {MAX_PIXELS // 1_000_000} million pixels. Shrink it and add it again.") from error
    except Image.UnidentifiedImageError as error:
        raise _is_none(name) from error
    except UNREADABLE as error:
        raise InputError(f"{name} is damaged or cut short. Add it again, or save it anew from the original.") from error


def display_name(path: str | Path) -> str:
    """What the page calls an uploaded file: the last part of its name, in printable characters, not too long."""
    last = str(path).replace("\\", "/").rsplit("/", 1)[-1]
    return shown_name(last) or "The file"


def shown_name(words: str) -> str:
    """`words` in one line of printable characters, at most `NAME_LENGTH`; may be empty."""
    printable = "".join(character if character.isprintable() else " " for character in words)
    return " ".join(printable.split())[:NAME_LENGTH].strip()


def _is_none(name: str) -> InputError:
    return InputError(f"{name} is not a {listed(UPLOAD_FORMATS)} image, whatever it is called. Save it as one of these.")


def _check_extent(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width * height > MAX_PIXELS or max(size) > MAX_SIDE:
        raise InputError(
            f"{name} measures {width:,} x {height:,}, and an image may have {MAX_PIXELS // 1_000_000} million pixels and "
            f"{MAX_SIDE:,} a side at most. Shrink it and add it again."
        )


def _encoded(image: Image.Image, notes: tuple[str, ...]) -> UploadedImage:
    plain = Image.new("RGB", image.size)
    plain.paste(image)
    stream = io.BytesIO()
    if plain.width * plain.height <= LOSSLESS_PIXELS:
        plain.save(stream, "PNG")
        return UploadedImage(stream.getvalue(), ".png", notes)
    plain.save(stream, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return UploadedImage(stream.getvalue(), ".jpg", notes)
