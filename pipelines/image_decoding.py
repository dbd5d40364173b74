"""Decoding an opened image to 8-bit sRGB, upright and with transparency on white, with notes on how it was read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, ImageOps

from pipelines.color_profiles import ProfileError, lab_to_srgb, to_srgb

# Pillow's format name for a JPEG with further images in it, such as a phone's depth map.
SEVERAL_JPEGS = "MPO"
# The key in `Image.info` for the code points of a PNG's cICP chunk.
CODE_POINTS = "cicp"
TIFF_BITS, TIFF_PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0
# EXIF orientations from here on swap height and width; 1 is upright.
FIRST_ON_ITS_SIDE, ORIENTATIONS = 5, range(1, 9)
# EXIF's way to say Adobe RGB without a profile (DCF 2.0).
INTEROPERABILITY_INDEX, ADOBE_RGB = 1, "R03"
# In a cICP chunk: BT.709 primaries with the transfer of sRGB or of BT.709.  [ITU-T H.273]
SRGB_CODE_POINTS = {(1, 13), (1, 1)}
SRGB_CHROMATICITIES = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
SRGB_GAMMA, TOLERANCE = 1 / 2.2, 0.01


@dataclass(frozen=True)
class ReadingNote:
    """Something about how a file was read that its owner should know.

    Args:
        kind: "turned", "first_frame", "exif_ignored" or "color_profile".
        words: what was done, in a sentence that begins with "It" or "Its".
        advice: what to do about it.
    """

    kind: str
    words: str
    advice: str


@dataclass(frozen=True)
class ReadImage:
    """An image as upright sRGB without metadata, and notes on how it was read."""

    image: Image.Image
    notes: tuple[ReadingNote, ...] = ()


TURNED = ReadingNote("turned", "It is stored rotated, and is rotated upright by its EXIF orientation.", "Nothing to do.")
FIRST_FRAME = ReadingNote(
    "first_frame", "It has several frames or pages; the first one is used.", "To use another one, save it as a separate file."
)
EXIF_IGNORED = ReadingNote(
    "exif_ignored",
    "Its EXIF data are damaged, so its orientation is unknown.",
    "If it is shown on its side, rotate it and save it again.",
)


def decode(opened: Image.Image) -> ReadImage:
    """Decode an opened image.

    An embedded ICC profile is converted to sRGB, 16 bits a channel become 8, and transparent parts become white. Of several
    frames or pages, the current one is used: the first one of a newly opened file.

    Raises: Pillow's exceptions for damaged files, and ValueError for pixels without a fixed range.
    """
    notes = [FIRST_FRAME] if _has_more_frames(opened) else []
    orientation = _orientation(opened)
    if orientation is None:
        notes.append(EXIF_IGNORED)
    elif orientation > 1:
        notes.append(TURNED)
    upright = opened.copy() if orientation is None else ImageOps.exif_transpose(opened)
    image, profile_note = _in_srgb(_with_eight_bits(upright, opened))
    notes += [*_unused_colors(opened), *profile_note]
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    # It describes the original pixels; a profile left there would be applied again.
    image.info = {}
    return ReadImage(image, tuple(notes))


def upright_size(opened: Image.Image) -> tuple[int, int]:
    """Height and width of an opened image, upright, without decoding it."""
    width, height = opened.size
    # For a TIFF, Pillow already gives the upright size.
    turned = opened.format != "TIFF" and (_orientation(opened) or 1) >= FIRST_ON_ITS_SIDE
    return (width, height) if turned else (height, width)


def _has_more_frames(opened: Image.Image) -> bool:
    return opened.format != SEVERAL_JPEGS and opened.tell() == 0 and bool(getattr(opened, "is_animated", False))


def _orientation(opened: Image.Image) -> int | None:
    """The EXIF orientation, 1 if there is none; None if the EXIF data cannot be read."""
    try:
        value = opened.getexif().get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, ValueError, TypeError, KeyError, IndexError, OSError, EOFError):
        return None
    return value if value in ORIENTATIONS else 1


def _with_eight_bits(image: Image.Image, opened: Image.Image) -> Image.Image:
    """`image`, decoded from the file `opened`, with at most 8 bits a channel. Pillow would clip at 255."""
    tags = getattr(opened, "tag_v2", {})
    if opened.format == "TIFF" and image.mode in ("F", "I"):
        raise ValueError("its pixels are floating-point or 32-bit numbers; save it with 8 or 16 bits a channel")
    if not image.mode.startswith("I"):
        return image
    highest = 2 ** tags.get(TIFF_BITS, (16,))[0] - 1
    grey = image.convert("F").point(lambda value: value * (255 / highest)).convert("L")
    if tags.get(TIFF_PHOTOMETRIC) == WHITE_IS_ZERO:
        grey = ImageOps.invert(grey)
    grey.info = {name: value for name, value in image.info.items() if name != "transparency"}
    if "transparency" in image.info:
        # The transparent grey is one of 65,536; compared after the reduction to 256, it would match others too.
        grey.putalpha(Image.fromarray(np.asarray(image) != image.info["transparency"]).convert("L"))
    return grey


def _in_srgb(image: Image.Image) -> tuple[Image.Image, tuple[ReadingNote, ...]]:
    if image.mode == "LAB":
        return lab_to_srgb(image), ()
    if "icc_profile" not in image.info:
        return image, ()
    try:
        return to_srgb(image, image.info["icc_profile"] or b""), ()
    except ProfileError as error:
        return image, (_unused(f"Its ICC colour profile is not used: {error}."),)


def _unused_colors(opened: Image.Image) -> Iterator[ReadingNote]:
    """Notes on colour information other than ICC profiles, which is not used."""
    info = opened.info
    if CODE_POINTS in info and tuple(info[CODE_POINTS][:2]) not in SRGB_CODE_POINTS:
        yield _unused(f"Its colours are read as sRGB, though its cICP chunk says {info[CODE_POINTS][:2]}.")
    if "icc_profile" in info or "srgb" in info:
        return
    gamma, points = info.get("gamma", SRGB_GAMMA), info.get("chromaticity", SRGB_CHROMATICITIES)
    if abs(gamma - SRGB_GAMMA) > TOLERANCE or any(
        abs(one - other) > TOLERANCE for one, other in zip(points, SRGB_CHROMATICITIES, strict=False)
    ):
        yield _unused("Its colours are read as sRGB, though its gAMA or cHRM chunk says otherwise.")
    if _says_adobe_rgb(opened):
        yield _unused("Its colours are read as sRGB, though its EXIF data say Adobe RGB: it has no ICC profile.")


def _says_adobe_rgb(opened: Image.Image) -> bool:
    try:
        return opened.getexif().get_ifd(ExifTags.IFD.Interop).get(INTEROPERABILITY_INDEX) == ADOBE_RGB
    except (SyntaxError, ValueError, TypeError, KeyError, IndexError, OSError, EOFError):
        return False


def _unused(words: str) -> ReadingNote:
    return ReadingNote("color_profile", words, "If its colours look wrong, convert it to sRGB in an image editor.")
