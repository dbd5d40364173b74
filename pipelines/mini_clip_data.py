"""Pretraining data of the built-in CLIP: augmentation of images, and wrong captions of scenes."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch.nn import functional as F
from torchvision.transforms.v2 import CutMix

from pipelines.backgrounds import BACKGROUNDS
from pipelines.scenes import COLOURS, GLYPHS, PARTS, PATTERNS, SHAPES, SIZES, Scene

# Probability that the captions of a batch mention a part of its scenes.
MENTION_PROBABILITY = {"size": 0.4, "colour": 0.7, "pattern": 0.6, "kind": 0.85, "background": 0.6}
KINDS = (*SHAPES, "toy", "letter")
VALUES = {"size": tuple(SIZES), "colour": tuple(COLOURS), "pattern": PATTERNS, "kind": KINDS, "background": tuple(BACKGROUNDS)}


def sample_parts(rng: np.random.Generator) -> tuple[str, ...]:
    """Sample the parts that all captions of a batch mention, at least one."""
    return tuple(part for part in PARTS if rng.random() < MENTION_PROBABILITY[part]) or ("kind",)


def altered(scene: Scene, parts: tuple[str, ...], rng: np.random.Generator) -> Scene:
    """`scene` with another value for one of `parts`, whose caption contradicts the image of `scene`."""
    part = parts[rng.integers(len(parts))]
    if part == "kind" and scene.kind == "letter" and rng.random() < 0.5:
        return replace(scene, glyph=_other(GLYPHS, scene.glyph, rng))
    value = _other(VALUES[part], getattr(scene, part), rng)
    if part != "kind":
        return replace(scene, **{part: value})
    return replace(scene, kind=value, glyph=GLYPHS[rng.integers(len(GLYPHS))] if value == "letter" else "")


def _other(values: tuple[str, ...] | str, value: str, rng: np.random.Generator) -> str:
    others = [other for other in values if other != value]
    return others[rng.integers(len(others))]


def augment(pixels: torch.Tensor, photos: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    """Shift images, and change zoom, angle, brightness, contrast and saturation of photographs.

    Scenes keep their scale and colours, which their captions mention.

    Args:
        pixels: (count, 3, size, size) in [-1, 1].
        photos: (count,) bool, True for photographs.
    Returns: like `pixels`.
    """
    count = len(pixels)
    zoom = np.where(photos, rng.uniform(0.75, 1.05, count), 1.0)
    stretch = np.where(photos, np.exp(rng.uniform(-0.1, 0.1, count)), 1.0)
    angle = np.where(photos, rng.uniform(-math.pi / 36, math.pi / 36, count), 0.0)
    # A zoomed image may show any part of the original; it is mirrored beyond the edges.
    reach = np.where(photos, np.abs(1 - zoom) + 0.1, 0.1)
    shift = rng.uniform(-1, 1, (2, count)) * reach
    cos, sin = zoom * np.cos(angle), zoom * np.sin(angle)
    rows = [[cos * stretch, -sin / stretch, shift[0]], [sin * stretch, cos / stretch, shift[1]]]
    grid = F.affine_grid(torch.from_numpy(np.asarray(rows)).float().permute(2, 0, 1), list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)
    return _lit(moved, photos, rng)


def mix_classes(
    pixels: torch.Tensor, labels: torch.Tensor, classes: int, probability: float, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch with CutMix applied to its photographs with the given `probability`, and the share of each class in each image.

    Args:
        pixels: (count, 3, size, size).
        labels: (count,) int64, the class of a photograph, -1 for a scene.
        classes: number of classes.
    Returns: pixels like `pixels`; shares (count, classes), which sum to 1 for a photograph and are zeros for a scene.
    """
    photos = labels >= 0
    shares = torch.zeros(len(labels), classes)
    shares[photos] = F.one_hot(labels[photos], classes).float()
    if not photos.any() or rng.random() >= probability:
        return pixels, shares
    pixels = pixels.clone()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**63)))
        pixels[photos], shares[photos] = CutMix(alpha=1.0)(pixels[photos], shares[photos])
    return pixels, shares


def _lit(pixels: torch.Tensor, photos: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    def factors(spread: float) -> torch.Tensor:
        """Random factors (count, 1, 1, 1) in +-`spread` for photographs, 0 for scenes."""
        return torch.from_numpy(np.where(photos, rng.uniform(-spread, spread, len(photos)), 0.0)).float()[:, None, None, None]

    grey = pixels.mean(dim=1, keepdim=True)
    mean = grey.mean(dim=(2, 3), keepdim=True)
    coloured = grey + (pixels - grey) * (1 + factors(0.2))
    return (mean + (coloured - mean) * (1 + factors(0.2)) + factors(0.1)).clamp(-1, 1)
