"""The labelled datasets that a classifier can be trained on: the example, the user's uploads, and local folders.

The test split is fixed. The recipe samples a test split from the names of all images, so one more image would change the
split: two runs on one dataset could not be compared, and an image that was added as a correction might end up in the test
split and bias the accuracy. Each uploaded dataset therefore has a split.json that the recipe follows: 30% of each class's
images stay test images for good, images that are added later only fill up that share, and corrections are training images
only. A test image cannot be moved to the training split, since the accuracy would then be measured on memorised images. A
wrong label is fixed by moving the image to its class; the next run uses the new label.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from pipelines.errors import InputError
from pipelines.fewshot.sources import DatasetSource, ImageFile
from pipelines.text_files import write_text_atomically
from training.runs.record import RunRecord
from webui.image_datasets import SET, changing, read_set
from webui.labelled_classes import EXAMPLE, LabelledClass, LabelledClasses, held_out_of
from webui.uploads import Added, add_images
from webui.workspace import Workspace

POINTER, SPLIT = "folder.json", "split.json"
# A class needs at least one image each for training, validation and test; with fewer than FEW the accuracy is a rough estimate.
# UNEVEN is a ratio of class sizes.
FEWEST, FEW, UNEVEN = 3, 10, 5


def class_sets(workspace: Workspace) -> list[str]:
    """The ids of the user's datasets with classes, and of those that refer to a local folder, newest first."""
    if not workspace.sets.is_dir():
        return []
    folders = [path for path in workspace.sets.iterdir() if path.is_dir() and not path.is_symlink() and _has_classes(path)]
    return [path.name for path in sorted(folders, key=lambda path: path.name, reverse=True)]


def title(workspace: Workspace, set_id: str) -> str:
    """The display name of a dataset; escape it before it goes into HTML."""
    if set_id == EXAMPLE:
        return "Example: handwritten digits"
    folder = workspace.image_set(set_id)
    if pointer := read_pointer(folder):
        return f"Folder {Path(pointer['path']).name}"
    dataset = read_set(folder)
    names = [one.name for one in dataset.classes]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more} ({len(dataset.entries())} images)"


def find(workspace: Workspace, set_id: str) -> LabelledClasses:
    """The dataset with this id.

    Raises: InputError if it, or the local folder that it refers to, is gone or cannot be used.
    """
    if set_id == EXAMPLE:
        # Imported here because it loads scikit-learn.
        from webui.work import labelled

        return labelled.example()
    folder = workspace.image_set(set_id)
    if pointer := read_pointer(folder):
        from webui.work import labelled

        if not workspace.is_local:
            raise InputError("Local folders can be used only from this machine. Upload the images instead.")
        return labelled.pointed_to(set_id, Path(pointer["path"]), pointer["names"])
    return uploaded_set(folder)


def uploaded_set(folder: Path) -> LabelledClasses:
    """The uploaded dataset in `folder`."""
    tested = read_split(folder)["test"]
    classes = []
    for one in read_set(folder).classes:
        files = [entry.file for entry in one.images]
        held_out = len(tested.intersection(files)) or held_out_of(len(files))
        sources = tuple(ImageFile(file, folder) for file in files)
        classes.append(LabelledClass(one.folder, one.name, sources, max(0, len(files) - held_out)))
    return LabelledClasses(folder.name, "own", folder, tuple(classes))


def point_to(workspace: Workspace, path: str) -> str:
    """Add a dataset that refers to a local folder, which is never changed; returns its id.

    Raises: InputError if the user is not on this machine, or `path` is not a folder of class folders.
    """
    from webui.work import labelled

    if not workspace.is_local:
        raise InputError("Local folders can be used only from this machine. Upload the images instead.")
    pointed_to = Path(path.strip()).expanduser().absolute()
    if not path.strip() or not pointed_to.is_dir():
        raise InputError(
            f"There is no folder {path.strip()!r} on this machine. Enter the path of a folder with one subfolder per class."
        )
    labelled.pointed_to(EXAMPLE, pointed_to, {})
    folder = workspace.new_image_set()
    write_text_atomically(folder / POINTER, json.dumps({"path": str(pointed_to), "names": {}}))
    return folder.name


def read_pointer(folder: Path) -> dict[str, object] | None:
    """The local folder that a dataset refers to ("path") and its renamed classes ("names"); None for other datasets."""
    path = folder / POINTER
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def name_pointed_class(folder: Path, key: str, name: str) -> None:
    """Rename a class of a dataset that refers to a local folder; the folder itself is not changed.

    Raises: InputError if the name is empty or taken.
    """
    from webui.work import labelled

    pointer = read_pointer(folder)
    names = {**pointer["names"], key: name.strip()}
    labelled.pointed_to(folder.name, Path(pointer["path"]), names)
    write_text_atomically(folder / POINTER, json.dumps({**pointer, "names": names}))


def read_split(folder: Path) -> dict[str, set[str]]:
    """A dataset's stored split: the sets of its files by part, "train" and "test"."""
    path = folder / SPLIT
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {part: {name for name, _ in stored.get(part, ())} for part in ("train", "test")}


def update_split(folder: Path, training: Collection[str] = (), testing: Collection[str] = ()) -> None:
    """Write split.json of an uploaded dataset (see the module's docstring); call it after every change of the images.

    Args:
        training: files that must be in the training split.
        testing: files that must be in the test split.
    """
    with changing(folder) as images:
        stored = read_split(folder)
        parts: dict[str, list[list[str]]] = {"train": [], "test": []}
        for one in images.classes:
            files = [entry.file for entry in one.images]
            tested = _tested(files, stored, set(training), set(testing))
            for file in files:
                parts["test" if file in tested else "train"].append([file, one.folder])
        write_text_atomically(folder / SPLIT, json.dumps(parts, indent=1))


def update_split_after_upload(folder: Path, added: Added) -> None:
    """Write split.json after an upload, keeping the split that the upload came with, if any."""
    testing = {name for name, part in added.parts.items() if part == "test"}
    update_split(folder, training=added.parts.keys() - testing, testing=testing)


def _tested(files: Sequence[str], stored: Mapping[str, set[str]], training: set[str], testing: set[str]) -> set[str]:
    """The test files of one class: those of the stored split, those of `testing`, and new ones up to the test share."""
    tested = {file for file in files if file in stored["test"] | testing and file not in training}
    fresh = [file for file in files if file not in stored["train"] | stored["test"] | training | testing]
    lacking = max(0, held_out_of(len(files)) - len(tested))
    # The order of the hashes is a deterministic shuffle.
    return tested.union(sorted(fresh, key=lambda file: hashlib.sha256(file.encode()).digest())[:lacking])


def add_corrections(folder: Path, files: Mapping[str, Sequence[Path]]) -> Added:
    """Add images labelled by the user to the training split.

    Args:
        folder: the folder of an uploaded dataset.
        files: the images by the key of their class.
    Raises: InputError if the dataset or a class is gone.
    """
    total = Added()
    for key, paths in files.items():
        added = add_images(folder, paths, key)
        total.names += added.names
        total.refused += added.refused
        total.notes += added.notes
    update_split(folder, training=total.names)
    return total


def set_of_run(workspace: Workspace, record: RunRecord) -> str | None:
    """The id of the dataset that a run was trained on; None if it is outside of the workspace, or gone."""
    given = record.options().get("data", {}).get("data_dir")
    if given is None:
        return EXAMPLE
    path = Path(given)
    if path.parent == workspace.sets.absolute():
        return path.name if (path / SET).is_file() else None
    return next((one for one in class_sets(workspace) if _points_to(workspace.image_set(one), path)), None)


def warnings(classes: LabelledClasses) -> list[str]:
    """Sentences on what prevents training or lowers the accuracy; escape them before they go into HTML."""
    counts = {one.name: len(one.images) for one in classes.classes}
    if not counts:
        return ["There are no classes yet. Add a zip of class folders, or name a class and add its images."]
    alone = ["There is only one class. A classifier needs at least two. Add another."] if len(counts) == 1 else []
    return [*alone, *_too_few(counts), *_only_test_images(classes), *_few(counts), *_uneven(counts)]


def _too_few(counts: Mapping[str, int]) -> list[str]:
    return [
        f"{name} has {_images(count)}. Training needs at least {FEWEST} per class. Add more."
        for name, count in counts.items()
        if count < FEWEST
    ]


def _only_test_images(classes: LabelledClasses) -> list[str]:
    names = [one.name for one in classes.classes if len(one.images) >= FEWEST and not one.learnable]
    return [f"All images of {_listed(names)} are test images. Add images for training."] if names else []


def _few(counts: Mapping[str, int]) -> list[str]:
    names = [name for name, count in counts.items() if FEWEST <= count < FEW]
    if not names:
        return []
    verb = "has" if len(names) == 1 else "have"
    return [
        f"{_listed(names)} {verb} fewer than {FEW} images. Training works, but 30% of them are test images, so the measured "
        "accuracy is only a rough estimate."
    ]


def _uneven(counts: Mapping[str, int]) -> list[str]:
    least, most = min(counts, key=counts.get), max(counts, key=counts.get)
    if counts[most] <= UNEVEN * max(1, counts[least]):
        return []
    return [f"{most} has many more images than {least} ({counts[most]} and {counts[least]}). Add images of {least}."]


def is_ready(classes: LabelledClasses) -> bool:
    """Whether a run can be started on them."""
    return len(classes.classes) > 1 and all(len(one.images) >= FEWEST and one.learnable for one in classes.classes)


def duplicates(classes: LabelledClasses) -> list[str]:
    """A sentence for each group of classes that share identical images, which training leaves out."""
    shared = Counter(tuple(sorted(names)) for names in _classes_by_content(classes).values() if len(names) > 1)
    return [
        f"{_images(count)} {'is' if count == 1 else 'are'} in more than one class: {_listed(names)}. Training leaves such images "
        "out. Remove them from the wrong classes."
        for names, count in shared.items()
    ]


def _classes_by_content(classes: LabelledClasses) -> dict[bytes, set[str]]:
    """The names of the classes that hold an image, by its SHA-256. Only files of the same size are read."""
    by_size: defaultdict[int, list[tuple[str, DatasetSource]]] = defaultdict(list)
    for one in classes.classes:
        for source in one.images:
            by_size[source.size()].append((one.name, source))
    by_content: defaultdict[bytes, set[str]] = defaultdict(set)
    for group in by_size.values():
        if len({name for name, _ in group}) > 1:
            for name, source in group:
                by_content[hashlib.sha256(source.content()).digest()].add(name)
    return by_content


def _has_classes(folder: Path) -> bool:
    return (folder / POINTER).is_file() or ((folder / SET).is_file() and bool(read_set(folder).classes))


def _points_to(folder: Path, path: Path) -> bool:
    pointer = read_pointer(folder)
    return pointer is not None and Path(pointer["path"]) == path


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


def _listed(names: Sequence[str]) -> str:
    listed = list(names[:4]) + ([f"{len(names) - 4} more"] if len(names) > 4 else [])
    return listed[0] if len(listed) == 1 else f"{', '.join(listed[:-1])} and {listed[-1]}"
