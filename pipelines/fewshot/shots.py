"""Sample a few-shot split of a dataset into training, validation and test images.

A split is sampled once, saved with its hash, and reused by every method.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipelines.errors import InputError
from pipelines.fewshot.data import LabelledImage, LabelledSet
from pipelines.fewshot.layouts import LISTED, counted, listed
from pipelines.fewshot.split_files import read_json
from pipelines.fewshot.split_words import PARTS, Part
from pipelines.lazy_modules import torch
from pipelines.randomness import keyed_generator

Shots = int | Literal["all"]
# Largest number of validation images per class, unless a number is given.  [Zhou et al. 2022, CoOp's code]
MOST_VALIDATION = 4
TEST_STREAM, SHOT_STREAM = 0, 1
# Key of a split file.
NUM_VALIDATION = "num_validation_images"


@dataclass(frozen=True)
class FewShotSplit:
    """The training, validation and test images of a few-shot split.

    Args:
        shots: number of training images per class, or "all".
        seed: of the sampling.
        test_share: share of the images used as test images; None if the dataset defines a split.
        keys: of the classes, as `LabelledSet.keys`.
        names: names and labels of the images of each part, class by class.
        num_validation: validation images per class; None for the default.
    """

    shots: Shots
    seed: int
    test_share: float | None
    keys: tuple[str, ...]
    names: Mapping[Part, tuple[tuple[str, int], ...]]
    num_validation: int | None = None

    def content(self) -> dict[str, Any]:
        """The saved content without the hash; the entries of each part are [name, label, class key], as in CoOp's split files."""
        parts = {part: [[name, label, self.keys[label]] for name, label in self.names[part]] for part in PARTS}
        # Left out by default, so that the hash is that of earlier versions.
        number = {} if self.num_validation is None else {NUM_VALIDATION: self.num_validation}
        sampling = {"shots": self.shots, "seed": self.seed, "test_share": self.test_share}
        return sampling | number | {"keys": list(self.keys)} | parts

    @property
    def sha256(self) -> str:
        """The hash of the content as JSON with sorted keys and without spaces."""
        return _digest(self.content())

    def images(self, labelled: LabelledSet, part: Part) -> tuple[LabelledImage, ...]:
        """The images of `part` in the dataset that the split was sampled from."""
        by_name = {image.name: image for image in labelled.images}
        return tuple(by_name[name] for name, _ in self.names[part])


def _digest(content: Mapping[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def sample_split(
    labelled: LabelledSet, shots: Shots, seed: int, test_share: float = 0.3, num_validation: int | None = None
) -> FewShotSplit:
    """Sample `shots` training images, and `num_validation` or else at most min(shots, 4) validation images of each class.

    If the dataset defines a split, images are sampled within its parts; without a validation part, validation images are sampled
    from the training part. Otherwise `test_share` of each class are test images, which do not depend on the seed.

    The sample of a class depends only on its key, its images and the seed. The training images of fewer shots are a subset of
    those of more.

    Args:
        shots: at least 1, or "all".
        test_share: between 0 and 1.
        num_validation: at least 1; every class must then have so many.
    Raises: InputError naming the classes without training images, or the class with too few images.
    """
    _check_sizes(labelled, shots, test_share, num_validation)
    _check_learnable(labelled)
    names: dict[Part, list[tuple[str, int]]] = {part: [] for part in PARTS}
    for label, class_names in _by_class(labelled):
        by_part = _class_by_part(labelled, labelled.keys[label], class_names, test_share)
        class_parts = _sample_class(labelled, labelled.keys[label], by_part, shots, seed, num_validation)
        for part in PARTS:
            names[part] += [(name, label) for name in class_parts[part]]
    if not names["test"]:
        raise InputError(f"{labelled.name} has no test images: its split has only training images. Add a part test.")
    share = None if labelled.parts else test_share
    by_part = {part: tuple(listed) for part, listed in names.items()}
    return FewShotSplit(shots, seed, share, labelled.keys, by_part, num_validation)


def _check_sizes(labelled: LabelledSet, shots: Shots, test_share: float, num_validation: int | None) -> None:
    if shots != "all" and shots < 1:
        raise InputError(f"shots must be 1 or more, or all, got {shots}.")
    if num_validation is not None and num_validation < 1:
        raise InputError(f"num_validation_images must be at least 1, got {num_validation}.")
    if not labelled.parts and not 0 < test_share < 1:
        raise InputError(f"test_share must be between 0 and 1, got {test_share}.")


def split_notes(labelled: LabelledSet) -> list[str]:
    """Notes on classes without test or validation images in the split that the dataset defines."""
    notes = []
    for part, images in (("test", "test images, so their accuracy is unknown"), ("val", "validation images")):
        without = classes_without(labelled, part)
        if part in labelled.parts.values() and without:
            notes.append(f"Some classes have no {images}: {listed(without)}.")
    return notes


def classes_without(labelled: LabelledSet, part: Part) -> list[str]:
    """The keys of the classes without images of `part`; empty if the dataset defines no split."""
    having = {image.label for image in labelled.images if labelled.parts.get(image.name) == part}
    return [key for label, key in enumerate(labelled.keys) if labelled.parts and label not in having]


def _check_learnable(labelled: LabelledSet) -> None:
    without = classes_without(labelled, "train")
    if without:
        where = ", ".join(
            f"{key!r} ({' and '.join(part for part in PARTS if key not in classes_without(labelled, part))} only)"
            for key in without[:LISTED]
        )
        more = f" and {len(without) - LISTED} more" if len(without) > LISTED else ""
        raise InputError(
            f"Every class needs training images, but the split of {labelled.name} has none of {where}{more}. Add images of these "
            "classes to the part train, or remove the classes. A class must have the same name in all parts."
        )


def _by_class(labelled: LabelledSet) -> Iterator[tuple[int, list[str]]]:
    by_label: list[list[str]] = [[] for _ in labelled.keys]
    for image in labelled.images:
        by_label[image.label].append(image.name)
    return enumerate(map(sorted, by_label))


def _sample_class(
    labelled: LabelledSet,
    key: str,
    by_part: Mapping[Part, list[str]],
    shots: Shots,
    seed: int,
    num_validation: int | None,
) -> dict[Part, list[str]]:
    """The names of the images of class `key` in each part, sampled from all its names in `by_part`."""
    wanted = num_validation or (MOST_VALIDATION if shots == "all" else min(shots, MOST_VALIDATION))
    pool = _shuffled(by_part["train"], SHOT_STREAM, key, seed)
    if "val" in labelled.parts.values():
        from_pool, validation = 0, _shuffled(by_part["val"], SHOT_STREAM, key, seed)[:wanted]
        _check_validation(labelled, key, len(validation), num_validation)
    else:
        is_bounded = shots == "all" and num_validation is None
        from_pool = min(wanted, max(1, len(pool) // 2)) if is_bounded else wanted
        # From the end, so that the training images of fewer shots are a subset of those of more.
        validation = pool[-from_pool:]
    trained = max(1, len(pool) - from_pool) if shots == "all" else shots
    if len(pool) < trained + from_pool:
        needed = f"{trained} training and {from_pool} validation images" if from_pool else f"{trained} training images"
        remedy = _other_remedy(labelled, shots, from_pool if num_validation else 0)
        raise _too_few(labelled, key, needed, len(pool), remedy)
    return {"train": pool[:trained], "val": validation, "test": by_part["test"]}


def _too_few(labelled: LabelledSet, key: str, needed: str, count: int, remedy: str) -> InputError:
    present = f"{counted(count)} {'in the part train' if labelled.parts else 'besides the test images'}"
    return InputError(f"Class {key!r} of {labelled.name} must have {needed}, got {present}. Add images to it, or {remedy}.")


def _check_validation(labelled: LabelledSet, key: str, count: int, num_validation: int | None) -> None:
    if num_validation is not None and count < num_validation:
        raise InputError(
            f"Class {key!r} of {labelled.name} must have {num_validation} validation images, got {counted(count)} in the part "
            "val. Add images to it, or lower --num_validation_images."
        )


def _other_remedy(labelled: LabelledSet, shots: Shots, num_validation: int) -> str:
    """The remedy, besides more images, for a class with too few images for `shots` and, if given, `num_validation`."""
    if num_validation > 1:
        return "lower --num_validation_images"
    if shots != "all" and shots > 1:
        return "use fewer shots"
    return "remove the class" if labelled.parts else "remove the class, or lower --test_share"


def _class_by_part(labelled: LabelledSet, key: str, names: list[str], test_share: float) -> dict[Part, list[str]]:
    """One class's images by part of the split that the dataset defines; otherwise test images and the rest."""
    if labelled.parts:
        return {part: [name for name in names if labelled.parts.get(name) == part] for part in PARTS}
    shuffled = _shuffled(names, TEST_STREAM, key, 0)
    count = max(1, round(test_share * len(names)))
    return {"train": sorted(shuffled[count:]), "val": [], "test": sorted(shuffled[:count])}


def _shuffled(names: Sequence[str], stream: int, key: str, seed: int) -> list[str]:
    """`names` in an order that depends only on the key, the seed, the stream and the names."""
    of_key = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    order = torch.randperm(len(names), generator=keyed_generator(stream, of_key, seed))
    return [names[index] for index in order.tolist()]


def save_split(split: FewShotSplit, path: Path) -> None:
    """Write the split as JSON with its SHA-256."""
    # Imported here: it imports peft, which takes seconds, and --help does not need it.
    from nora_vision.files import replacing

    with replacing(path) as beside:
        beside.write_text(json.dumps(split.content() | {"sha256": split.sha256}, indent=1) + "\n", encoding="utf-8")


def load_split(path: Path, labelled: LabelledSet) -> FewShotSplit:
    """Read a split that was sampled from `labelled`.

    Raises: InputError if the file was changed after it was written, or does not fit the dataset.
    """
    what = repr(str(path))
    content = read_json(path.read_bytes(), what)
    stated = content.pop("sha256", None)
    if _digest(content) != stated:
        raise InputError(f"{what} was changed after it was written: its SHA-256 does not match. Delete it to sample a new split.")
    if tuple(content["keys"]) != labelled.keys:
        raise InputError(f"{what} was sampled from other classes than {labelled.name} has. Delete it to sample a new split.")
    label_of = {image.name: image.label for image in labelled.images}
    names = {part: tuple((name, label) for name, label, _ in content[part]) for part in PARTS}
    for part in PARTS:
        for name, label in names[part]:
            if label_of.get(name) != label:
                key = labelled.keys[label]
                raise InputError(
                    f"{what} lists {name!r} of class {key!r}, but {labelled.name} has no such image. Restore the image, or "
                    "delete the file to sample a new split."
                )
    settings = (content["shots"], content["seed"], content["test_share"])
    return FewShotSplit(*settings, labelled.keys, names, content.get(NUM_VALIDATION))


def saved_split(
    path: Path,
    labelled: LabelledSet,
    shots: Shots,
    seed: int,
    test_share: float = 0.3,
    num_validation: int | None = None,
) -> FewShotSplit:
    """The split saved at `path`; if there is none, one is sampled and saved first.

    Raises: InputError if the saved split was sampled with other settings.
    """
    if not path.exists():
        save_split(sample_split(labelled, shots, seed, test_share, num_validation), path)
    split = load_split(path, labelled)
    requested = (shots, seed, None if labelled.parts else test_share, num_validation)
    settings = (split.shots, split.seed, split.test_share, split.num_validation)
    if settings != requested:
        raise InputError(
            f"shots, seed, test_share and num_validation_images must be {settings} as in the split {str(path)!r}, got "
            f"{requested}. Use another file."
        )
    return split
