"""The classes of a labelled dataset and their images."""

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
        key: its folder, which identifies it in the recipe.
        name: the name given by the user; escape it before it goes into HTML.
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
        id: `EXAMPLE`, or the id of the dataset.
        kind: the bundled example, the user's upload ("own"), or a local folder.
        data_dir: the folder that the recipe reads; None for the example.
        classes: in their order.
        notes: sentences on how a folder was read and which files are not used; escape them before they go into HTML.
    """

    id: str
    kind: Kind
    data_dir: Path | None
    classes: tuple[LabelledClass, ...]
    notes: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """The number of all images."""
        return sum(len(one.images) for one in self.classes)

    def names(self) -> dict[str, str]:
        """The class names by key."""
        return {one.key: one.name for one in self.classes}

    def class_named(self, key: str) -> LabelledClass:
        """The class with this key. Raises: InputError if there is none."""
        for one in self.classes:
            if one.key == key:
                return one
        raise InputError("This class no longer exists. Reload the page.")

    def data_options(self) -> dict[str, object]:
        """The options of the group `data` that name the images and the renamed classes."""
        if self.data_dir is None:
            return {}
        renamed = [f"{one.key}={one.name}" for one in self.classes if one.key != one.name]
        return {"data_dir": str(self.data_dir.absolute()), **({"class_names": renamed} if renamed else {})}


def held_out_of(count: int) -> int:
    """The number of test images of a class with `count` images."""
    return max(1, round(TEST_SHARE * count))
