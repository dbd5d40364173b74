"""A dataset of uploaded images on disk: files with generated names, and set.json with the user's names.

A dataset has images, or classes of images. Every change holds the user's lock, so that two tabs, or two servers with the same
folder, do not overwrite each other's changes; reading needs no lock.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipelines.errors import InputError
from pipelines.text_files import write_text_atomically
from webui.incoming import printable_name

SET, LOCK = "set.json", ".lock"
MAX_CLASSES = 500
CAPTION_LENGTH = 500


@dataclass
class Entry:
    """An image of a dataset.

    Args:
        file: its path relative to the dataset's folder, which identifies it.
        name: the name of the uploaded file; escape it before it goes into HTML.
        caption: the caption; empty for none.
    """

    file: str
    name: str
    caption: str = ""


@dataclass
class ClassEntry:
    """A class of a dataset.

    Args:
        folder: the folder of its images, relative to the dataset's folder.
        name: the name given by the user; escape it before it goes into HTML.
        images: in the user's order.
        next: the number of the next image; numbers are never reused.
    """

    folder: str
    name: str
    images: list[Entry] = field(default_factory=list)
    next: int = 1


@dataclass
class ImageDataset:
    """The content of set.json.

    Args:
        images: those without a class, in the user's order.
        classes: in the order of creation.
        next: the number of the next image; numbers are never reused.
        next_class: the number of the next class.
    """

    images: list[Entry] = field(default_factory=list)
    classes: list[ClassEntry] = field(default_factory=list)
    next: int = 1
    next_class: int = 0

    def entries(self) -> list[Entry]:
        """All images, with or without a class."""
        return [*self.images, *(entry for each in self.classes for entry in each.images)]

    def container_of(self, file: str) -> ImageDataset | ClassEntry:
        """The class that lists the image `file`, or the dataset for images without a class.

        Raises: InputError if it is not listed, so that no path from a user is ever opened.
        """
        for container in (self, *self.classes):
            if any(entry.file == file for entry in container.images):
                return container
        raise InputError("This image no longer exists. Reload the page.")

    def entry(self, file: str) -> Entry:
        """The image `file`. Raises: InputError if there is none."""
        return next(entry for entry in self.container_of(file).images if entry.file == file)

    def class_in(self, folder: str) -> ClassEntry:
        """The class with the folder `folder`. Raises: InputError if there is none."""
        for each in self.classes:
            if each.folder == folder:
                return each
        raise InputError("This class no longer exists. Reload the page.")

    def new_class(self, name: str) -> ClassEntry:
        """Add a class called `name`, or return the existing class of that name.

        Raises: InputError if the name is empty or the dataset has `MAX_CLASSES` classes.
        """
        name = _class_name(name)
        for each in self.classes:
            if each.name.casefold() == name.casefold():
                return each
        if len(self.classes) >= MAX_CLASSES:
            raise InputError(f"A dataset may have at most {MAX_CLASSES} classes. Remove one, or start another dataset.")
        added = ClassEntry(f"c{self.next_class:02d}", name)
        self.next_class += 1
        self.classes.append(added)
        return added


def read_set(folder: Path) -> ImageDataset:
    """The content of set.json in `folder`; an empty dataset if there is none yet."""
    try:
        content = json.loads((folder / SET).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ImageDataset()
    classes = [ClassEntry(each["folder"], each["name"], _entries(_listed_in(each)), each["next"]) for each in content["classes"]]
    return ImageDataset(_entries(_listed_in(content)), classes, content["next"], content["next_class"])


def _listed_in(content: dict[str, Any]) -> list[dict[str, Any]]:
    # Earlier versions wrote "pictures".
    return content["images"] if "images" in content else content["pictures"]


@contextmanager
def changing(folder: Path) -> Iterator[ImageDataset]:
    """Lock and read the dataset in `folder`; write the changes if the block succeeds.

    Raises: InputError if the folder is gone.
    """
    with _locked(folder):
        images = read_set(folder)
        yield images
        write_text_atomically(folder / SET, json.dumps(asdict(images), ensure_ascii=False, indent=1))


def remove_image(folder: Path, file: str) -> None:
    """Remove and delete the image `file`. Raises: InputError if there is none."""
    with changing(folder) as images:
        container = images.container_of(file)
        container.images = [entry for entry in container.images if entry.file != file]
        _delete(folder / file)


def reorder(folder: Path, files: Sequence[str]) -> None:
    """Sort the images without a class in the order of `files`; images that it does not list follow.

    Raises: InputError if an image does not exist.
    """
    with changing(folder) as images:
        wanted = [images.entry(file) for file in dict.fromkeys(files)]
        if any(entry not in images.images for entry in wanted):
            raise InputError("Only images without a class can be reordered. Reload the page.")
        images.images = [*wanted, *(entry for entry in images.images if entry not in wanted)]


def set_caption(folder: Path, file: str, caption: str) -> None:
    """Set the caption of the image `file` in set.json and in the .txt file that training reads; empty to remove it.

    Raises: InputError if the image does not exist or the caption is too long.
    """
    caption = " ".join(caption.split())
    if len(caption) > CAPTION_LENGTH:
        raise InputError(f"A caption may have at most {CAPTION_LENGTH} characters, got {len(caption)}. Shorten it.")
    with changing(folder) as images:
        images.entry(file).caption = caption
        caption_file = (folder / file).with_suffix(".txt")
        if caption:
            write_text_atomically(caption_file, caption)
        else:
            caption_file.unlink(missing_ok=True)


def add_class(folder: Path, name: str) -> str:
    """Add a class called `name`, unless there is one; returns its folder.

    Raises: InputError if the name is empty or the dataset has `MAX_CLASSES` classes.
    """
    with changing(folder) as images:
        added = images.new_class(name)
        (folder / added.folder).mkdir(exist_ok=True)
        return added.folder


def rename_class(folder: Path, class_folder: str, name: str) -> None:
    """Rename a class; its folder stays. Raises: InputError if it does not exist or the name is taken."""
    with changing(folder) as images:
        named, name = images.class_in(class_folder), _class_name(name)
        if any(each is not named and each.name.casefold() == name.casefold() for each in images.classes):
            raise InputError(f"There is already a class called {name}. Choose another name, or move the images to it.")
        named.name = name


def remove_class(folder: Path, class_folder: str) -> None:
    """Remove a class and delete its images. Raises: InputError if it does not exist."""
    with changing(folder) as images:
        removed = images.class_in(class_folder)
        images.classes.remove(removed)
        shutil.rmtree(folder / removed.folder, ignore_errors=True)


def move_image(folder: Path, file: str, class_folder: str) -> str:
    """Move the image `file` to the end of a class; returns its new file name.

    Raises: InputError if the image or the class does not exist.
    """
    with changing(folder) as images:
        source, target = images.container_of(file), images.class_in(class_folder)
        if source is target:
            return file
        entry = images.entry(file)
        source.images.remove(entry)
        moved = next_path(folder, target, Path(file).suffix)
        for suffix in (Path(file).suffix, ".txt"):
            if (folder / file).with_suffix(suffix).exists():
                (folder / file).with_suffix(suffix).replace(moved.with_suffix(suffix))
        entry.file = moved.relative_to(folder).as_posix()
        target.images.append(entry)
        return entry.file


def delete_set(folder: Path) -> None:
    """Delete the dataset in `folder` with all its images. Raises: InputError if it is gone."""
    with _locked(folder):
        shutil.rmtree(folder)


def next_path(folder: Path, container: ImageDataset | ClassEntry, suffix: str) -> Path:
    """The path of the next image of `container` in the dataset at `folder`; increments its counter."""
    below = folder / container.folder if isinstance(container, ClassEntry) else folder
    below.mkdir(exist_ok=True)
    number, container.next = container.next, container.next + 1
    return below / f"{number:04d}{suffix}"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of all datasets in the parent of `folder`: they belong to one user and share one quota."""
    if not folder.is_dir():
        raise InputError("These images no longer exist. Add them again.")
    with (folder.parent / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            raise InputError("These images no longer exist. Add them again.")
        yield


def _entries(listed: list[dict[str, str]]) -> list[Entry]:
    return [Entry(**each) for each in listed]


def _class_name(name: str) -> str:
    name = printable_name(name)
    if not name:
        raise InputError("A class needs a name, such as 'red mug'. Enter one.")
    return name


def _delete(path: Path) -> None:
    for each in (path, path.with_suffix(".txt")):
        each.unlink(missing_ok=True)
