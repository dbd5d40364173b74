"""Datasets of labelled images: reading images, renaming classes, finding duplicates and damaged files."""

from __future__ import annotations

import hashlib
import io
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from pipelines.errors import InputError
from pipelines.fewshot.layouts import LISTED, listed
from pipelines.fewshot.prompts import clean_name
from pipelines.fewshot.sources import DatasetSource
from pipelines.fewshot.split_words import Part
from pipelines.images import IMAGE_SUFFIXES, read_image
from pipelines.lazy_modules import torch


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """An image of a class.

    Args:
        source: the file.
        label: index of the class.
        class_name: name of the class, for error messages.
    """

    source: DatasetSource
    label: int
    class_name: str

    @property
    def name(self) -> str:
        """The path within the dataset."""
        return self.source.name


@dataclass(frozen=True)
class LabelledSet:
    """A dataset of labelled images.

    Args:
        name: of the dataset, for messages.
        classes: names of the classes, as used in prompts.
        keys: names of the classes in the source, such as folder names; renaming a class does not change its key.
        images: of all classes.
        parts: part of the split by image name; empty if the dataset defines no split.
        notes: sentences on how the dataset was read and which files are not used.
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
            raise InputError(f"{self.name} must have at least two classes, got {present}. Add a folder for each further class.")
        counts = Counter(image.label for image in self.images)
        for label, key in enumerate(self.keys):
            if not counts[label]:
                raise InputError(
                    f"Class {key!r} of {self.name} has no image ({', '.join(sorted(IMAGE_SUFFIXES))}). Add images to it, "
                    "or remove the class."
                )

    def of_part(self, part: Part) -> tuple[LabelledImage, ...]:
        """The images of `part`."""
        return tuple(image for image in self.images if self.parts.get(image.name) == part)


def read(image: LabelledImage) -> Image.Image:
    """The image in upright RGB, with transparent pixels in white.

    Raises: InputError naming the image and its class if it cannot be read.
    """
    source = image.source
    name = f"{source.name!r} of class {image.class_name!r}"
    return read_image(io.BytesIO(source.content()), name, source.max_pixels)


class LabelledImageDataset:
    """Dataset of (transformed image, label).

    Args:
        images: the labelled images.
        transform: applied to each image that `read` returns, such as `Clip.preprocess`.
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
        """(n,) int64."""
        return torch.tensor([image.label for image in self.images], dtype=torch.int64)


def rename(labelled: LabelledSet, class_names: Mapping[str, str]) -> LabelledSet:
    """The dataset with other class names.

    Args:
        class_names: new names by class key; other classes keep their names.
    Raises: InputError for an unknown key, an empty name, or a name of several classes.
    """
    unknown = sorted(set(class_names) - set(labelled.keys))
    if unknown:
        raise InputError(f"{labelled.name} has no class {unknown[0]!r} to rename. Its classes are {listed(labelled.keys)}.")
    new_names = tuple(class_names.get(key, name).strip() for key, name in zip(labelled.keys, labelled.classes, strict=True))
    for key, name in zip(labelled.keys, new_names, strict=True):
        if not clean_name(name) or not name.isprintable():
            raise InputError(f"The name of class {key!r} must be one line of text, got {name!r}.")
        called = clean_name(name)
        sharing = [other for other, new in zip(labelled.keys, new_names, strict=True) if clean_name(new) == called]
        if len(sharing) > 1:
            raise InputError(f"Class names must be unique, but {listed(sharing)} are all called {called!r}. Rename one.")
    images = tuple(replace(image, class_name=new_names[image.label]) for image in labelled.images)
    return replace(labelled, classes=new_names, images=images)


def subset(labelled: LabelledSet, labels: Sequence[int]) -> LabelledSet:
    """The dataset with only the classes `labels`, relabelled from 0 in this order."""
    index_of = {label: position for position, label in enumerate(labels)}
    images = tuple(replace(image, label=index_of[image.label]) for image in labelled.images if image.label in index_of)
    names = {image.name for image in images}
    return replace(
        labelled,
        classes=tuple(labelled.classes[label] for label in labels),
        keys=tuple(labelled.keys[label] for label in labels),
        images=images,
        parts={name: part for name, part in labelled.parts.items() if name in names},
    )


def base_and_new(labelled: LabelledSet) -> tuple[LabelledSet, LabelledSet]:
    """The first half of the classes, to train on, and the second half, held out.  [Zhou et al. 2022, CoCoOp, section 4.1]

    If the number of classes is odd, the first half has one more.

    Raises: InputError if there are fewer than four classes.
    """
    count = len(labelled.classes)
    if count < 4:
        raise InputError(
            f"Holding out half of the classes needs at least 4 classes, but {labelled.name} has {count}. Add classes."
        )
    middle = (count + 1) // 2
    return subset(labelled, range(middle)), subset(labelled, range(middle, count))


@dataclass(frozen=True)
class DuplicateImages:
    """Images with identical files.

    Args:
        names: of the images, two or more.
        classes: names of their classes, each once.
    """

    names: tuple[str, ...]
    classes: tuple[str, ...]

    @property
    def conflicting(self) -> bool:
        """Whether the images are in different classes, so that at most one label is correct."""
        return len(self.classes) > 1

    def __str__(self) -> str:
        where = f"in the classes {listed(self.classes)}" if self.conflicting else f"in class {self.classes[0]!r}"
        return f"The same image occurs {len(self.names)} times {where}: {listed(self.names)}."


def find_duplicates(images: Iterable[LabelledImage]) -> list[DuplicateImages]:
    """Groups of images with the same SHA-256; groups in several classes come first.

    Only files that share their size with another are read.
    """
    by_size: dict[int, list[LabelledImage]] = defaultdict(list)
    for image in images:
        by_size[image.source.size()].append(image)
    by_content: dict[tuple[int, str], list[LabelledImage]] = defaultdict(list)
    for size, same in by_size.items():
        for image in same if len(same) > 1 else ():
            by_content[size, hashlib.sha256(image.source.content()).hexdigest()].append(image)
    duplicates = [
        DuplicateImages(tuple(same.name for same in group), tuple(dict.fromkeys(same.class_name for same in group)))
        for group in by_content.values()
        if len(group) > 1
    ]
    return sorted(duplicates, key=lambda copies: (not copies.conflicting, copies.names))


def without_duplicates(labelled: LabelledSet, copies: Iterable[DuplicateImages]) -> LabelledSet:
    """The dataset without duplicates, so that no image is both a training and a test image.

    Of identical images in one class the first stays; identical images in several classes are all removed, since their label is
    unknown.

    Raises: InputError if a class has no images left.
    """
    left_out = {name for duplicate in copies for name in (duplicate.names if duplicate.conflicting else duplicate.names[1:])}
    images = tuple(image for image in labelled.images if image.name not in left_out)
    return replace(labelled, images=images)


def check_readable(images: Sequence[LabelledImage], threads: int = 4) -> None:
    """Decode every image once.

    Raises: InputError naming the first unreadable images and their classes.
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
