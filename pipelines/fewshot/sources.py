"""Sources of image files: a file on disk, memory, or a member of a zip (`pipelines.fewshot.archives`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipelines.errors import InputError


class DatasetSource(Protocol):
    """An image file that is not decoded yet. Sources can be pickled, so that worker processes can read them.

    Args:
        name: path within the dataset, with "/" as separator: unique, and the same on every machine.
        max_pixels: larger images are refused before they are decoded; None for Pillow's limit.
    """

    @property
    def name(self) -> str: ...

    @property
    def max_pixels(self) -> int | None: ...

    def size(self) -> int:
        """Size in bytes, without reading the file."""

    def content(self) -> bytes:
        """The bytes of the file."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image file on disk, `name` below `folder`."""

    name: str
    folder: Path
    max_pixels: int | None = None

    @property
    def path(self) -> Path:
        """The path of the file."""
        return self.folder / self.name

    def size(self) -> int:
        """Size in bytes. Raises: InputError if the file does not exist."""
        self._check()
        return self.path.stat().st_size

    def content(self) -> bytes:
        """The bytes of the file. Raises: InputError if it does not exist."""
        self._check()
        return self.path.read_bytes()

    def _check(self) -> None:
        if not self.path.is_file():
            raise InputError(f"The file {str(self.path)!r} of the dataset does not exist. Restore it.")


@dataclass(frozen=True, slots=True)
class ImageBytes:
    """An image in memory, as the bytes of its file."""

    name: str
    stored: bytes
    max_pixels: int | None = None

    def size(self) -> int:
        """Size in bytes."""
        return len(self.stored)

    def content(self) -> bytes:
        """The bytes of the file."""
        return self.stored
