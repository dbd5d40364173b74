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
from webui.labelled_classes import EXAMPLE, Kind, LabelledClass, LabelledClasses, held_out_of


@lru_cache(maxsize=1)
def example() -> LabelledClasses:
    """scikit-learn's handwritten digits."""
    return _classes(EXAMPLE, "example", None, sample_set())


def pointed_to(set_id: str, path: Path, names: Mapping[str, str]) -> LabelledClasses:
    """The class folders in `path`, with the classes in `names` renamed.

    Raises: InputError if the folder cannot be used, or two classes would have the same name.
    """
    dataset = load_folder(path)
    class_names = {key: name for key, name in names.items() if key in dataset.keys}
    return _classes(set_id, "folder", path, rename(dataset, class_names))


def _classes(set_id: str, kind: Kind, path: Path | None, dataset: LabelledSet) -> LabelledClasses:
    images: list[list[DatasetSource]] = [[] for _ in dataset.classes]
    for image in dataset.images:
        images[image.label].append(image.source)
    tested = Counter(image.label for image in dataset.of_part("test"))
    classes = tuple(
        LabelledClass(
            key,
            name,
            tuple(class_images),
            len(class_images) - (tested[label] if dataset.parts else held_out_of(len(class_images))),
        )
        for label, (key, name, class_images) in enumerate(zip(dataset.keys, dataset.classes, images, strict=True))
    )
    return LabelledClasses(set_id, kind, path, classes, (*dataset.notes, *split_notes(dataset)))


@lru_cache(maxsize=4)
def sources(path: str | None, dataset: str | None) -> dict[str, DatasetSource]:
    """The images of a dataset by name, in any format that the recipe reads.

    Raises: InputError if the dataset is missing or cannot be read.
    """
    if path is None:
        return {image.name: image.source for image in sample_set().images}
    labelled = load_images(path) if dataset is None else load_set(path, dataset)
    return {image.name: image.source for image in labelled.images}
