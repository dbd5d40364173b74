"""What is made of an opened image file: RGB in sRGB with 8 bits a channel, upright, on white, and notes on how it was read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, ImageOps

from pipelines.color_profiles import ProfileError, lab_to_srgb, to_srgb

# What Pillow calls a JPEG that carries further images, such as a phone's depth map.
SEVERAL_JPEGS = "MPO"
# Where the code points of a PNG's cICP chunk stand in `Image.info`.
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
    """An image as RGB, upright and in sRGB, without metadata; and what is to be known about how it was read."""

    image: Image.Image
    notes: tuple[ReadingNote, ...] = ()


TURNED = ReadingNote(
    "turned", "It lies turned in its file, and is turned upright as its EXIF orientation says.", "Nothing to do."
)
FIRST_FRAME = ReadingNote(
    "first_frame", "It holds several frames or pages, of which the first is used.", "Save another one as a file of its own."
)
EXIF_IGNORED = ReadingNote(
    "exif_ignored", "Its EXIF data are damaged, so that its orientation is not known.", "If it lies on its side, save it anew."
)


def decode(opened: Image.Image) -> ReadImage:
    """Decode an opened image.

    An embedded ICC profile is converted to sRGB; of an animation or of several pages the current frame is taken, which is the
    first of a file just opened; 16 bits a channel become 8; transparent parts become white.

    Raises: what Pillow raises for damaged files, and ValueError for pixels without a fixed range.
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
    # What the pixels were, not what they are now: a profile would be applied twice.
    image.info = {}
    return ReadImage(image, tuple(notes))


def upright_size(opened: Image.Image) -> tuple[int, int]:
    """Height and width of an opened image, upright, without decoding it."""
    width, height = opened.size
    # Of a TIFF, Pillow tells the upright size at once.
    turned = opened.format != "TIFF" and (_orientation(opened) or 1) >= FIRST_ON_ITS_SIDE
    return (width, height) if turned else (height, width)


def _has_more_frames(opened: Image.Image) -> bool:
    return opened.format != SEVERAL_JPEGS and opened.tell() == 0 and bool(getattr(opened, "is_animated", False))


def _orientation(opened: Image.Image) -> int | None:
    """The EXIF orientation, 1 where none is given; None where the EXIF data cannot be read."""
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
        # One of the 65,536 greys, which several of 256 would stand for.
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
    """What an image says of its colours without an ICC profile, and what is not followed."""
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
        yield _unused("Its colours are read as sRGB, though its EXIF data say Adobe RGB: it carries no ICC profile.")


def _says_adobe_rgb(opened: Image.Image) -> bool:
    try:
        return opened.getexif().get_ifd(ExifTags.IFD.Interop).get(INTEROPERABILITY_INDEX) == ADOBE_RGB
    except (SyntaxError, ValueError, TypeError, KeyError, IndexError, OSError, EOFError):
        return False


def _unused(words: str) -> ReadingNote:
    return ReadingNote("color_profile", words, "If its colours look wrong, convert it to sRGB in an image editor.")
