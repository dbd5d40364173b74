"""Images of a subject: finding, checking, cropping, and the size that each is said to have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps

from pipelines.errors import InputError
from pipelines.image_decoding import upright_size
from pipelines.images import IMAGE_SUFFIXES, is_image, opened_image, read_image

SizeConditioning = Literal["image", "target"]


@dataclass(frozen=True)
class TrainingImage:
    """An image that was found, not read yet.

    Args:
        path: its file.
        prompt: what it shows.
        kind: of the subject, or of the subject's class, for prior preservation.
        subject: whose image it is, or of whose class.
    """

    path: Path
    prompt: str
    kind: Literal["instance", "class"] = "instance"
    subject: str = ""


@dataclass(frozen=True)
class CropVariant:
    """How an image is shown: resized until it covers `size`, mirrored or not, and cropped.

    Args:
        size: height and width in pixels.
        crop: where the crop lies, from (0, 0) for the top left to less than (1, 1) for the bottom right; None for the middle.
        mirrored: whether left and right are swapped, before the crop.
    """

    size: tuple[int, int]
    crop: tuple[float, float] | None = None
    mirrored: bool = False


@dataclass(frozen=True)
class Example:
    """One image as the model is shown it.

    Args:
        path: the image's file.
        pixels: (3, height, width) float32 in [-1, 1].
        time_ids: (6,) float32: original height and width, crop's top and left, target height and width  [SDXL, section 2.2].
            A mirrored image's crop is counted on the mirrored image.
    """

    path: Path
    pixels: torch.Tensor
    time_ids: torch.Tensor


def find_images(folder: str | Path) -> list[Path]:
    """The image files directly in `folder`, sorted by name.

    Raises: InputError if there is no such folder or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"There is no folder {str(folder)!r}. Give --instance_data_dir a folder with images of the subject.")
    images = sorted(filter(is_image, folder.iterdir()))
    if not images:
        raise InputError(
            f"{str(folder)!r} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}). Put three to ten images of the subject there."
        )
    return images


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of an image, upright as its EXIF orientation says, without decoding it.

    Raises: InputError naming the file if it cannot be read.
    """
    with opened_image(path) as opened:
        return upright_size(opened)


def load_examples(paths: Sequence[Path], resolution: int, size_conditioning: SizeConditioning = "image") -> list[Example]:
    """Read, resize and centre-crop images to squares of `resolution` pixels.

    Args:
        size_conditioning: as in `take`.
    Raises: InputError naming the first file that cannot be read.
    """
    shot = CropVariant((resolution, resolution))
    return [take(path, read_image(path), shot, size_conditioning) for path in paths]


def take(path: Path, image: Image.Image, shot: CropVariant, size_conditioning: SizeConditioning = "image") -> Example:
    """Show an image that was read from `path` as `shot` says.

    Args:
        size_conditioning: "image" tells the model the image's own size and crop, as SDXL was trained; "target" says of
            every image that it has the target's size and is not cropped, for models that have seen nothing else.
    """
    height, width = shot.size
    scale = max(height / image.height, width / image.width)
    covering = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    resized = image.resize(covering, Image.Resampling.LANCZOS)
    if shot.mirrored:
        resized = ImageOps.mirror(resized)
    spare_height, spare_width = resized.height - height, resized.width - width
    if shot.crop is None:
        top, left = spare_height // 2, spare_width // 2
    else:
        top, left = int(shot.crop[0] * (spare_height + 1)), int(shot.crop[1] * (spare_width + 1))
    cropped = resized.crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(np.array(cropped)).permute(2, 0, 1).float() / 127.5 - 1
    size_and_crop = (image.height, image.width, top, left) if size_conditioning == "image" else (height, width, 0, 0)
    return Example(path, pixels, torch.tensor([*size_and_crop, height, width], dtype=torch.float32))
