"""Pictures of a subject: finding, checking, cropping, and the size that each is said to have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from pipelines.errors import InputError

SizeConditioning = Literal["picture", "target"]
PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})


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
class Example:
    """One picture as the model is shown it.

    Args:
        path: the picture's file.
        pixels: (3, resolution, resolution) float32 in [-1, 1].
        time_ids: (6,) float32: original height and width, crop's top and left, target height and width  [SDXL, section 2.2].
    """

    path: Path
    pixels: torch.Tensor
    time_ids: torch.Tensor


def is_picture(path: Path) -> bool:
    """Whether `path` is a file with a picture's suffix; hidden files are none."""
    return path.suffix.lower() in PICTURE_SUFFIXES and not path.name.startswith(".") and path.is_file()


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


def read_picture(path: Path) -> Image.Image:
    """Read a picture as RGB, upright as its EXIF orientation says; transparent parts become white.

    Raises: InputError naming the file if it cannot be read.
    """
    try:
        with Image.open(path) as opened:
            upright = ImageOps.exif_transpose(opened)
            if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
                upright = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
            return upright.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{str(path)!r} cannot be read as a picture ({error}). Remove it or replace it.") from error


def load_examples(paths: Sequence[Path], resolution: int, size_conditioning: SizeConditioning = "picture") -> list[Example]:
    """Read, resize and centre-crop pictures to squares of `resolution` pixels.

    Args:
        size_conditioning: "picture" tells the model each picture's own size and crop, as SDXL was trained; "target" says of
            every picture that it has the target's size and is not cropped, for models that have seen nothing else.
    Raises: InputError naming the first file that cannot be read.
    """
    examples = [_example(path, read_picture(path), resolution) for path in paths]
    if size_conditioning == "picture":
        return examples
    uncropped = torch.tensor([resolution, resolution, 0, 0, resolution, resolution], dtype=torch.float32)
    return [replace(example, time_ids=uncropped) for example in examples]


def _example(path: Path, picture: Image.Image, resolution: int) -> Example:
    """Resize the shorter side to `resolution` and crop the centre of the longer one."""
    width, height = picture.size
    scale = resolution / min(width, height)
    resized = picture.resize(
        (max(resolution, round(width * scale)), max(resolution, round(height * scale))), Image.Resampling.LANCZOS
    )
    left, top = (resized.width - resolution) // 2, (resized.height - resolution) // 2
    cropped = resized.crop((left, top, left + resolution, top + resolution))
    pixels = torch.from_numpy(np.array(cropped)).permute(2, 0, 1).float() / 127.5 - 1
    time_ids = torch.tensor([height, width, top, left, resolution, resolution], dtype=torch.float32)
    return Example(path, pixels, time_ids)
