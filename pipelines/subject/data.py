"""Images of a subject: reading and cropping them, and their size conditioning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from pipelines.image_decoding import upright_size
from pipelines.images import opened_image, read_image
from pipelines.lazy_modules import torch

SizeConditioning = Literal["image", "target"]


@dataclass(frozen=True)
class TrainingImage:
    """The file of a training image and its prompt.

    Args:
        path: its file.
        prompt: the prompt that it is trained with.
        kind: "instance" for an image of the subject, "class" for one of its class (prior preservation).
        subject: the name of the subject.
    """

    path: Path
    prompt: str
    kind: Literal["instance", "class"] = "instance"
    subject: str = ""


@dataclass(frozen=True)
class CropVariant:
    """One crop of an image: resized to cover `size`, optionally mirrored, then cropped.

    Args:
        size: height and width in pixels.
        crop: position of the crop, from (0, 0) for the top left to below (1, 1) for the bottom right; None for the centre.
        mirrored: whether the image is flipped horizontally before it is cropped.
    """

    size: tuple[int, int]
    crop: tuple[float, float] | None = None
    mirrored: bool = False


@dataclass(frozen=True)
class Example:
    """One preprocessed image with its size conditioning.

    Args:
        path: the image's file.
        pixels: (3, height, width) float32 in [-1, 1].
        time_ids: (6,) float32: original height and width, crop's top and left, target height and width  [SDXL, section 2.2].
            For a mirrored image, the crop is that of the mirrored image.
    """

    path: Path
    pixels: torch.Tensor
    time_ids: torch.Tensor

    def image(self) -> Image.Image:
        """The image as the model sees it."""
        return Image.fromarray(((self.pixels.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of an image, upright as its EXIF orientation says, without decoding it.

    Raises: InputError naming the file if it cannot be read.
    """
    with opened_image(path) as opened:
        return upright_size(opened)


def load_examples(paths: Sequence[Path], resolution: int, size_conditioning: SizeConditioning = "image") -> list[Example]:
    """Read, resize and centre-crop images to squares of `resolution` pixels.

    Args:
        size_conditioning: as in `preprocess`.
    Raises: InputError naming the first file that cannot be read.
    """
    crop_variant = CropVariant((resolution, resolution))
    return [preprocess(path, read_image(path), crop_variant, size_conditioning) for path in paths]


def preprocess(
    path: Path, image: Image.Image, crop_variant: CropVariant, size_conditioning: SizeConditioning = "image"
) -> Example:
    """Resize, mirror and crop an image that was read from `path`.

    Args:
        crop_variant: the crop.
        size_conditioning: "image" conditions on the image's original size and crop, as SDXL was trained; "target" on the
            target size without a crop, for models that were trained on nothing else.
    """
    height, width = crop_variant.size
    scale = max(height / image.height, width / image.width)
    covering = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    resized = image.resize(covering, Image.Resampling.LANCZOS)
    if crop_variant.mirrored:
        resized = ImageOps.mirror(resized)
    spare_height, spare_width = resized.height - height, resized.width - width
    if crop_variant.crop is None:
        top, left = spare_height // 2, spare_width // 2
    else:
        top, left = int(crop_variant.crop[0] * (spare_height + 1)), int(crop_variant.crop[1] * (spare_width + 1))
    cropped = resized.crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(np.array(cropped)).permute(2, 0, 1).float() / 127.5 - 1
    size_and_crop = (image.height, image.width, top, left) if size_conditioning == "image" else (height, width, 0, 0)
    return Example(path, pixels, torch.tensor([*size_and_crop, height, width], dtype=torch.float32))
