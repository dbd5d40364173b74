"""Embedded ICC profiles: what an image's numbers mean, converted to sRGB, which is what the models were trained on.

Conversions are littlecms's, through Pillow, with the perceptual intent (the default of ImageCms and of browsers; for the
matrix profiles of cameras and screens all intents but the absolute one are the same).
"""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

# A profile that changes no colour by more than this is sRGB, written by another program: pixels stay as they are.
SAME = 1
_GRID = np.linspace(0, 255, 17).round().astype(np.uint8)
_WITHOUT_ALPHA = {"RGBA": "RGB", "LA": "L"}
# The profile's colour space for an image's mode.
_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK", "LAB": "Lab"}


class ProfileError(ValueError):
    """An ICC profile is damaged, or not for this kind of image."""


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """`image` in sRGB, as its ICC `profile` means it; transparency is left as it is.

    Args:
        image: of any mode with 8 bits a channel.
        profile: the ICC profile's bytes.
    Returns: the image itself for an sRGB profile.
    Raises: ProfileError if the profile cannot be used.
    """
    image = _in_whole_channels(image)
    mode = _WITHOUT_ALPHA.get(image.mode, image.mode)
    space = _space_of(profile)
    if mode == "L" and space == "RGB":
        image = image.convert("RGB" if image.mode == "L" else "RGBA")
        mode = "RGB"
    if _SPACES.get(mode) != space:
        raise ProfileError(f"it is for {space} images, and this one is {mode}")
    transform = _transform(profile, mode)
    if transform is None:
        return image
    if image.mode == mode:
        return ImageCms.applyTransform(image, transform)
    converted = ImageCms.applyTransform(image.convert(mode), transform)
    converted.putalpha(image.getchannel("A"))
    return converted


def lab_to_srgb(image: Image.Image) -> Image.Image:
    """A CIE Lab image in sRGB, without any profile, since Lab means the same everywhere."""
    return ImageCms.profileToProfile(image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB")


def _in_whole_channels(image: Image.Image) -> Image.Image:
    """`image` with its colours in channels, rather than in a palette, in two values, or multiplied by its alpha."""
    if image.mode in ("P", "PA"):
        return image.convert("RGBA" if image.mode == "PA" or "transparency" in image.info else "RGB")
    plain = {"1": "L", "La": "LA", "RGBa": "RGBA", "RGBX": "RGB", "YCbCr": "RGB", "HSV": "RGB"}
    if image.mode in ("L", "RGB") and "transparency" in image.info:
        return image.convert("LA" if image.mode == "L" else "RGBA")
    return image.convert(plain[image.mode]) if image.mode in plain else image


@lru_cache(maxsize=32)
def _space_of(profile: bytes) -> str:
    try:
        return ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space.strip()
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        raise ProfileError("it is damaged") from error


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """What converts images of `mode` from `profile` to sRGB in RGB; None where it would change nothing."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        raise ProfileError("its colours cannot be converted") from error
    if mode not in ("RGB", "L"):
        return transform
    samples = _samples(mode)
    before = np.asarray(samples.convert("RGB"), dtype=np.int16)
    after = np.asarray(ImageCms.applyTransform(samples, transform), dtype=np.int16)
    return transform if np.abs(after - before).max() > SAME else None


def _samples(mode: str) -> Image.Image:
    """Every grey, or a grid of colours."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    grid = np.stack(np.meshgrid(_GRID, _GRID, _GRID, indexing="ij"), axis=-1)
    return Image.fromarray(grid.reshape(-1, len(_GRID), 3))
