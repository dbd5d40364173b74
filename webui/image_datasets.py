"""A set of uploaded images on disk: files that we name, and set.json with what their owner calls them.

A set holds images, or classes of images. Whoever changes it holds its owner's lock, so that two tabs, or two servers on one
folder, do not write over each other; readers need none.
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
from training.runs.durable import write_text_atomically
from webui.incoming import shown_name

SET, LOCK = "set.json", ".lock"
MAX_CLASSES = 500
CAPTION_LENGTH = 500


@dataclass
class Entry:
    """An image of a set.

    Args:
        file: its path below the set's folder; what it is called by when something is done to it.
        name: what its owner called the file; to be escaped wherever it is shown.
        caption: what it shows, in its owner's words; empty for none.
    """

    file: str
    name: str
    caption: str = ""


@dataclass
class ClassEntry:
    """A class of a set.

    Args:
        folder: of its images, below the set's.
        name: what its owner calls it; to be escaped wherever it is shown.
        images: in their owner's order.
        next: the number of the next image; none is given twice.
    """

    folder: str
    name: str
    images: list[Entry] = field(default_factory=list)
    next: int = 1


@dataclass
class ImageDataset:
    """What set.json says.

    Args:
        images: those without a class, in their owner's order.
        classes: in the order in which they were made.
        next: the number of the next image; none is given twice.
        next_class: the number of the next class.
    """

    images: list[Entry] = field(default_factory=list)
    classes: list[ClassEntry] = field(default_factory=list)
    next: int = 1
    next_class: int = 0

    def entries(self) -> list[Entry]:
        """All images, with a class or without."""
        return [*self.images, *(entry for each in self.classes for entry in each.images)]

    def home_of(self, file: str) -> ImageDataset | ClassEntry:
        """The class, or else the set, that lists the image `file`.

        Raises: InputError if none does; so no path of a user's is ever followed.
        """
        for home in (self, *self.classes):
            if any(entry.file == file for entry in home.images):
                return home
        raise InputError("This image is no longer there. Reload the page.")

    def entry(self, file: str) -> Entry:
        """The image `file`. Raises: InputError if there is none."""
        return next(entry for entry in self.home_of(file).images if entry.file == file)

    def class_in(self, folder: str) -> ClassEntry:
        """The class whose images lie in `folder`. Raises: InputError if there is none."""
        for each in self.classes:
            if each.folder == folder:
                return each
        raise InputError("This class is no longer there. Reload the page.")

    def new_class(self, name: str) -> ClassEntry:
        """A class called `name`, added; the one that is called so already, if one is.

        Raises: InputError if the name is empty or there are too many.
        """
        name = _class_name(name)
        for each in self.classes:
            if each.name.casefold() == name.casefold():
                return each
        if len(self.classes) >= MAX_CLASSES:
            raise InputError(f"A set may have {MAX_CLASSES} classes at most. Remove one, or begin another set.")
        made = ClassEntry(f"c{self.next_class:02d}", name)
        self.next_class += 1
        self.classes.append(made)
        return made


def read_set(folder: Path) -> ImageDataset:
    """What set.json in `folder` says; an empty set where there is none yet."""
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
    """The set in `folder`, to be changed while nobody else does; written if the block succeeds.

    Raises: InputError if the folder is gone.
    """
    with _locked(folder):
        images = read_set(folder)
        yield images
        write_text_atomically(folder / SET, json.dumps(asdict(images), ensure_ascii=False, indent=1))


def remove_image(folder: Path, file: str) -> None:
    """Take the image `file` out of the set and delete it. Raises: InputError if it is not there."""
    with changing(folder) as images:
        home = images.home_of(file)
        home.images = [entry for entry in home.images if entry.file != file]
        _delete(folder / file)


def reorder(folder: Path, files: Sequence[str]) -> None:
    """Bring the images without a class into the order of `files`; those that it leaves out follow.

    Raises: InputError if one is not there.
    """
    with changing(folder) as images:
        wanted = [images.entry(file) for file in dict.fromkeys(files)]
        if any(entry not in images.images for entry in wanted):
            raise InputError("Only images without a class can be put in order. Reload the page.")
        images.images = [*wanted, *(entry for entry in images.images if entry not in wanted)]


def set_caption(folder: Path, file: str, caption: str) -> None:
    """Say what the image `file` shows, here and in the text file beside it that training reads; empty for nothing.

    Raises: InputError if it is not there or the caption is too long.
    """
    caption = " ".join(caption.split())
    if len(caption) > CAPTION_LENGTH:
        raise InputError(f"A caption may have {CAPTION_LENGTH} letters at most, this one has {len(caption)}. Shorten it.")
    with changing(folder) as images:
        images.entry(file).caption = caption
        beside = (folder / file).with_suffix(".txt")
        if caption:
            write_text_atomically(beside, caption)
        else:
            beside.unlink(missing_ok=True)


def add_class(folder: Path, name: str) -> str:
    """Add a class called `name`; returns its folder, which is the one that is called so already, if one is.

    Raises: InputError if the name is empty or there are too many.
    """
    with changing(folder) as images:
        made = images.new_class(name)
        (folder / made.folder).mkdir(exist_ok=True)
        return made.folder


def rename_class(folder: Path, class_folder: str, name: str) -> None:
    """Call a class `name`; its folder stays. Raises: InputError if it is not there or another one is called so."""
    with changing(folder) as images:
        named, name = images.class_in(class_folder), _class_name(name)
        if any(each is not named and each.name.casefold() == name.casefold() for each in images.classes):
            raise InputError(f"Another class is called {name} already. Choose another name, or move the images there.")
        named.name = name


def remove_class(folder: Path, class_folder: str) -> None:
    """Take a class out of the set and delete its images. Raises: InputError if it is not there."""
    with changing(folder) as images:
        removed = images.class_in(class_folder)
        images.classes.remove(removed)
        shutil.rmtree(folder / removed.folder, ignore_errors=True)


def move_image(folder: Path, file: str, class_folder: str) -> str:
    """Move the image `file` to a class, as its last; returns what it is called by from now on.

    Raises: InputError if the image or the class is not there.
    """
    with changing(folder) as images:
        source, target = images.home_of(file), images.class_in(class_folder)
        if source is target:
            return file
        entry = images.entry(file)
        source.images.remove(entry)
        moved = place_for(folder, target, Path(file).suffix)
        for suffix in (Path(file).suffix, ".txt"):
            if (folder / file).with_suffix(suffix).exists():
                (folder / file).with_suffix(suffix).replace(moved.with_suffix(suffix))
        entry.file = moved.relative_to(folder).as_posix()
        target.images.append(entry)
        return entry.file


def delete_set(folder: Path) -> None:
    """Delete the set in `folder` with all its images. Raises: InputError if it is gone."""
    with _locked(folder):
        shutil.rmtree(folder)


def place_for(folder: Path, home: ImageDataset | ClassEntry, suffix: str) -> Path:
    """Where the next image of `home` goes, in the set at `folder`; its number is taken."""
    below = folder / home.folder if isinstance(home, ClassEntry) else folder
    below.mkdir(exist_ok=True)
    number, home.next = home.next, home.next + 1
    return below / f"{number:04d}{suffix}"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of all sets beside `folder`, which are one owner's and share one limit."""
    if not folder.is_dir():
        raise InputError("These images are no longer there. Add them again.")
    with (folder.parent / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            raise InputError("These images are no longer there. Add them again.")
        yield


def _entries(listed: list[dict[str, str]]) -> list[Entry]:
    return [Entry(**each) for each in listed]


def _class_name(name: str) -> str:
    name = shown_name(name)
    if not name:
        raise InputError("A class needs a name, such as 'red mug'. Type one.")
    return name


def _delete(path: Path) -> None:
    for each in (path, path.with_suffix(".txt")):
        each.unlink(missing_ok=True)
