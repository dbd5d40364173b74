"""The labelled images that a classifier can be trained on: the example, the user's own sets, and folders of this machine.

Which images are tested on. A run draws its test from the names of all images, so that one more image would draw the test
anew: two runs of one set could not be compared, and an image that was added because the classifier got it wrong might be drawn
into the test, which would then be harder than the images that are to come. So each set of the user's own has a split.json,
which the recipe keeps to: three in ten of a class's images are tested on once and for all, those that are added later only
fill up that share, and those that correct the classifier are only ever learned from. Images of the test cannot be moved to
training: the accuracy would be of images that were learned by heart. A wrong label is mended where the images are, and the
next run sees it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from pipelines.errors import InputError
from pipelines.fewshot.sources import DatasetSource, ImageFile
from training.runs.durable import write_text_atomically
from training.runs.record import RunRecord
from webui.image_datasets import SET, changing, read_set
from webui.labelled_classes import EXAMPLE, LabelledClass, LabelledClasses, held_out_of
from webui.uploads import Added, add_images
from webui.workspace import Workspace

POINTER, SPLIT = "folder.json", "split.json"
# One to learn from, one to choose on, one to test on.
FEWEST, FEW, UNEVEN = 3, 10, 5


def class_sets(workspace: Workspace) -> list[str]:
    """The ids of the user's sets that hold classes, or point to a folder that does, newest first."""
    if not workspace.sets.is_dir():
        return []
    folders = [path for path in workspace.sets.iterdir() if path.is_dir() and not path.is_symlink() and _has_classes(path)]
    return [path.name for path in sorted(folders, key=lambda path: path.name, reverse=True)]


def title(workspace: Workspace, set_id: str) -> str:
    """What lists call a set; it holds users' words."""
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
    """The set of that id.

    Raises: InputError if it, or the folder that it points to, is not there or cannot be used.
    """
    if set_id == EXAMPLE:
        # Here, since it loads scikit-learn.
        from webui.work import labelled

        return labelled.example()
    folder = workspace.image_set(set_id)
    if pointer := read_pointer(folder):
        from webui.work import labelled

        if not workspace.is_local:
            raise InputError("Folders of the machine can be named only by who works at it. Upload the images instead.")
        return labelled.pointed_to(set_id, Path(pointer["path"]), pointer["names"])
    return own_set(folder)


def own_set(folder: Path) -> LabelledClasses:
    """The user's own set in `folder`."""
    tested = read_split(folder)["test"]
    classes = []
    for one in read_set(folder).classes:
        files = [entry.file for entry in one.images]
        held_out = len(tested.intersection(files)) or held_out_of(len(files))
        sources = tuple(ImageFile(file, folder) for file in files)
        classes.append(LabelledClass(one.folder, one.name, sources, max(0, len(files) - held_out)))
    return LabelledClasses(folder.name, "own", folder, tuple(classes))


def point_to(workspace: Workspace, path: str) -> str:
    """A set that is a folder of this machine, which is left as it is; returns its id.

    Raises: InputError if the user does not work at the machine, or it is no folder of class folders.
    """
    from webui.work import labelled

    if not workspace.is_local:
        raise InputError("Folders of the machine can be named only by who works at it. Upload the images instead.")
    pointed_to = Path(path.strip()).expanduser().absolute()
    if not path.strip() or not pointed_to.is_dir():
        raise InputError(
            f"There is no folder {path.strip()!r} on this machine. Give the folder that holds a folder for each class."
        )
    labelled.pointed_to(EXAMPLE, pointed_to, {})
    folder = workspace.new_image_set()
    write_text_atomically(folder / POINTER, json.dumps({"path": str(pointed_to), "names": {}}))
    return folder.name


def read_pointer(folder: Path) -> dict[str, object] | None:
    """The path of the folder that a set points to, and the names that its classes are given; None for other sets."""
    path = folder / POINTER
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def name_pointed_class(folder: Path, key: str, name: str) -> None:
    """Call a class of the folder that a set points to `name`; in the folder itself nothing changes.

    Raises: InputError if the name is empty, or another class is called so.
    """
    from webui.work import labelled

    pointer = read_pointer(folder)
    names = {**pointer["names"], key: name.strip()}
    labelled.pointed_to(folder.name, Path(pointer["path"]), names)
    write_text_atomically(folder / POINTER, json.dumps({**pointer, "names": names}))


def read_split(folder: Path) -> dict[str, set[str]]:
    """Which of a set's images are learned from and which tested on: their files by part, "train" and "test"."""
    path = folder / SPLIT
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {part: {name for name, _ in stored.get(part, ())} for part in ("train", "test")}


def settle(folder: Path, training: Collection[str] = (), testing: Collection[str] = ()) -> None:
    """Write down which of the images in the user's own set are tested on, as the module says; done after every change.

    Args:
        training: files that are only ever learned from.
        testing: files that are only ever tested on.
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


def settle_upload(folder: Path, added: Added) -> None:
    """The same after an upload, whose own split is kept where it came with one."""
    testing = {name for name, part in added.parts.items() if part == "test"}
    settle(folder, training=added.parts.keys() - testing, testing=testing)


def _tested(files: Sequence[str], stored: Mapping[str, set[str]], training: set[str], testing: set[str]) -> set[str]:
    """Those of one class's files that are tested on: those that were or must be, and as many new ones as the share lacks."""
    tested = {file for file in files if file in stored["test"] | testing and file not in training}
    fresh = [file for file in files if file not in stored["train"] | stored["test"] | training | testing]
    lacking = max(0, held_out_of(len(files)) - len(tested))
    # As good as drawn, and the same whenever it is done.
    return tested.union(sorted(fresh, key=lambda file: hashlib.sha256(file.encode()).digest())[:lacking])


def add_corrections(folder: Path, files: Mapping[str, Sequence[Path]]) -> Added:
    """Add images whose class the user has said, to be learned from and never tested on.

    Args:
        folder: of the user's own set.
        files: the images by the key of their class.
    Raises: InputError if the set or a class is gone.
    """
    total = Added()
    for key, paths in files.items():
        added = add_images(folder, paths, key)
        total.names += added.names
        total.refused += added.refused
        total.notes += added.notes
    settle(folder, training=total.names)
    return total


def set_of_run(workspace: Workspace, record: RunRecord) -> str | None:
    """The id of the set that a run was trained on; None if it lies elsewhere, or is no longer there."""
    given = record.options().get("data", {}).get("data_dir")
    if given is None:
        return EXAMPLE
    path = Path(given)
    if path.parent == workspace.sets.absolute():
        return path.name if (path / SET).is_file() else None
    return next((one for one in class_sets(workspace) if _points_to(workspace.image_set(one), path)), None)


def warnings(classes: LabelledClasses) -> list[str]:
    """What stands in the way of training, or makes it worse, in sentences that hold users' words."""
    sentences = []
    counts = {one.name: len(one.images) for one in classes.classes}
    if not counts:
        return ["There are no classes yet. Add a zip of class folders, or make a class and drop images into it."]
    if len(counts) == 1:
        sentences.append("There is one class only. A classifier tells two or more apart: add another.")
    for name, count in counts.items():
        if count < FEWEST:
            sentences.append(f"{name} has {_images(count)}. Training needs {FEWEST} of each class at least: add more.")
    unlearnable = [one.name for one in classes.classes if len(one.images) >= FEWEST and not one.learnable]
    if unlearnable:
        sentences.append(
            f"All images of {_listed(unlearnable)} are kept for the test. Training needs others to learn from: add some."
        )
    few = [name for name, count in counts.items() if FEWEST <= count < FEW]
    if few:
        sentences.append(
            f"{_listed(few)} {'has' if len(few) == 1 else 'have'} fewer than {FEW} images. It works, but three in ten of them "
            "are kept for the test, so that the accuracy will be rough."
        )
    if max(counts.values()) > UNEVEN * max(1, min(counts.values())):
        least, most = min(counts, key=counts.get), max(counts, key=counts.get)
        sentences.append(
            f"{most} has many more images than {least} ({counts[most]} and {counts[least]}). More of {least} would help."
        )
    return sentences


def is_ready(classes: LabelledClasses) -> bool:
    """Whether a run can be started with them."""
    return len(classes.classes) > 1 and all(len(one.images) >= FEWEST and one.learnable for one in classes.classes)


def copies(classes: LabelledClasses) -> list[str]:
    """A sentence for each image that is in two classes, none of which training uses."""
    by_size: dict[int, list[tuple[str, DatasetSource]]] = {}
    for one in classes.classes:
        for source in one.images:
            by_size.setdefault(source.size(), []).append((one.name, source))
    homes: dict[bytes, set[str]] = {}
    for group in by_size.values():
        for name, source in group if len({name for name, _ in group}) > 1 else ():
            homes.setdefault(hashlib.sha256(source.content()).digest(), set()).add(name)
    shared: dict[tuple[str, ...], int] = {}
    for names in homes.values():
        if len(names) > 1:
            shared[tuple(sorted(names))] = shared.get(tuple(sorted(names)), 0) + 1
    return [
        f"{_images(count)} {'is' if count == 1 else 'are'} in {_listed(names)} alike. Training leaves such images out: "
        "remove them where they are wrong."
        for names, count in shared.items()
    ]


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
