"""The classes that a classifier can be trained on: the examples, the user's uploads, and local folders."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

from pipelines.built_in import ASSETS
from pipelines.errors import InputError
from pipelines.fewshot.data import LabelledImage, LabelledSet, find_duplicates
from pipelines.fewshot.layouts import counted, is_or_are
from pipelines.fewshot.loading import load_folder, load_zip
from pipelines.fewshot.shots import MOST_VALIDATION, split_notes
from pipelines.fewshot.sources import DatasetSource, ImageFile
from training.options.fewshot import ALL, BUILT_IN_ITERATIONS
from training.options.values import Values, merged
from webui.datasets import POINTER, SET, Dataset, DatasetContent, num_test_images
from webui.inference_worker import WORKER
from webui.workspace import Workspace

# The bundled datasets: their titles and the zips that they are read from; scikit-learn's digits need none.
EXAMPLES: dict[str, tuple[str, Path | None]] = {
    "shapes": ("Example: coloured shapes", ASSETS / "sample-classes" / "coloured-shapes.zip"),
    "digits": ("Example: handwritten digits", None),
}
# A class needs at least one image each for training, validation and test; with fewer than FEW the accuracy is a rough estimate.
# UNEVEN is a ratio of class sizes.
FEWEST, FEW, UNEVEN = 3, 10, 5
# The most steps of a preset with the built-in model.
MOST_STEPS = 400


@dataclass(frozen=True)
class LabelledClass:
    """A class and its images, from any source.

    Args:
        key: its folder, which identifies it in the recipe.
        name: the name given by the user.
        images: all of its images.
        learnable: number of images outside of the test split.
    """

    key: str
    name: str
    images: tuple[DatasetSource, ...]
    learnable: int


@dataclass(frozen=True)
class LabelledClasses:
    """The classes of a dataset, which may be too small for training.

    Args:
        id: a key of `EXAMPLES`, or the id of the dataset.
        kind: the bundled example, the user's upload ("own"), or a local folder.
        data_dir: the folder or zip that the recipe reads; None for the digits.
        classes: in their order.
        notes: sentences on how a folder was read and which files are not used.
    """

    id: str
    kind: Literal["example", "own", "folder"]
    data_dir: Path | None
    classes: tuple[LabelledClass, ...]
    notes: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """The number of all images."""
        return sum(len(one.images) for one in self.classes)

    @property
    def num_tested(self) -> int:
        """The number of test images."""
        return self.count - sum(one.learnable for one in self.classes)

    @property
    def fewest(self) -> int:
        """The number of images of the smallest class that are not for testing, at least 1."""
        return max(1, min((one.learnable for one in self.classes), default=0))

    def data_options(self) -> dict[str, object]:
        """The options of the group `data` that name the images and the renamed classes."""
        if self.data_dir is None:
            return {}
        renamed = [f"{one.key}={one.name}" for one in self.classes if one.key != one.name]
        return {"data_dir": str(self.data_dir.absolute()), **({"class_names": renamed} if renamed else {})}

    def fitted(self, values: Values, chosen: Values) -> Values:
        """The options of a run on them.

        Args:
            values: options of the preset and the user.
            chosen: the user's options only, which are not adapted to the number of images.
        """
        shots, added = values.get("data", {}).get("shots", [ALL]), {"data": self.data_options()}
        if "shots" not in chosen.get("data", {}):
            # Numbers of images per class that every class has, besides those for validation.
            number = values.get("data", {}).get("num_validation_images")
            needed = {one: int(one) + (number or min(int(one), MOST_VALIDATION)) for one in shots if one != ALL}
            shots = [one for one in shots if needed.get(one, 0) <= self.fewest] or [ALL]
            added["data"]["shots"] = shots
        is_bounded = "model" not in values.get("model", {}) and "iterations_per_shot" not in chosen.get("optimisation", {})
        if is_bounded and shots == [ALL] and BUILT_IN_ITERATIONS * self.fewest > MOST_STEPS:
            # Fewer steps for each of many images, so that training on all of them does not take hours.
            added["optimisation"] = {"iterations_per_shot": max(1, MOST_STEPS // self.fewest)}
        return merged(values, added)

    @cached_property
    def problems(self) -> list[str]:
        """Sentences on what prevents training."""
        if not self.classes:
            return ["There are no classes yet. Add a zip of class folders, or name a class and add its images."]
        only = ["There is only one class. A classifier needs at least two. Add another."] if len(self.classes) == 1 else []
        counts = [(one.name, len(one.images)) for one in self.classes if len(one.images) < FEWEST]
        few = [f"{name} has {counted(count)}. Training needs at least {FEWEST} per class. Add more." for name, count in counts]
        tested = [one.name for one in self.classes if len(one.images) >= FEWEST and not one.learnable]
        return [*only, *few, *([f"All images of {_listed(tested)} are test images. Add images for training."] if tested else [])]

    def check(self) -> None:
        """Raises: InputError if no run can be started on them."""
        if self.problems:
            raise InputError(self.problems[0])

    def warnings(self) -> list[str]:
        """Sentences on what prevents training or lowers the accuracy; none for an example."""
        counts = {one.name: len(one.images) for one in self.classes}
        if self.kind == "example" or not counts:
            return list(self.problems)
        sentences = list(self.problems)
        if rough := [name for name, count in counts.items() if FEWEST <= count < FEW]:
            sentences.append(
                f"{_listed(rough)} {'has' if len(rough) == 1 else 'have'} fewer than {FEW} images. Training works, but 30% of "
                "them are test images, so the measured accuracy is only a rough estimate."
            )
        least, most = min(counts, key=counts.get), max(counts, key=counts.get)
        if counts[most] > UNEVEN * max(1, counts[least]):
            both = f"{counts[most]} and {counts[least]}"
            sentences.append(f"{most} has many more images than {least} ({both}). Add images of {least}.")
        return sentences + self.duplicates()

    def duplicates(self) -> list[str]:
        """A sentence for each group of classes that share identical images, which training leaves out."""
        images = [LabelledImage(source, label, one.name) for label, one in enumerate(self.classes) for source in one.images]
        shared = Counter(each.classes for each in find_duplicates(images) if each.conflicting)
        return [
            f"{counted(count)} {is_or_are(count)} in more than one class: {_listed(names)}. Training leaves such images out. "
            "Remove them from the wrong classes."
            for names, count in shared.items()
        ]


def class_datasets(workspace: Workspace) -> dict[str, DatasetContent]:
    """The user's datasets with classes, and those that refer to a local folder, newest first, by their ids."""
    stored = {path.parent for name in (SET, POINTER) for path in workspace.sets.glob(f"*/{name}")}
    folders = [folder for folder in sorted(stored, reverse=True) if not folder.is_symlink()]
    contents = {folder.name: Dataset(folder).content() for folder in folders}
    return {set_id: content for set_id, content in contents.items() if content.classes or content.local_folder is not None}


def titles(workspace: Workspace) -> dict[str, str]:
    """The display names of the examples and of the user's datasets with classes, by their ids."""
    by_id = {name: title for name, (title, _) in EXAMPLES.items()}
    for set_id, content in class_datasets(workspace).items():
        names = [one.name for one in content.classes]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        title = f"{', '.join(names[:3])}{more} ({len(content.images())} images)"
        by_id[set_id] = title if content.local_folder is None else f"Folder {content.local_folder.name}"
    return by_id


def find_classes(workspace: Workspace, set_id: str) -> LabelledClasses:
    """The classes of a dataset. Raises: InputError if it, or the local folder that it refers to, is gone or cannot be used."""
    if set_id in EXAMPLES:
        return _example(set_id)
    dataset = Dataset.of(workspace, set_id)
    content = dataset.content()
    if content.local_folder is None:
        return uploaded_classes(dataset)
    _check_local(workspace)
    return _read(set_id, "folder", content.local_folder, content.read_local_folder())


@lru_cache(maxsize=len(EXAMPLES))
def _example(name: str) -> LabelledClasses:
    path = EXAMPLES[name][1]
    # A zip is read here, so that it is shown before the worker has started.
    return _read(name, "example", path, WORKER.call("digits") if path is None else load_zip(path))


def _read(set_id: str, kind: Literal["example", "folder"], path: Path | None, labelled: LabelledSet) -> LabelledClasses:
    images, classes = defaultdict(list), []
    for image in labelled.images:
        images[image.label].append(image.source)
    num_tested = Counter(image.label for image in labelled.of_part("test"))
    for label, (key, name) in enumerate(zip(labelled.keys, labelled.classes, strict=True)):
        count = len(images[label])
        num_learnable = count - (num_tested[label] if labelled.parts else num_test_images(count))
        classes.append(LabelledClass(key, name, tuple(images[label]), num_learnable))
    return LabelledClasses(set_id, kind, path, tuple(classes), (*labelled.notes, *split_notes(labelled)))


def uploaded_dataset(workspace: Workspace, set_id: str | None) -> Dataset | None:
    """The dataset `set_id` if the user has uploaded it, so that images can be added to it."""
    dataset = None if set_id is None or set_id in EXAMPLES else Dataset.of(workspace, set_id)
    return dataset if dataset is not None and dataset.content().local_folder is None else None


def uploaded_classes(dataset: Dataset) -> LabelledClasses:
    """The classes of an uploaded dataset."""
    classes = []
    for one in dataset.content().classes:
        images = tuple(ImageFile(image.file, dataset.folder) for image in one.images)
        classes.append(LabelledClass(one.folder, one.name, images, sum(image.part == "train" for image in one.images)))
    return LabelledClasses(dataset.folder.name, "own", dataset.folder, tuple(classes))


def point_to(workspace: Workspace, path: str) -> str:
    """Add a dataset that refers to a local folder, which is never changed; returns its id.

    Raises: InputError if the user is not on this machine, or `path` is not a folder of class folders.
    """
    _check_local(workspace)
    folder = Path(path.strip()).expanduser().absolute()
    if not path.strip() or not folder.is_dir():
        raise InputError(f"There is no folder {path.strip()!r} on this machine. Enter the path of a folder of class folders.")
    load_folder(folder)
    dataset = Dataset(workspace.new_image_set())
    with dataset.change() as content:
        content.local_folder = folder
    return dataset.folder.name


def dataset_in(workspace: Workspace, folder: str | None) -> str | None:
    """The id of the dataset whose folder or zip a run was given; None if it is outside of the workspace, or gone."""
    for name, (_, path) in EXAMPLES.items():
        if folder == (None if path is None else str(path.absolute())):
            return name
    if workspace.is_image_set(folder):
        return workspace.set_in(folder)
    datasets = class_datasets(workspace)
    return next((set_id for set_id, content in datasets.items() if content.local_folder == Path(folder)), None)


def _check_local(workspace: Workspace) -> None:
    if not workspace.is_local:
        raise InputError("Local folders can be used only from this machine. Upload the images instead.")


def _listed(names: Sequence[str]) -> str:
    listed = list(names[:4]) + ([f"{len(names) - 4} more"] if len(names) > 4 else [])
    return listed[0] if len(listed) == 1 else f"{', '.join(listed[:-1])} and {listed[-1]}"
