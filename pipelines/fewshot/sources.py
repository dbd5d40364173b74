"""Where a labelled image's bytes come from: a file, memory, or (pipelines.fewshot.archives) a zip."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipelines.errors import InputError


class DatasetSource(Protocol):
    """An image that was found, not decoded yet; sources can be pickled, so that worker processes read them.

    Args:
        name: its path within its set, with "/" between the parts; unique there, and the same on every machine.
        max_pixels: more are refused before they are decoded; None for Pillow's own limit.
    """

    @property
    def name(self) -> str: ...

    @property
    def max_pixels(self) -> int | None: ...

    def size(self) -> int:
        """Bytes of the image's file, without reading it."""

    def content(self) -> bytes:
        """The image's file."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image in a file of its own, `name` below `folder`."""

    name: str
    folder: Path
    max_pixels: int | None = None

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / self.name

    def size(self) -> int:
        """Bytes of the file. Raises: InputError if there is none."""
        self._check()
        return self.path.stat().st_size

    def content(self) -> bytes:
        """The file. Raises: InputError if there is none."""
        self._check()
        return self.path.read_bytes()

    def _check(self) -> None:
        if not self.path.is_file():
            raise InputError(f"There is no file {str(self.path)!r}, which the set names {self.name!r}. Put it back.")


@dataclass(frozen=True, slots=True)
class ImageBytes:
    """An image in memory, as the bytes of its file."""

    name: str
    stored: bytes
    max_pixels: int | None = None

    def size(self) -> int:
        """Bytes of the file."""
        return len(self.stored)

    def content(self) -> bytes:
        """The file."""
        return self.stored
