"""Datasets of uploaded images: photos of a subject, or classes of images.

A dataset is a folder with images under generated names and a set.json. Every change holds the user's lock, so that two tabs, or
two servers with the same folder, do not overwrite each other's changes; reading needs no lock.

The test split of classes is fixed. The recipe samples a test split from the names of all images, so one more image would change
the split: two runs on one dataset could not be compared, and an image that was added as a correction might end up in the test
split and bias the accuracy. Each image therefore keeps its part, which the recipe reads from split.json: 30% of each class's
images stay test images for good, and images that are added later only fill up that share. A test image cannot be moved to the
training split, since the accuracy would then be measured on memorised images; with another class, it stays a test image.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from filelock import FileLock
from pydantic import TypeAdapter

from pipelines.built_in import ASSETS
from pipelines.errors import InputError
from pipelines.fewshot.data import LabelledSet, rename
from pipelines.fewshot.loading import load_folder
from pipelines.text_files import write_atomically, write_text_atomically
from pipelines.untrusted_images import UploadedImage
from webui.workspace import Workspace

T = TypeVar("T")
SET, SPLIT, LOCK = "set.json", "split.json", ".lock"
# Named the local folder of a dataset in earlier versions.
POINTER = "folder.json"
EXAMPLE_SUBJECT = ASSETS / "sample-subject"
MAX_CLASSES, CAPTION_LENGTH, NAME_LENGTH = 500, 500, 100
TEST_SHARE = 0.3


@dataclass
class DatasetImage:
    """An image of a dataset.

    Args:
        file: its path below the dataset's folder, which identifies it.
        name: the name of the uploaded file.
        caption: empty for none.
        part: "train" or "test"; empty without a class.
    """

    file: str
    name: str
    caption: str = ""
    part: Literal["", "train", "test"] = ""


@dataclass
class ImageGroup:
    """The images of a class, or of a subject.

    Args:
        folder: the folder of a class below the dataset's; empty for a subject.
        name: the name that the user gave the class.
        images: in the user's order.
        next: the number of the next image; numbers are never reused.
    """

    folder: str = ""
    name: str = ""
    images: list[DatasetImage] = field(default_factory=list)
    next: int = 1

    def next_file(self, suffix: str) -> str:
        """The file of the next image; the number is used up."""
        number, self.next = self.next, self.next + 1
        return (Path(self.folder) / f"{number:04d}{suffix}").as_posix()


@dataclass
class DatasetContent:
    """The content of set.json.

    Args:
        photos: the images of a subject.
        classes: in the order of creation.
        next_class: the number of the next class.
        is_sealed: whether a run was started with the photos. They must not change, because it may be queued or be resumed.
        local_folder: a folder of class folders elsewhere on this machine, which is never changed.
        class_names: the new names of classes in `local_folder`, by their folders.
    """

    photos: ImageGroup = field(default_factory=ImageGroup)
    classes: list[ImageGroup] = field(default_factory=list)
    next_class: int = 0
    is_sealed: bool = False
    local_folder: Path | None = None
    class_names: dict[str, str] = field(default_factory=dict)

    def images(self) -> list[DatasetImage]:
        """All images, with or without a class."""
        return [image for group in (self.photos, *self.classes) for image in group.images]

    def find(self, file: str) -> tuple[ImageGroup, DatasetImage]:
        """The image `file` and its group. Raises: InputError if it is not listed, so that no path from a user is opened."""
        for group in (self.photos, *self.classes):
            for image in group.images:
                if image.file == file:
                    return group, image
        raise InputError("This image no longer exists. Reload the page.")

    def class_in(self, folder: str) -> ImageGroup:
        """The class with the folder `folder`. Raises: InputError if there is none."""
        for one in self.classes:
            if one.folder == folder:
                return one
        raise InputError("This class no longer exists. Reload the page.")

    def read_local_folder(self) -> LabelledSet:
        """The classes in `local_folder`. Raises: InputError if it, or a class's new name, cannot be used."""
        labelled = load_folder(self.local_folder)
        return rename(labelled, {key: name for key, name in self.class_names.items() if key in labelled.keys})


CONTENT = TypeAdapter(DatasetContent)


@dataclass(frozen=True)
class Dataset:
    """A dataset on disk, in the folder `folder`."""

    folder: Path

    @classmethod
    def of(cls, workspace: Workspace, set_id: str | None) -> Dataset:
        """The dataset with the id `set_id`; the bundled subject for None. Raises: InputError if there is none."""
        return cls(EXAMPLE_SUBJECT if set_id is None else workspace.image_set(set_id))

    @property
    def id(self) -> str | None:
        """The id that the browser stores; None for the bundled subject."""
        return None if self.is_example else self.folder.name

    @property
    def is_example(self) -> bool:
        """Whether this is the bundled subject."""
        return self.folder == EXAMPLE_SUBJECT

    def content(self) -> DatasetContent:
        """The images and classes; none if nothing was added yet."""
        if self.is_example:
            images = [DatasetImage(path.name, path.name) for path in sorted(self.folder.glob("*.jpg"))]
            return DatasetContent(ImageGroup(images=images), is_sealed=True)
        stored = _read(self.folder / SET)
        return CONTENT.validate_python(stored if "photos" in stored else _upgraded(self.folder, stored))

    def photos(self) -> list[DatasetImage]:
        """The images of a subject in order, without those whose file is missing."""
        return [image for image in self.content().photos.images if (self.folder / image.file).is_file()]

    def read(self, make: Callable[[], T]) -> T:
        """The result of `make`, called again whenever an image is gone because the user has removed it meanwhile."""
        while True:
            before = self.photos()
            try:
                return make()
            except FileNotFoundError:
                if self.photos() == before:
                    raise

    def signature(self) -> tuple[str, ...]:
        """A value that changes when a subject's images, their captions or their order change."""
        return tuple(f"{one.file}:{(self.folder / one.file).stat().st_mtime_ns}:{one.caption}" for one in self.photos())

    @contextmanager
    def change(self) -> Iterator[DatasetContent]:
        """Lock and read the content; write the changes if the block succeeds.

        Raises: InputError if the dataset is gone, or a run was started with its photos.
        """
        with self._locked():
            content = self.content()
            if content.is_sealed:
                raise InputError("A run was started with these photos. Reload the page; changes then go to a copy.")
            yield content
            self._write(content)

    def _write(self, content: DatasetContent) -> None:
        if content.classes:
            _write_split(self.folder, content.classes)
        write_atomically(self.folder / SET, CONTENT.dump_json(content, indent=1))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock of all datasets beside this one: they belong to one user and share one quota."""
        if self.folder.parent.is_dir():
            with FileLock(self.folder.parent / LOCK):
                if self.folder.is_dir():
                    yield
                    return
        raise InputError("These images no longer exist. Add them again.")

    def editable(self, workspace: Workspace) -> Dataset:
        """This dataset of photos, or a copy if it must not be changed."""
        content = self.content()
        if not content.is_sealed:
            return self
        copy = Dataset(workspace.new_image_set())
        shutil.copytree(self.folder, copy.folder, dirs_exist_ok=True)
        copy._write(replace(content, is_sealed=False))
        return copy

    def seal(self) -> None:
        """Forbid further changes of photos, and rename the files so that a run reads them in the dataset's order.

        A run reads the folder, so photos are deleted that a killed server had stored but not listed.
        """
        if self.content().is_sealed:
            return
        with self.change() as content:
            listed = {Path(image.file).stem for image in content.photos.images}
            for path in self.folder.glob("[0-9]*.*"):
                if path.stem not in listed:
                    path.unlink()
            files = [image.file for image in content.photos.images]
            if files != sorted(files):
                for image in content.photos.images:
                    image.file = self._renamed(image.file, content.photos)
            content.is_sealed = True

    def move(self, file: str, by: int) -> None:
        """Move a photo `by` positions later, or earlier if negative. Raises: InputError if it does not exist."""
        with self.change() as content:
            group, image = content.find(file)
            index = group.images.index(image)
            group.images.insert(max(0, index + by), group.images.pop(index))

    def remove(self, files: Collection[str]) -> None:
        """Remove and delete images. Raises: InputError if one does not exist; none is removed then."""
        with self.change() as content:
            for group, image in [content.find(file) for file in dict.fromkeys(files)]:
                group.images.remove(image)
                for path in _with_caption(self.folder / image.file):
                    path.unlink()

    def set_caption(self, file: str, caption: str) -> None:
        """Set the caption of an image in set.json and in the .txt file that training reads; empty to remove it.

        Raises: InputError if the image does not exist or the caption is too long.
        """
        caption = caption_line(caption)
        with self.change() as content:
            content.find(file)[1].caption = caption
            path = (self.folder / file).with_suffix(".txt")
            if caption:
                write_text_atomically(path, caption)
            else:
                path.unlink(missing_ok=True)

    def add_class(self, name: str) -> str:
        """Add a class called `name`, unless there is one; returns its folder.

        Raises: InputError if the name is empty or there are `MAX_CLASSES` classes.
        """
        name = _class_name(name)
        with self.change() as content:
            for one in content.classes:
                if one.name.casefold() == name.casefold():
                    return one.folder
            if len(content.classes) >= MAX_CLASSES:
                raise InputError(f"A dataset may have at most {MAX_CLASSES} classes. Remove one, or start another dataset.")
            added = ImageGroup(f"c{content.next_class:02d}", name)
            content.next_class += 1
            content.classes.append(added)
            (self.folder / added.folder).mkdir(exist_ok=True)
            return added.folder

    def rename_class(self, folder: str, name: str) -> None:
        """Rename a class; its folder stays. Raises: InputError if it does not exist or the name is empty or taken."""
        with self.change() as content:
            if content.local_folder is not None:
                content.class_names[folder] = name.strip()
                content.read_local_folder()
                return
            renamed, name = content.class_in(folder), _class_name(name)
            if any(one is not renamed and one.name.casefold() == name.casefold() for one in content.classes):
                raise InputError(f"There is already a class called {name}. Choose another name, or move the images to it.")
            renamed.name = name

    def remove_class(self, folder: str) -> None:
        """Remove a class and delete its images. Raises: InputError if it does not exist."""
        with self.change() as content:
            content.classes.remove(content.class_in(folder))
            shutil.rmtree(self.folder / folder, ignore_errors=True)

    def move_to_class(self, files: Collection[str], folder: str) -> list[str]:
        """Move images to the end of a class; returns their new files. Raises: InputError if an image or class does not exist."""
        with self.change() as content:
            target, moved = content.class_in(folder), [content.find(file) for file in dict.fromkeys(files)]
            for group, image in moved:
                group.images.remove(image)
                image.file = self._renamed(image.file, target)
                target.images.append(image)
            return [image.file for _, image in moved]

    def store(self, group: ImageGroup, entry: DatasetImage, image: UploadedImage) -> DatasetImage:
        """Write a new image and its caption under the next name of `group`; the caller adds it to the images of `group`."""
        entry.file = group.next_file(image.suffix)
        path = self.folder / entry.file
        write_atomically(path, image.content)
        if entry.caption:
            write_text_atomically(path.with_suffix(".txt"), entry.caption)
        return entry

    def _renamed(self, file: str, group: ImageGroup) -> str:
        """The next name of `group`, which an image and its caption get."""
        renamed = group.next_file(Path(file).suffix)
        for path in _with_caption(self.folder / file):
            path.replace((self.folder / renamed).with_suffix(path.suffix))
        return renamed

    def delete(self) -> None:
        """Delete the dataset with all its images. Raises: InputError if it is gone."""
        with self._locked():
            shutil.rmtree(self.folder)


def _read(path: Path) -> dict[str, Any]:
    """The content of a JSON file; empty if there is none."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}


def _upgraded(folder: Path, stored: dict[str, Any]) -> dict[str, Any]:
    """set.json of an earlier version, which kept the split, the seal and the local folder in files of their own."""
    parts = {file: part for part, listed in _read(folder / SPLIT).items() for file, _ in listed}
    for group in (stored, *stored.get("classes", ())):
        images = group.get("images", group.get("pictures", ()))
        group["images"] = [{**image, "part": parts.get(image["file"], "")} for image in images]
    pointer = _read(folder / POINTER)
    local = {"local_folder": pointer.get("path"), "class_names": pointer.get("names", {})}
    return {**stored, **local, "photos": stored, "is_sealed": (folder / ".sealed").exists()}


def _with_caption(path: Path) -> list[Path]:
    return [one for one in (path, path.with_suffix(".txt")) if one.exists()]


def _write_split(folder: Path, classes: Sequence[ImageGroup]) -> None:
    """Write split.json, after new images have filled up the test share of their class."""
    parts: dict[str, list[list[str]]] = {"train": [], "test": []}
    for one in classes:
        fresh = [image for image in one.images if not image.part]
        # The order of the hashes is a deterministic shuffle.
        fresh.sort(key=lambda image: hashlib.sha256(image.file.encode()).digest())
        lacking = max(0, num_test_images(len(one.images)) - sum(each.part == "test" for each in one.images))
        for position, image in enumerate(fresh):
            image.part = "test" if position < lacking else "train"
        for image in one.images:
            parts[image.part].append([image.file, one.folder])
    write_text_atomically(folder / SPLIT, json.dumps(parts, indent=1))


def num_test_images(count: int) -> int:
    """The number of test images of a class with `count` images."""
    return max(1, round(TEST_SHARE * count))


def caption_line(caption: str) -> str:
    """`caption` as one line. Raises: InputError if it is too long."""
    caption = " ".join(caption.split())
    if len(caption) > CAPTION_LENGTH:
        raise InputError(f"A caption may have at most {CAPTION_LENGTH} characters, got {len(caption)}. Shorten it.")
    return caption


def _class_name(name: str) -> str:
    name = printable_name(name)
    if not name:
        raise InputError("A class needs a name, such as 'red mug'. Enter one.")
    return name


def printable_name(text: str) -> str:
    """`text` as one line of at most `NAME_LENGTH` printable characters; may be empty."""
    printable = "".join(character if character.isprintable() else " " for character in text)
    return " ".join(printable.split())[:NAME_LENGTH].strip()
