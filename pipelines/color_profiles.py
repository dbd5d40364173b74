"""Conversion of images with embedded ICC profiles to sRGB, the colour space of the models' training images.

LittleCMS converts them, through Pillow, with the perceptual intent, which is the default of ImageCms and of browsers. For the
matrix profiles of cameras and screens, all intents but the absolute one give the same result.
"""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

# A profile that changes no value by more than this counts as sRGB, and the pixels are not converted.
SRGB_TOLERANCE = 1
_GRID = np.linspace(0, 255, 17).round().astype(np.uint8)
_WITHOUT_ALPHA = {"RGBA": "RGB", "LA": "L"}
# The profile's colour space for an image's mode.
_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK", "LAB": "Lab"}


class ProfileError(ValueError):
    """An ICC profile is damaged, or not for this kind of image."""


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert `image` from its ICC `profile` to sRGB; transparency is unchanged.

    Args:
        image: of any mode with 8 bits a channel.
        profile: the ICC profile's bytes.
    Returns: the image itself if the profile is sRGB.
    Raises: ProfileError if the profile cannot be used.
    """
    image = _with_plain_channels(image)
    mode = _WITHOUT_ALPHA.get(image.mode, image.mode)
    space = _space_of(profile)
    if mode == "L" and space == "RGB":
        image = image.convert("RGB" if image.mode == "L" else "RGBA")
        mode = "RGB"
    if _SPACES.get(mode) != space:
        raise ProfileError(f"it is for {space} images, but this one is {mode}")
    transform = _transform(profile, mode)
    if transform is None:
        return image
    if image.mode == mode:
        return ImageCms.applyTransform(image, transform)
    converted = ImageCms.applyTransform(image.convert(mode), transform)
    converted.putalpha(image.getchannel("A"))
    return converted


def lab_to_srgb(image: Image.Image) -> Image.Image:
    """Convert a CIE Lab image to sRGB; Lab is device-independent and needs no profile."""
    return ImageCms.profileToProfile(image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB")


def _with_plain_channels(image: Image.Image) -> Image.Image:
    """Convert palette, bilevel, premultiplied, YCbCr and HSV images to L, LA, RGB or RGBA."""
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
    """The transform from `profile` to sRGB for images of `mode`; None if it would change nothing."""
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
    return transform if np.abs(after - before).max() > SRGB_TOLERANCE else None


def _samples(mode: str) -> Image.Image:
    """An image of all grey levels, or of a grid of RGB colours."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    grid = np.stack(np.meshgrid(_GRID, _GRID, _GRID, indexing="ij"), axis=-1)
    return Image.fromarray(grid.reshape(-1, len(_GRID), 3))
