"""Check uploaded images before decoding and re-encode them, so that only their pixels are stored."""

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
# Just below the limits of JPEG and WebP.
MAX_SIDE = 16_000
# Images up to SDXL's resolution are stored losslessly. Larger ones are downscaled for training anyway, which hides the loss of
# JPEG at quality 95 without chroma subsampling; a PNG of a 24-megapixel photograph takes 40 MB and ten seconds.
LOSSLESS_PIXELS = 1024 * 1280
JPEG_QUALITY = 95
NAME_LENGTH = 100


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


def read_upload(path: Path, name: str) -> UploadedImage:
    """The image in the file at `path`: upright, in sRGB, without metadata.

    Args:
        name: its name in error messages.
    Raises: InputError if it is not an image, too large or damaged.
    """
    try:
        size = path.stat().st_size
        check_size(size, name)
        return reencoded(path.read_bytes(), name)
    except OSError as error:
        raise InputError(f"{name} could not be read. Add it again.") from error


def check_size(size: int, name: str) -> None:
    """Raise InputError if an image file of `size` bytes is too large."""
    if size > MAX_BYTES:
        raise InputError(
            f"{name} is {size / 2**20:.0f} MB; an image may be at most {MAX_BYTES // 2**20} MB. Save it as JPEG or downscale it."
        )


def reencoded(content: bytes, name: str) -> UploadedImage:
    """The image in `content`, re-encoded as `read_upload` does.

    Args:
        content: the bytes of a file of any format.
        name: its name in error messages.
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
        raise _not_an_image(name) from error
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(
            f"{name} has more than {MAX_PIXELS // 1_000_000} million pixels. Downscale it and add it again."
        ) from error
    except Image.UnidentifiedImageError as error:
        raise _not_an_image(name) from error
    except UNREADABLE as error:
        raise InputError(f"{name} is damaged or truncated. Add it again, or export it again from the original.") from error


def display_name(path: str | Path) -> str:
    """The display name of an uploaded file: the last part of its path in printable characters, truncated."""
    last = str(path).replace("\\", "/").rsplit("/", 1)[-1]
    return printable_name(last) or "The file"


def printable_name(text: str) -> str:
    """`text` as one line of at most `NAME_LENGTH` printable characters; may be empty."""
    printable = "".join(character if character.isprintable() else " " for character in text)
    return " ".join(printable.split())[:NAME_LENGTH].strip()


def _not_an_image(name: str) -> InputError:
    return InputError(f"{name} is not a {listed(UPLOAD_FORMATS)} image. Save it in one of these formats.")


def _check_extent(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width * height > MAX_PIXELS or max(size) > MAX_SIDE:
        raise InputError(
            f"{name} is {width:,} x {height:,}; an image may have at most {MAX_PIXELS // 1_000_000} million pixels and "
            f"{MAX_SIDE:,} pixels per side. Downscale it and add it again."
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
