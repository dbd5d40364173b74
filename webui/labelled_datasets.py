"""The classes that a classifier can be trained on: the examples, the user's uploads, and local folders."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from pipelines.built_in import ASSETS
from pipelines.errors import InputError
from pipelines.fewshot.archives import ZipLimits, read_zip
from pipelines.fewshot.layouts import counted, is_or_are
from pipelines.fewshot.sources import DatasetSource, ImageFile
from webui.datasets import CLASS_GONE, POINTER, SET, Dataset, DatasetContent, num_test_images
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
    def is_ready(self) -> bool:
        """Whether a run can be started on them."""
        return len(self.classes) > 1 and all(len(one.images) >= FEWEST and one.learnable for one in self.classes)

    def class_named(self, key: str) -> LabelledClass:
        """The class with this key. Raises: InputError if there is none."""
        for one in self.classes:
            if one.key == key:
                return one
        raise InputError(CLASS_GONE)

    def data_options(self) -> dict[str, object]:
        """The options of the group `data` that name the images and the renamed classes."""
        if self.data_dir is None:
            return {}
        renamed = [f"{one.key}={one.name}" for one in self.classes if one.key != one.name]
        return {"data_dir": str(self.data_dir.absolute()), **({"class_names": renamed} if renamed else {})}

    def warnings(self) -> list[str]:
        """Sentences on what prevents training or lowers the accuracy."""
        counts = {one.name: len(one.images) for one in self.classes}
        if not counts:
            return ["There are no classes yet. Add a zip of class folders, or name a class and add its images."]
        said = ["There is only one class. A classifier needs at least two. Add another."] if len(counts) == 1 else []
        for name in (name for name, count in counts.items() if count < FEWEST):
            said.append(f"{name} has {counted(counts[name])}. Training needs at least {FEWEST} per class. Add more.")
        if names := [one.name for one in self.classes if len(one.images) >= FEWEST and not one.learnable]:
            said.append(f"All images of {_listed(names)} are test images. Add images for training.")
        return [*said, *_rough(counts)]

    def duplicates(self) -> list[str]:
        """A sentence for each group of classes that share identical images, which training leaves out."""
        by_size: defaultdict[int, list[tuple[str, DatasetSource]]] = defaultdict(list)
        for one in self.classes:
            for source in one.images:
                by_size[source.size()].append((one.name, source))
        by_content: defaultdict[bytes, set[str]] = defaultdict(set)
        for group in by_size.values():
            if len({name for name, _ in group}) > 1:
                for name, source in group:
                    by_content[hashlib.sha256(source.content()).digest()].add(name)
        shared = Counter(tuple(sorted(names)) for names in by_content.values() if len(names) > 1)
        return [
            f"{counted(count)} {is_or_are(count)} in more than one class: {_listed(names)}. Training leaves such images out. "
            "Remove them from the wrong classes."
            for names, count in shared.items()
        ]


def _rough(counts: Mapping[str, int]) -> Iterator[str]:
    """Sentences on what makes the measured accuracy of classes with so many images a rough estimate."""
    if names := [name for name, count in counts.items() if FEWEST <= count < FEW]:
        yield (
            f"{_listed(names)} {'has' if len(names) == 1 else 'have'} fewer than {FEW} images. Training works, but 30% of them "
            "are test images, so the measured accuracy is only a rough estimate."
        )
    least, most = min(counts, key=counts.get), max(counts, key=counts.get)
    if counts[most] > UNEVEN * max(1, counts[least]):
        yield f"{most} has many more images than {least} ({counts[most]} and {counts[least]}). Add images of {least}."


def class_datasets(workspace: Workspace) -> list[str]:
    """The ids of the user's datasets with classes, and of those that refer to a local folder, newest first."""
    stored = {path.parent for name in (SET, POINTER) for path in workspace.sets.glob(f"*/{name}")}
    folders = [folder for folder in sorted(stored, reverse=True) if not folder.is_symlink()]
    contents = [(folder.name, Dataset(folder).content()) for folder in folders]
    return [set_id for set_id, content in contents if content.classes or content.local_folder is not None]


def title(workspace: Workspace, set_id: str) -> str:
    """The display name of a dataset with classes."""
    if set_id in EXAMPLES:
        return EXAMPLES[set_id][0]
    content = Dataset.of(workspace, set_id).content()
    if content.local_folder is not None:
        return f"Folder {content.local_folder.name}"
    names = [one.name for one in content.classes]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more} ({len(content.images())} images)"


def find_classes(workspace: Workspace, set_id: str) -> LabelledClasses:
    """The classes of a dataset. Raises: InputError if it, or the local folder that it refers to, is gone or cannot be used."""
    if set_id in EXAMPLES:
        return LabelledClasses(set_id, "example", EXAMPLES[set_id][1], *_example(set_id))
    dataset = Dataset.of(workspace, set_id)
    content = dataset.content()
    if content.local_folder is None:
        return uploaded_classes(dataset)
    _check_local(workspace)
    return read_local_folder(set_id, content)


@lru_cache(maxsize=len(EXAMPLES))
def _example(name: str) -> tuple[tuple[LabelledClass, ...], tuple[str, ...]]:
    path = EXAMPLES[name][1]
    if path is None:
        return WORKER.call("example_classes")
    # Read here, so that it is shown before the worker has started.
    images: defaultdict[str, list[DatasetSource]] = defaultdict(list)
    for source in read_zip(path, ZipLimits()).files:
        images[source.name.partition("/")[0]].append(source)
    return tuple(LabelledClass(name, name, tuple(of), len(of) - num_test_images(len(of))) for name, of in images.items()), ()


def uploaded_dataset(workspace: Workspace, set_id: str | None) -> Dataset | None:
    """The dataset `set_id` if the user has uploaded it, so that images can be added to it."""
    dataset = None if set_id is None or set_id in EXAMPLES else Dataset.of(workspace, set_id)
    return dataset if dataset is not None and dataset.content().local_folder is None else None


def uploaded_classes(dataset: Dataset) -> LabelledClasses:
    """The classes of an uploaded dataset."""
    classes = [
        LabelledClass(
            one.folder,
            one.name,
            tuple(ImageFile(image.file, dataset.folder) for image in one.images),
            sum(image.part == "train" for image in one.images),
        )
        for one in dataset.content().classes
    ]
    return LabelledClasses(dataset.folder.name, "own", dataset.folder, tuple(classes))


def read_local_folder(set_id: str, content: DatasetContent) -> LabelledClasses:
    """The class folders of `content.local_folder`. Raises: InputError if they or their new names cannot be used."""
    classes_and_notes = WORKER.call("folder_classes", content.local_folder, content.class_names)
    return LabelledClasses(set_id, "folder", content.local_folder, *classes_and_notes)


def point_to(workspace: Workspace, path: str) -> str:
    """Add a dataset that refers to a local folder, which is never changed; returns its id.

    Raises: InputError if the user is not on this machine, or `path` is not a folder of class folders.
    """
    _check_local(workspace)
    folder = Path(path.strip()).expanduser().absolute()
    if not path.strip() or not folder.is_dir():
        raise InputError(f"There is no folder {path.strip()!r} on this machine. Enter the path of a folder of class folders.")
    read_local_folder("", DatasetContent(local_folder=folder))
    dataset = Dataset(workspace.new_image_set())
    with dataset.change() as content:
        content.local_folder = folder
    return dataset.folder.name


def rename_class(dataset: Dataset, key: str, name: str) -> None:
    """Rename a class; a local folder itself is not changed. Raises: InputError if the name is empty or taken."""
    if dataset.content().local_folder is None:
        dataset.rename_class(key, name)
        return
    with dataset.change() as content:
        content.class_names[key] = name.strip()
        read_local_folder(dataset.folder.name, content)


def dataset_in(workspace: Workspace, folder: str | None) -> str | None:
    """The id of the dataset whose folder or zip a run was given; None if it is outside of the workspace, or gone."""
    for name, (_, path) in EXAMPLES.items():
        if folder == (None if path is None else str(path.absolute())):
            return name
    path = Path(folder)
    if workspace.is_image_set(path):
        return path.name if (path / SET).is_file() else None
    ids = class_datasets(workspace)
    return next((one for one in ids if Dataset.of(workspace, one).content().local_folder == path), None)


def _check_local(workspace: Workspace) -> None:
    if not workspace.is_local:
        raise InputError("Local folders can be used only from this machine. Upload the images instead.")


def _listed(names: Sequence[str]) -> str:
    listed = list(names[:4]) + ([f"{len(names) - 4} more"] if len(names) > 4 else [])
    return listed[0] if len(listed) == 1 else f"{', '.join(listed[:-1])} and {listed[-1]}"
