"""Labelled images: classes and where their images lie; read, renamed, checked for copies and damage."""

from __future__ import annotations

import hashlib
import io
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from pipelines.errors import InputError
from pipelines.fewshot.layouts import LISTED, listed
from pipelines.fewshot.prompts import clean_name
from pipelines.fewshot.sources import DatasetSource
from pipelines.fewshot.split_words import PARTS as PARTS
from pipelines.fewshot.split_words import Part
from pipelines.images import IMAGE_SUFFIXES, read_image


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """An image of a class.

    Args:
        source: where its bytes come from.
        label: its class's place among the set's classes.
        class_name: that class, for errors.
    """

    source: DatasetSource
    label: int
    class_name: str

    @property
    def name(self) -> str:
        """Its path within its set."""
        return self.source.name


@dataclass(frozen=True)
class LabelledSet:
    """Classes and their images.

    Args:
        name: what errors call the set.
        classes: the classes' names, as prompts speak of them.
        keys: what the classes are called where they were found, such as their folders; renaming a class leaves its key.
        images: of all classes.
        parts: of images' names, where whoever made the set has split it; otherwise empty.
        notes: sentences on how the set was read, and on what of it is not used.
    """

    name: str
    classes: tuple[str, ...]
    keys: tuple[str, ...]
    images: tuple[LabelledImage, ...]
    parts: Mapping[str, Part] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.classes) < 2:
            present = f"only {self.classes[0]!r}" if self.classes else "none"
            raise InputError(f"{self.name} must hold two classes or more, got {present}. Add a folder for each other class.")
        counts = Counter(image.label for image in self.images)
        for label, key in enumerate(self.keys):
            if not counts[label]:
                raise InputError(
                    f"Class {key!r} of {self.name} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}). Add images to it, "
                    "or remove the class."
                )

    def of_part(self, part: Part) -> tuple[LabelledImage, ...]:
        """The images that are in `part`."""
        return tuple(image for image in self.images if self.parts.get(image.name) == part)


def read(image: LabelledImage) -> Image.Image:
    """The image as RGB, upright, transparent parts white.

    Raises: InputError naming the image and its class if it cannot be read.
    """
    source = image.source
    name = f"{source.name!r} of class {image.class_name!r}"
    return read_image(io.BytesIO(source.content()), name, source.max_pixels)


class LabelledImageDataset(Dataset):
    """Images as a model takes them, for a DataLoader's worker processes: (transformed, label).

    Args:
        images: labelled ones.
        transform: what is made of an image as `read` gives it, such as a model's `preprocess`.
    """

    def __init__(self, images: Sequence[LabelledImage], transform: Callable[[Image.Image], Any]) -> None:
        self.images, self.transform = tuple(images), transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.images[index]
        return self.transform(read(image)), image.label

    @property
    def labels(self) -> torch.Tensor:
        """(count,) int64."""
        return torch.tensor([image.label for image in self.images], dtype=torch.int64)


def rename(labelled: LabelledSet, class_names: Mapping[str, str]) -> LabelledSet:
    """The same images with other names for classes.

    Args:
        class_names: by the classes' keys; classes that it leaves out keep their names.
    Raises: InputError for keys of no class, empty names, and names of two classes.
    """
    unknown = sorted(set(class_names) - set(labelled.keys))
    if unknown:
        raise InputError(f"{labelled.name} has no class {unknown[0]!r} to rename. Its classes are {listed(labelled.keys)}.")
    now = tuple(class_names.get(key, name).strip() for key, name in zip(labelled.keys, labelled.classes, strict=True))
    for key, name in zip(labelled.keys, now, strict=True):
        if not clean_name(name) or not name.isprintable():
            raise InputError(f"The name of class {key!r} must be one line of text, got {name!r}.")
        sharing = [other for other, its in zip(labelled.keys, now, strict=True) if clean_name(its) == clean_name(name)]
        if len(sharing) > 1:
            called = clean_name(name)
            raise InputError(f"Each class needs a name of its own, but {listed(sharing)} are all called {called!r}. Rename one.")
    images = tuple(replace(image, class_name=now[image.label]) for image in labelled.images)
    return replace(labelled, classes=now, images=images)


def subset(labelled: LabelledSet, labels: Sequence[int]) -> LabelledSet:
    """The classes of `labels` alone, in this order, labelled from 0."""
    place_of = {label: position for position, label in enumerate(labels)}
    images = tuple(replace(image, label=place_of[image.label]) for image in labelled.images if image.label in place_of)
    names = {image.name for image in images}
    return replace(
        labelled,
        classes=tuple(labelled.classes[label] for label in labels),
        keys=tuple(labelled.keys[label] for label in labels),
        images=images,
        parts={name: part for name, part in labelled.parts.items() if name in names},
    )


def base_and_new(labelled: LabelledSet) -> tuple[LabelledSet, LabelledSet]:
    """The first half of the classes, to train on, and the others, held out; the first has one more where the number is odd.

    This is the split of CoOp's base-to-new protocol.  [Zhou et al. 2022, CoCoOp, section 4.1]

    Raises: InputError if there are fewer than four classes.
    """
    count = len(labelled.classes)
    if count < 4:
        raise InputError(f"Holding out half of the classes needs at least 4 of them, but {labelled.name} has {count}.")
    middle = (count + 1) // 2
    return subset(labelled, range(middle)), subset(labelled, range(middle, count))


@dataclass(frozen=True)
class DuplicateImages:
    """Images whose files hold the same bytes.

    Args:
        names: two or more images' names.
        classes: the classes that they are in, each once.
    """

    names: tuple[str, ...]
    classes: tuple[str, ...]

    @property
    def conflicting(self) -> bool:
        """Whether they are in different classes, so that all but one of their labels are wrong."""
        return len(self.classes) > 1

    def __str__(self) -> str:
        where = f"in the classes {listed(self.classes)}" if self.conflicting else f"in class {self.classes[0]!r}"
        return f"The same image is {len(self.names)} times {where}: {listed(self.names)}."


def find_duplicates(labelled: LabelledSet) -> list[DuplicateImages]:
    """Images that a set holds more than once, by their files' SHA-256; those in two classes come first.

    Only images whose files are of one size are read.
    """
    by_size: dict[int, list[LabelledImage]] = defaultdict(list)
    for image in labelled.images:
        by_size[image.source.size()].append(image)
    by_content: dict[tuple[int, str], list[LabelledImage]] = defaultdict(list)
    for size, images in by_size.items():
        for image in images if len(images) > 1 else ():
            by_content[size, hashlib.sha256(image.source.content()).hexdigest()].append(image)
    duplicates = [
        DuplicateImages(tuple(same.name for same in group), tuple(dict.fromkeys(same.class_name for same in group)))
        for group in by_content.values()
        if len(group) > 1
    ]
    return sorted(duplicates, key=lambda copies: (not copies.conflicting, copies.names))


def without_duplicates(labelled: LabelledSet, copies: Iterable[DuplicateImages]) -> LabelledSet:
    """The set with one of each image: the first of copies in one class; none of copies in several, whose class nobody knows.

    So no image is both learned from and tested on.

    Raises: InputError if a class has none left.
    """
    left_out = {name for duplicate in copies for name in (duplicate.names if duplicate.conflicting else duplicate.names[1:])}
    images = tuple(image for image in labelled.images if image.name not in left_out)
    return replace(labelled, images=images)


def check_readable(images: Sequence[LabelledImage], threads: int = 4) -> None:
    """Decode every image once.

    Raises: InputError naming the first images that cannot be read, and their classes.
    """
    with ThreadPoolExecutor(threads) as pool:
        bar = tqdm(pool.map(_why_unreadable, images), total=len(images), desc="checking images", unit="", leave=False)
        damaged = [reason for reason in bar if reason]
    if damaged:
        more = f" And {len(damaged) - LISTED} more." if len(damaged) > LISTED else ""
        raise InputError(" ".join(damaged[:LISTED]) + more)


def _why_unreadable(image: LabelledImage) -> str | None:
    try:
        read(image)
    except InputError as error:
        return str(error)
    return None
