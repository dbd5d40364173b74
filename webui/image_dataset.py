"""The photos of a subject, uploaded or the bundled example, in order and with thumbnails."""

from __future__ import annotations

import base64
import functools
import io
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from pipelines.built_in import ASSETS
from webui.image_datasets import Entry, changing, read_set, remove_image, reorder
from webui.workspace import Workspace

EXAMPLE = ASSETS / "sample-subject"
# Marks a dataset with which a run was started. It must not change, because the run may still be queued or be resumed.
SEALED = ".sealed"
THUMBNAIL = 320


@dataclass(frozen=True)
class SubjectDataset:
    """Photos of one subject in a folder. A dataset that a run was started with is never changed; edits go to a copy.

    Args:
        folder: the folder of the photos.
    """

    folder: Path

    @classmethod
    def of(cls, workspace: Workspace, set_id: str | None) -> SubjectDataset:
        """The dataset with the id `set_id`; the bundled example for None.

        Raises: InputError if there is none.
        """
        return cls(EXAMPLE if set_id is None else workspace.image_set(set_id))

    @property
    def id(self) -> str | None:
        """The id that the browser stores; None for the example."""
        return None if self.is_example else self.folder.name

    @property
    def is_example(self) -> bool:
        """Whether this is the bundled example."""
        return self.folder == EXAMPLE

    def entries(self) -> list[Entry]:
        """The images in order, without those whose file is missing."""
        if self.is_example:
            return [Entry(path.name, path.name) for path in sorted(EXAMPLE.glob("*.jpg"))]
        return [entry for entry in read_set(self.folder).images if (self.folder / entry.file).is_file()]

    def files(self) -> list[Path]:
        """The files of the images, in order."""
        return [self.folder / entry.file for entry in self.entries()]

    def signature(self) -> tuple[str, ...]:
        """A value that changes when images, captions or their order change."""
        captions = {self.folder / entry.file: entry.caption for entry in self.entries()}
        return tuple(f"{path}:{path.stat().st_mtime_ns}:{caption}" for path, caption in captions.items())

    def editable(self, workspace: Workspace) -> SubjectDataset:
        """This dataset, or a copy if it must not be changed."""
        if not self.is_example and not (self.folder / SEALED).exists():
            return self
        copy, entries = SubjectDataset(workspace.new_image_set()), self.entries()
        with changing(copy.folder) as content:
            for entry in entries:
                for path in (self.folder / entry.file, (self.folder / entry.file).with_suffix(".txt")):
                    if path.exists():
                        shutil.copy2(path, copy.folder / path.name)
            content.images = entries
            content.next = 1 + max((int(Path(entry.file).stem) for entry in entries), default=0)
        return copy

    def move(self, file: str, by: int) -> None:
        """Move an image `by` positions later, or earlier if negative, but not beyond an end.

        Raises: InputError if it does not exist.
        """
        order = [entry.file for entry in self.entries()]
        if file in order:
            index = order.index(file)
            order.insert(max(0, index + by), order.pop(index))
        reorder(self.folder, [file, *order] if file not in order else order)

    def remove(self, file: str) -> None:
        """Remove an image. Raises: InputError if it does not exist."""
        remove_image(self.folder, file)

    def seal(self) -> None:
        """Forbid further changes, and rename the files so that a run reads them in the dataset's order."""
        if self.is_example or (self.folder / SEALED).exists():
            return
        with changing(self.folder) as content:
            files = [entry.file for entry in content.images]
            if files != sorted(files):
                content.images = _in_order(self.folder, content.images)
        (self.folder / SEALED).touch()


def _in_order(folder: Path, entries: list[Entry]) -> list[Entry]:
    """Rename the files and their captions by position; returns the entries with the new names."""
    called = [replace(entry, file=f"{number:04d}{Path(entry.file).suffix}") for number, entry in enumerate(entries, start=1)]
    for entry in entries:
        for path in _with_caption(folder / entry.file):
            os.replace(path, path.with_name(f".{path.name}"))
    for entry, new in zip(entries, called, strict=True):
        for path in _with_caption(folder / f".{entry.file}"):
            os.replace(path, (folder / new.file).with_suffix(path.suffix))
    return called


def _with_caption(path: Path) -> list[Path]:
    return [each for each in (path, path.with_suffix(".txt")) if each.exists()]


def thumbnail(path: Path) -> str:
    """A thumbnail of the image at `path` as a data URL."""
    return _thumbnail(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=512)
def _thumbnail(path: Path, changed: int) -> str:
    with Image.open(path, formats=("JPEG", "PNG")) as opened:
        opened.draft("RGB", (2 * THUMBNAIL, 2 * THUMBNAIL))
        image = opened.convert("RGB")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return as_address(image, "JPEG", quality=85)


def as_address(image: Image.Image, kind: str = "PNG", **options: int) -> str:
    """`image` as a data URL, so that the server stores no file that other users could load."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
