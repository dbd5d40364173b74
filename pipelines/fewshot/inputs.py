"""The input images of a classifier: files, PIL images or tensors, one or several."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from pipelines.errors import InputError
from pipelines.images import UNREADABLE, read_image, upright_rgb

GivenImage = Image.Image | str | os.PathLike[str] | torch.Tensor
GivenImages = GivenImage | Sequence[GivenImage]


class GivenImageSet(Dataset):
    """Dataset of (transformed image, index).

    Args:
        given: one image or several, each a PIL image, the path of a file, or a tensor (3, h, w), uint8 or floating point in
            [0, 1]; several may be one tensor (n, 3, h, w).
        transform: applied to each image in upright RGB, such as `Clip.preprocess`.
    Raises: InputError if there are no images; on access, naming the image that cannot be used.
    """

    def __init__(self, given: GivenImages, transform: Callable[[Image.Image], Any]) -> None:
        single = isinstance(given, Image.Image | str | os.PathLike) or (isinstance(given, torch.Tensor) and given.ndim < 4)
        self.images = [given] if single else list(given)
        self.transform = transform
        if not self.images:
            raise InputError("images must contain at least one image, got none.")

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each image: its path, or its index such as "images[2]"."""
        return tuple(
            str(image) if isinstance(image, str | os.PathLike) else f"images[{index}]" for index, image in enumerate(self.images)
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(as_image(self.images[index], f"images[{index}]")), index


def as_image(given: GivenImage, name: str) -> Image.Image:
    """`given` as an upright RGB image; error messages use its path or `name`.

    Raises: InputError if it has another type, or cannot be decoded.
    """
    if isinstance(given, str | os.PathLike):
        return read_image(Path(given))
    if isinstance(given, torch.Tensor):
        return _from_tensor(given, name)
    if not isinstance(given, Image.Image):
        raise InputError(
            f"{name} must be a PIL image, the path of a file, or a tensor (3, h, w), got {type(given).__name__}. Convert an "
            "array with PIL.Image.fromarray."
        )
    try:
        return upright_rgb(given, name)
    except UNREADABLE as error:
        raise InputError(f"{name} cannot be decoded ({error}). Remove it or replace it.") from error


def _from_tensor(given: torch.Tensor, name: str) -> Image.Image:
    if given.ndim != 3 or given.shape[0] != 3 or not given.numel():
        raise InputError(f"{name} must be a tensor of shape (3, h, w), got {tuple(given.shape)}. Permute or expand it.")
    if given.is_floating_point():
        low, high = given.aminmax()
        # Also refuses NaN.
        if not (low >= 0 and high <= 1):
            raise InputError(
                f"{name} must hold values in [0, 1], got {low:.3g} to {high:.3g}. Undo any normalisation, or give uint8."
            )
        given = (255 * given.float()).round().to(torch.uint8)
    if given.dtype != torch.uint8:
        raise InputError(f"{name} must be uint8 or floating point, got {given.dtype}. Convert it to uint8.")
    return Image.fromarray(given.permute(1, 2, 0).cpu().contiguous().numpy())
