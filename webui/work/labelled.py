"""The labelled datasets that are not uploads: scikit-learn's digits, and local folders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from pipelines.fewshot.data import LabelledSet, rename
from pipelines.fewshot.loading import load_folder, load_images
from pipelines.fewshot.samples import sample_set
from pipelines.fewshot.sets import load_set
from pipelines.fewshot.shots import split_notes
from pipelines.fewshot.sources import DatasetSource
from webui.datasets import num_test_images

# The key, the name, the images and the number of images outside of the test split.
ClassRow = tuple[str, str, tuple[DatasetSource, ...], int]


@lru_cache(maxsize=1)
def example() -> tuple[list[ClassRow], tuple[str, ...]]:
    """The classes of scikit-learn's handwritten digits, and sentences on how they were read."""
    return _classes(sample_set())


def read_folder(path: Path, names: Mapping[str, str]) -> tuple[list[ClassRow], tuple[str, ...]]:
    """The class folders in `path`, with the classes in `names` renamed, and sentences on how they were read.

    Raises: InputError if the folder cannot be used, or two classes would have the same name.
    """
    dataset = load_folder(path)
    return _classes(rename(dataset, {key: name for key, name in names.items() if key in dataset.keys}))


def _classes(dataset: LabelledSet) -> tuple[list[ClassRow], tuple[str, ...]]:
    images: list[list[DatasetSource]] = [[] for _ in dataset.classes]
    for image in dataset.images:
        images[image.label].append(image.source)
    tested = Counter(image.label for image in dataset.of_part("test"))
    rows = [
        (key, name, tuple(sources), len(sources) - (tested[label] if dataset.parts else num_test_images(len(sources))))
        for label, (key, name, sources) in enumerate(zip(dataset.keys, dataset.classes, images, strict=True))
    ]
    return rows, (*dataset.notes, *split_notes(dataset))


@lru_cache(maxsize=4)
def sources(path: str | None, dataset: str | None) -> dict[str, DatasetSource]:
    """The images of a dataset by name, in any format that the recipe reads.

    Raises: InputError if the dataset is missing or cannot be read.
    """
    if path is None:
        return {image.name: image.source for image in sample_set().images}
    labelled = load_images(path) if dataset is None else load_set(path, dataset)
    return {image.name: image.source for image in labelled.images}
