"""What a classifier can be trained on, as data: a set's classes and their images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelines.errors import InputError
from pipelines.fewshot.sources import DatasetSource

Kind = Literal["example", "own", "folder"]
EXAMPLE = "example"
TEST_SHARE = 0.3


@dataclass(frozen=True)
class LabelledClass:
    """A class and its images.

    Args:
        key: what the recipe calls it: its folder.
        name: what its owner calls it; to be escaped wherever it is shown.
        images: all of them.
        learnable: how many are left when those that are tested on are held out.
    """

    key: str
    name: str
    images: tuple[DatasetSource, ...]
    learnable: int


@dataclass(frozen=True)
class LabelledClasses:
    """The classes of one set as they are now, be they ready to be trained on or not.

    Args:
        id: `EXAMPLE`, or the id of the image set.
        kind: whose images they are.
        data_dir: where the recipe finds them; None for the example.
        classes: in their order.
        notes: sentences on how a folder was read, and on what of it is not used; they hold users' words.
    """

    id: str
    kind: Kind
    data_dir: Path | None
    classes: tuple[LabelledClass, ...]
    notes: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Of all images."""
        return sum(len(one.images) for one in self.classes)

    def names(self) -> dict[str, str]:
        """The classes' names, by their keys."""
        return {one.key: one.name for one in self.classes}

    def class_named(self, key: str) -> LabelledClass:
        """The class of that key. Raises: InputError if there is none."""
        for one in self.classes:
            if one.key == key:
                return one
        raise InputError("This class is no longer there. Reload the page.")

    def data_options(self) -> dict[str, object]:
        """The options of the group data that say which images, and what their classes are called."""
        if self.data_dir is None:
            return {}
        renamed = [f"{one.key}={one.name}" for one in self.classes if one.key != one.name]
        return {"data_dir": str(self.data_dir.absolute()), **({"class_names": renamed} if renamed else {})}


def held_out_of(count: int) -> int:
    """How many of a class's `count` images are tested on."""
    return max(1, round(TEST_SHARE * count))
