"""The sample dataset: handwritten digits, which are installed with scikit-learn."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps
from sklearn.datasets import load_digits

from pipelines.fewshot.data import LabelledImage, LabelledSet
from pipelines.fewshot.sources import ImageBytes

SIDE, MARGIN, MOST_INK = 64, 8, 16


def sample_set() -> LabelledSet:
    """1,797 handwritten digits of ten classes, dark on white, enlarged from 8 x 8 to 48 x 48 pixels with a margin of 8.

    They are the test part of "Optical Recognition of Handwritten Digits".  [Alpaydin & Kaynak 1998, CC BY 4.0]
    """
    digits = load_digits()
    keys = tuple(str(name) for name in digits.target_names)
    images = tuple(
        LabelledImage(ImageBytes(f"{keys[label]}/{index:04d}.png", _as_png(ink)), int(label), keys[label])
        for index, (ink, label) in enumerate(zip(digits.images, digits.target, strict=True))
    )
    return LabelledSet("scikit-learn's digits", keys, keys, images)


def _as_png(ink: np.ndarray) -> bytes:
    """The PNG file of `ink` (8, 8), from 0 (white) to 16 (black)."""
    paper = Image.fromarray((255 * (1 - ink / MOST_INK)).round().astype(np.uint8))
    page = ImageOps.expand(paper.resize((SIDE - 2 * MARGIN,) * 2, Image.Resampling.BICUBIC), MARGIN, fill=255)
    stored = io.BytesIO()
    page.save(stored, "PNG")
    return stored.getvalue()
