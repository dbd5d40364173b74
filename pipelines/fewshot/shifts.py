"""Domain shifts of photographs: the same objects in a rendition that a model has not been trained on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import functional as transforms

# An image and a source of randomness to an image of the same size.
Shift = Callable[[Image.Image, np.random.Generator], Image.Image]
# The strengths are such that zero-shot accuracy is clearly above chance and clearly below that on clean images:
# benchmarks/domain_shift.py prints both.
STRONG_EDGES = 0.98
# As a share of the shorter side.
SKETCH_BLUR = 1 / 8
PIXELS, COLOUR_BITS = 16, 1
HALF_TURN = 0.5
NIGHT_GAMMA, NIGHT_TINT, NIGHT_NOISE = 2.0, (0.25, 0.32, 0.55), 0.04
FOG_COLOUR, FOG_DENSITY, FOG_PATCHES = 0.85, (0.55, 0.95), 3


def clean(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The image unchanged."""
    return image


def edges(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Bright edges on black: the length of the gradient of each colour channel, scaled so that the strongest are white."""
    length = np.hypot(*np.gradient(_array(image), axis=(0, 1)))
    return _image(length / max(float(np.quantile(length, STRONG_EDGES)), 1 / 255))


def sketch(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Grey lines on white: the brightness divided by its blur (colour dodge)."""
    grey = image.convert("L")
    blurred = _array(grey.filter(ImageFilter.GaussianBlur(SKETCH_BLUR * min(image.size))))
    return _image(_array(grey) / np.maximum(blurred, 1 / 255)).convert("RGB")


def inverted(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The negative."""
    return ImageOps.invert(image)


def pixelated(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """`PIXELS` x `PIXELS` squares of their mean colours."""
    return image.resize((PIXELS, PIXELS), Image.Resampling.BOX).resize(image.size, Image.Resampling.NEAREST)


def night(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A dark image in blue tones with sensor noise."""
    dark = _array(image) ** NIGHT_GAMMA * np.asarray(NIGHT_TINT)
    return _image(dark + NIGHT_NOISE * rng.standard_normal(dark.shape))


def posterised(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Two levels of each colour channel, stretched to black and white."""
    return ImageOps.autocontrast(transforms.posterize(ImageOps.equalize(image), COLOUR_BITS))


def hue(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """All hues rotated by half a turn."""
    return transforms.adjust_hue(image, HALF_TURN)


def fog(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Mixed with light grey, more in some places than in others."""
    patches = Image.fromarray(rng.random((FOG_PATCHES, FOG_PATCHES), dtype=np.float32))
    cloud = np.asarray(patches.resize(image.size, Image.Resampling.BICUBIC))[:, :, None]
    low, high = FOG_DENSITY
    density = np.clip(low + (high - low) * cloud, 0, 1)
    return _image((1 - density) * _array(image) + density * FOG_COLOUR)


CLEAN = "none"
SHIFTS: dict[str, Shift] = {
    "edges": edges,
    "sketch": sketch,
    "inverted": inverted,
    "pixelated": pixelated,
    "night": night,
    "posterised": posterised,
    "hue": hue,
    "fog": fog,
    CLEAN: clean,
}


def _array(image: Image.Image) -> np.ndarray:
    """(h, w) or (h, w, 3) in [0, 1]."""
    return np.asarray(image, dtype=np.float64) / 255


def _image(values: np.ndarray) -> Image.Image:
    """The image of `values`, which are clipped to [0, 1]."""
    return Image.fromarray((255 * np.clip(values, 0, 1)).round().astype(np.uint8))
