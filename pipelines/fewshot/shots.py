"""The few images of each class that are learned from, those that settings are chosen on, and those that are tested on.

A split is drawn once, saved with its hash, and reused by every method.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from pipelines.errors import InputError
from pipelines.fewshot.data import PARTS, LabelledImage, LabelledSet, Part
from pipelines.fewshot.layouts import LISTED, listed
from pipelines.fewshot.split_files import read_json
from pipelines.randomness import keyed_generator

Shots = int | Literal["all"]
# As many images of a class validate at most.  [Zhou et al. 2022, CoOp's code]
MOST_VALIDATION = 4
TEST_STREAM, SHOT_STREAM = 0, 1


@dataclass(frozen=True)
class FewShotSplit:
    """Which images are learned from, chosen on and tested on.

    Args:
        shots: images of each class to learn from, or "all".
        seed: of the draw.
        test_share: of the images, where the set was not split already; else None.
        keys: the set's classes, as `LabelledSet.keys`.
        names: of each part's images, class after class, with their labels.
    """

    shots: Shots
    seed: int
    test_share: float | None
    keys: tuple[str, ...]
    names: Mapping[Part, tuple[tuple[str, int], ...]]

    def content(self) -> dict[str, Any]:
        """As it is saved, without the hash; each part's entries are [name, label, class key], as in CoOp's split files."""
        parts = {part: [[name, label, self.keys[label]] for name, label in self.names[part]] for part in PARTS}
        return {"shots": self.shots, "seed": self.seed, "test_share": self.test_share, "keys": list(self.keys)} | parts

    @property
    def sha256(self) -> str:
        """Of the content as JSON with sorted keys and without spaces."""
        return _digest(self.content())

    def images(self, labelled: LabelledSet, part: Part) -> tuple[LabelledImage, ...]:
        """The images of `part`, from the set that the split was drawn from."""
        by_name = {image.name: image for image in labelled.images}
        return tuple(by_name[name] for name, _ in self.names[part])


def _digest(content: Mapping[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def sample_split(labelled: LabelledSet, shots: Shots, seed: int, test_share: float = 0.3) -> FewShotSplit:
    """Draw `shots` images of each class to learn from and min(shots, 4) to validate on.

    A set that is split already keeps its parts, and what it has of fewer than min(shots, 4) validates whole; without a
    part for validation, that is drawn from what is not learned from. A set that is not split gives `test_share` of each
    class to the test first, the same images whatever the seed. What is drawn of a class depends on its key and its
    images alone, and fewer shots are a part of more.

    Args:
        shots: at least 1, or "all".
        test_share: between 0 and 1.
    Raises: InputError naming the classes that the set's own split gives nothing to learn from, or the class that has fewer
        images than are needed.
    """
    _check_sizes(labelled, shots, test_share)
    _check_learnable(labelled)
    names: dict[Part, list[tuple[str, int]]] = {part: [] for part in PARTS}
    for label, class_names in _by_class(labelled):
        class_parts = _drawn(labelled, label, class_names, shots, seed, test_share)
        for part in PARTS:
            names[part] += [(name, label) for name in class_parts[part]]
    if not names["test"]:
        raise InputError(f"{labelled.name} has no image to test on: its own split is train alone. Add a part test.")
    share = None if labelled.parts else test_share
    return FewShotSplit(shots, seed, share, labelled.keys, {part: tuple(listed) for part, listed in names.items()})


def _check_sizes(labelled: LabelledSet, shots: Shots, test_share: float) -> None:
    if shots != "all" and shots < 1:
        raise InputError(f"shots must be 1 or more, or all, got {shots}.")
    if not labelled.parts and not 0 < test_share < 1:
        raise InputError(f"test_share must lie between 0 and 1, got {test_share}.")


def split_notes(labelled: LabelledSet) -> list[str]:
    """Sentences on the classes that the set's own split leaves without images to test on, or to choose settings on."""
    notes = []
    for part, purpose in (("test", "to test on: nothing is measured of"), ("val", "to choose settings on from")):
        without = classes_without(labelled, part)
        if part in labelled.parts.values() and without:
            them = "it" if len(without) == 1 else "them"
            have = "has" if len(without) == 1 else "have"
            notes.append(f"{listed(without)} {have} 0 images {purpose} {them}.")
    return notes


def classes_without(labelled: LabelledSet, part: Part) -> list[str]:
    """The keys of the classes that the set's own split gives no images of `part`; none where it is not split."""
    having = {image.label for image in labelled.images if labelled.parts.get(image.name) == part}
    return [key for label, key in enumerate(labelled.keys) if labelled.parts and label not in having]


def _check_learnable(labelled: LabelledSet) -> None:
    without = classes_without(labelled, "train")
    if without:
        where = ", ".join(
            f"{key!r} ({' and '.join(part for part in PARTS if key not in classes_without(labelled, part))} alone)"
            for key in without[:LISTED]
        )
        more = f" and {len(without) - LISTED} more" if len(without) > LISTED else ""
        raise InputError(
            f"The split of {labelled.name} gives no image to learn from to {where}{more}. Add images of each class to the part "
            "train, or remove the class. A class must be called alike in all parts."
        )


def _by_class(labelled: LabelledSet) -> Iterator[tuple[int, list[str]]]:
    by_label: list[list[str]] = [[] for _ in labelled.keys]
    for image in labelled.images:
        by_label[image.label].append(image.name)
    return enumerate(map(sorted, by_label))


def _drawn(
    labelled: LabelledSet, label: int, names: list[str], shots: Shots, seed: int, test_share: float
) -> dict[Part, list[str]]:
    """Names of one class's images in each part; `names` are all that it has."""
    key = labelled.keys[label]
    held = _held(labelled, key, names, test_share)
    validating = MOST_VALIDATION if shots == "all" else min(shots, MOST_VALIDATION)
    pool = _shuffled(held["train"], SHOT_STREAM, key, seed)
    if "val" in labelled.parts.values():
        from_pool, validation = 0, _shuffled(held["val"], SHOT_STREAM, key, seed)[:validating]
    else:
        from_pool = min(validating, max(1, len(pool) // 2)) if shots == "all" else validating
        # From the end, so that more shots learn from what fewer learn from.
        validation = pool[-from_pool:]
    learned = max(1, len(pool) - from_pool) if shots == "all" else shots
    if len(pool) < learned + from_pool:
        why = "as its own split says" if labelled.parts else f"since {len(held['test'])} are held out for the test"
        raise InputError(
            f"Class {key!r} of {labelled.name} must have {learned + from_pool} images to learn from {learned} and choose on "
            f"{from_pool or len(validation)}, got {len(pool)}, {why}. Add images to it, or {_other_remedy(labelled, shots)}."
        )
    return {"train": pool[:learned], "val": validation, "test": held["test"]}


def _other_remedy(labelled: LabelledSet, shots: Shots) -> str:
    """What helps besides more images, where a class has too few for `shots`."""
    if shots != "all" and shots > 1:
        return "take fewer shots"
    return "leave the class out" if labelled.parts else "leave the class out, or lower --test_share"


def _held(labelled: LabelledSet, key: str, names: list[str], test_share: float) -> dict[Part, list[str]]:
    """One class's images in the set's own parts; without such, the test's share and the rest."""
    if labelled.parts:
        return {part: [name for name in names if labelled.parts.get(name) == part] for part in PARTS}
    shuffled = _shuffled(names, TEST_STREAM, key, 0)
    tested = max(1, round(test_share * len(names)))
    return {"train": sorted(shuffled[tested:]), "val": [], "test": sorted(shuffled[:tested])}


def _shuffled(names: Sequence[str], stream: int, key: str, seed: int) -> list[str]:
    """`names` in an order that depends on the key, the seed, the stream and the names alone."""
    of_key = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    order = torch.randperm(len(names), generator=keyed_generator(stream, of_key, seed))
    return [names[index] for index in order.tolist()]


def save_split(split: FewShotSplit, path: Path) -> None:
    """Write the split as JSON with its SHA-256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    beside.write_text(json.dumps(split.content() | {"sha256": split.sha256}, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def load_split(path: Path, labelled: LabelledSet) -> FewShotSplit:
    """Read a split that was drawn from `labelled`.

    Raises: InputError if the file has been changed since it was written, or does not belong to the set.
    """
    what = repr(str(path))
    content = read_json(path.read_bytes(), what)
    stated = content.pop("sha256", None)
    if _digest(content) != stated:
        raise InputError(f"{what} was changed since it was written: its SHA-256 does not fit. Delete it to draw anew.")
    if tuple(content["keys"]) != labelled.keys:
        raise InputError(f"{what} was drawn from other classes than {labelled.name} has. Delete it to draw anew.")
    label_of = {image.name: image.label for image in labelled.images}
    names = {part: tuple((name, label) for name, label, _ in content[part]) for part in PARTS}
    for part in PARTS:
        for name, label in names[part]:
            if label_of.get(name) != label:
                key = labelled.keys[label]
                raise InputError(
                    f"{what} has {name!r} of class {key!r}, but {labelled.name} has no such image. Put it back, or delete the "
                    "file to draw anew."
                )
    return FewShotSplit(content["shots"], content["seed"], content["test_share"], labelled.keys, names)


def saved_split(path: Path, labelled: LabelledSet, shots: Shots, seed: int, test_share: float = 0.3) -> FewShotSplit:
    """The split at `path`; where there is none, one is drawn and saved there, for all methods that follow.

    Raises: InputError if the saved one was drawn with other settings.
    """
    if not path.exists():
        save_split(sample_split(labelled, shots, seed, test_share), path)
    split = load_split(path, labelled)
    asked = (shots, seed, None if labelled.parts else test_share)
    settings = (split.shots, split.seed, split.test_share)
    if settings != asked:
        raise InputError(
            f"{str(path)!r} was drawn with shots, seed and test_share {settings}, but {asked} are asked for. Name another file."
        )
    return split
