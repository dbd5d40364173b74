"""The supported image formats with their suffixes, and recognition of a file's format by its content.

Folder readers, uploads, and the lists of formats in messages and on the page all use this table.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from PIL import UnidentifiedImageError, features

from pipelines.errors import InputError
from pipelines.wording import alternatives


class UnsupportedFormatError(InputError):
    """A file is in an unsupported format; the message names the format and the remedy."""


class DecoderMissingError(UnsupportedFormatError):
    """A file's format needs a decoder that is not installed; the message says how to install it."""


@dataclass(frozen=True)
class ImageFormat:
    """A supported format.

    Args:
        name: its name for people.
        pillow: its name in Pillow.
        suffixes: of its files, in lower case.
        upload: whether the web app accepts it.
        remedy: how to install its decoder; empty if Pillow always has one.
    """

    name: str
    pillow: str
    suffixes: tuple[str, ...]
    upload: bool = True
    remedy: str = ""


JPEG = ImageFormat("JPEG", "JPEG", (".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif"))
PNG = ImageFormat("PNG", "PNG", (".png", ".apng"))
WEBP = ImageFormat("WebP", "WEBP", (".webp",))
GIF = ImageFormat("GIF", "GIF", (".gif",))
TIFF = ImageFormat("TIFF", "TIFF", (".tif", ".tiff"))
AVIF = ImageFormat("AVIF", "AVIF", (".avif",), remedy="upgrade Pillow (pip install --upgrade 'pillow>=11.3')")
HEIC = ImageFormat("HEIC", "HEIF", (".heic", ".heif", ".hif"), remedy="install pillow-heif (pip install pillow-heif)")
BMP = ImageFormat("BMP", "BMP", (".bmp",), upload=False)
FORMATS = (JPEG, PNG, WEBP, GIF, TIFF, AVIF, HEIC, BMP)

IMAGE_SUFFIXES = frozenset(suffix for each in FORMATS for suffix in each.suffixes)
UPLOAD_FORMATS = tuple(each for each in FORMATS if each.upload)
UPLOAD_SUFFIXES = tuple(suffix for each in UPLOAD_FORMATS for suffix in each.suffixes)
# The first bytes of a file, as many as are needed to recognise its format.
HEAD_BYTES = 512

_SIGNATURES = (
    (b"\xff\xd8\xff", JPEG),
    (b"\x89PNG\r\n\x1a\n", PNG),
    (b"GIF87a", GIF),
    (b"GIF89a", GIF),
    (b"II*\0", TIFF),
    (b"MM\0*", TIFF),
    (b"II+\0", TIFF),
    (b"MM\0+", TIFF),
    (b"BM", BMP),
)
_CR2_MARK = slice(8, 10)
# ISO base media files: the brand after "ftyp". HEIF containers ("mif1", "msf1") hold AVIF where a compatible brand says so.
_HEIC_BRANDS = frozenset({b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1"})
_AVIF_BRANDS = frozenset({b"avif", b"avis"})
_OTHER_SIGNATURES = (
    (b"\xff\x0a", "a JPEG XL image"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL image"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000 image"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000 image"),
    (b"8BPS", "a Photoshop document"),
    (b"%PDF", "a PDF document"),
    (b"%!PS", "a PostScript document"),
    (b"\0\0\x01\0", "an icon file"),
    (b"PK\x03\x04", "a zip archive"),
    (b"IIRO", "a camera's raw file"),
    (b"IIRS", "a camera's raw file"),
    (b"IIU\0", "a camera's raw file"),
    (b"FUJIFILMCCD-RAW", "a camera's raw file"),
    (b"version https://git-lfs", "a Git LFS pointer; `git lfs pull` downloads the file itself"),
)
_MARKUP = re.compile(rb"\A(?:\xef\xbb\xbf)?\s*<(?:\?xml|!--|!doctype|html|head|body|svg)", re.IGNORECASE)


def sniff(head: bytes) -> ImageFormat | None:
    """The format of a file by its first `HEAD_BYTES` bytes; None if it is not supported."""
    if head[_CR2_MARK] == b"CR" and head.startswith(b"II*\0"):
        return None
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return WEBP
    if head[4:8] == b"ftyp":
        return _of_brands(head)
    return next((each for start, each in _SIGNATURES if head.startswith(start)), None)


def _of_brands(head: bytes) -> ImageFormat | None:
    end = min(int.from_bytes(head[:4], "big"), len(head))
    brands = [head[8:12], *(head[offset : offset + 4] for offset in range(16, end, 4))]
    if brands[0] in _AVIF_BRANDS or (brands[0] in (b"mif1", b"msf1") and _AVIF_BRANDS & set(brands)):
        return AVIF
    return HEIC if brands[0] in _HEIC_BRANDS else None


def other_kind(head: bytes) -> str | None:
    """An unsupported kind of file, in words, by its first bytes; None if they are unknown."""
    if _MARKUP.match(head):
        return "an SVG drawing" if b"<svg" in head.lower() else "a web page or XML text"
    if head[4:12] == b"ftypcrx " or (head[_CR2_MARK] == b"CR" and head.startswith(b"II*\0")):
        return "a camera's raw file"
    if head[4:8] == b"ftyp":
        return "a video"
    return next((words for start, words in _OTHER_SIGNATURES if head.startswith(start)), None)


def format_of(head: bytes, suffix: str, name: str) -> ImageFormat:
    """The format of a file by its content.

    Args:
        head: the file's first bytes, as in `sniff`.
        suffix: of its name, for better error messages.
        name: the file's name in error messages.
    Raises: UnsupportedFormatError naming the format if this machine cannot decode it; UnidentifiedImageError if it is unknown.
    """
    if (sniffed := sniff(head)) is not None:
        if not is_available(sniffed):
            raise _decoder_missing(sniffed, name)
        return sniffed
    if (words := other_kind(head)) is not None:
        raise UnsupportedFormatError(f"{name} cannot be read as an image: it is {words}. Save it as JPEG or PNG.")
    called = next((each for each in FORMATS if suffix.lower() in each.suffixes), None)
    if called is not None and not is_available(called):
        raise _decoder_missing(called, name)
    if called is not None and called.remedy:
        raise UnsupportedFormatError(
            f"{name} cannot be read as an image: it is not {called.name}, though its name says so. Save it as JPEG or PNG."
        )
    raise UnidentifiedImageError("it is in no known image format" if head else "it is empty")


def _decoder_missing(image_format: ImageFormat, name: str) -> DecoderMissingError:
    words = f"it is {image_format.name}, whose decoder is missing"
    return DecoderMissingError(f"{name} cannot be read as an image: {words}. Save it as JPEG, or {image_format.remedy}.")


def is_available(image_format: ImageFormat) -> bool:
    """Whether the format can be decoded on this machine; if so, its decoder is registered with Pillow."""
    if image_format is HEIC:
        return _register_heif()
    return image_format is not AVIF or bool(features.check("avif"))


@cache
def _register_heif() -> bool:
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def listed(formats: Sequence[ImageFormat] = FORMATS) -> str:
    """The names of the `formats` that can be decoded here, such as "JPEG, PNG or WebP"."""
    return alternatives([each.name for each in formats if is_available(each)])
