"""Pictures of a subject: finding, checking, cropping, and the size that each is said to have."""

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
from pipelines.pictures import PICTURE_SUFFIXES, is_picture, opened_picture, read_picture

SizeConditioning = Literal["picture", "target"]


@dataclass(frozen=True)
class Picture:
    """A picture that was found, not read yet.

    Args:
        path: its file.
        prompt: what it shows.
        kind: of the subject, or of the subject's class, for prior preservation.
        subject: whose picture it is, or of whose class.
    """

    path: Path
    prompt: str
    kind: Literal["instance", "class"] = "instance"
    subject: str = ""


@dataclass(frozen=True)
class Shot:
    """How a picture is shown: resized until it covers `size`, mirrored or not, and cropped.

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
    """One picture as the model is shown it.

    Args:
        path: the picture's file.
        pixels: (3, height, width) float32 in [-1, 1].
        time_ids: (6,) float32: original height and width, crop's top and left, target height and width  [SDXL, section 2.2].
            A mirrored picture's crop is counted on the mirrored picture.
    """

    path: Path
    pixels: torch.Tensor
    time_ids: torch.Tensor


def find_pictures(folder: str | Path) -> list[Path]:
    """The picture files directly in `folder`, sorted by name.

    Raises: InputError if there is no such folder or no picture in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"There is no folder {str(folder)!r}. Give --instance_data_dir a folder with pictures of the subject.")
    pictures = sorted(filter(is_picture, folder.iterdir()))
    if not pictures:
        raise InputError(
            f"{str(folder)!r} holds no picture ({', '.join(sorted(PICTURE_SUFFIXES))}). Put three to ten pictures of the "
            "subject there."
        )
    return pictures


def picture_size(path: Path) -> tuple[int, int]:
    """Height and width of a picture, upright as its EXIF orientation says, without decoding it.

    Raises: InputError naming the file if it cannot be read.
    """
    with opened_picture(path) as opened:
        return upright_size(opened)


def load_examples(paths: Sequence[Path], resolution: int, size_conditioning: SizeConditioning = "picture") -> list[Example]:
    """Read, resize and centre-crop pictures to squares of `resolution` pixels.

    Args:
        size_conditioning: as in `take`.
    Raises: InputError naming the first file that cannot be read.
    """
    shot = Shot((resolution, resolution))
    return [take(path, read_picture(path), shot, size_conditioning) for path in paths]


def take(path: Path, picture: Image.Image, shot: Shot, size_conditioning: SizeConditioning = "picture") -> Example:
    """Show a picture that was read from `path` as `shot` says.

    Args:
        size_conditioning: "picture" tells the model the picture's own size and crop, as SDXL was trained; "target" says of
            every picture that it has the target's size and is not cropped, for models that have seen nothing else.
    """
    height, width = shot.size
    scale = max(height / picture.height, width / picture.width)
    covering = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
    resized = picture.resize(covering, Image.Resampling.LANCZOS)
    if shot.mirrored:
        resized = ImageOps.mirror(resized)
    spare_height, spare_width = resized.height - height, resized.width - width
    if shot.crop is None:
        top, left = spare_height // 2, spare_width // 2
    else:
        top, left = int(shot.crop[0] * (spare_height + 1)), int(shot.crop[1] * (spare_width + 1))
    cropped = resized.crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(np.array(cropped)).permute(2, 0, 1).float() / 127.5 - 1
    told = (picture.height, picture.width, top, left) if size_conditioning == "picture" else (height, width, 0, 0)
    return Example(path, pixels, torch.tensor([*told, height, width], dtype=torch.float32))
