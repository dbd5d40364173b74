"""Render a dataset of photographs under a domain shift, on which zero-shot classification is possible but worse.

    python -m pipelines.fewshot.domain_shift --images_dir PHOTOS --shift sketch --output_dir sketch-0 --seed 0

`PHOTOS` is the folder that the built-in CLIP was pretrained on: it has seen the classes, but never under these shifts. The test
images are those that were held out from its pretraining. There are too few of them to train on as well, so the training images
are from the others, under the same shift.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import HfArgumentParser

from pipelines.corpus import HELD_OUT_SHARE, ZippedPhoto, read_photos, split_held_out, zipped_photos
from pipelines.errors import InputError
from pipelines.fewshot.shifts import SHIFTS
from pipelines.fewshot.split_words import Part
from pipelines.help_format import HelpFormatter
from pipelines.option_checks import at_least, one_of
from pipelines.output_paths import check_output_folder

# Seed of the pretraining of the built-in CLIP, which determines the held-out photographs.
PRETRAINING_SEED = 0


@dataclass
class DomainShiftOptions:
    """The options of the command."""

    images_dir: str = field(
        default="", metadata={"help": "Folder of the pretraining photographs: zips of <class id>/<image>, and classes.json."}
    )
    output_dir: str = field(default="", metadata={"help": "Folder of the dataset, which must not exist or be empty."})
    shift: str = field(default="sketch", metadata={"help": f"One of {', '.join(SHIFTS)}."})
    seed: int = field(default=0, metadata={"help": "Seed of the classes, the training images and the shift's random values."})
    num_classes: int = field(default=20, metadata={"help": "Number of classes."})
    num_train_images: int = field(default=60, metadata={"help": "Training and validation images per class."})

    def __post_init__(self) -> None:
        one_of(self, tuple(SHIFTS), "shift")
        at_least(self, 0, "seed")
        at_least(self, 2, "num_classes")
        at_least(self, 1, "num_train_images")
        for name in ("images_dir", "output_dir"):
            if not getattr(self, name):
                raise InputError(f"{name} must be given.")


@dataclass(frozen=True)
class ShiftedPhoto:
    """A photograph of the dataset.

    Args:
        photo: the photograph.
        part: of the split.
    """

    photo: ZippedPhoto
    part: Part

    @property
    def path(self) -> str:
        """The path within the dataset, such as train/goose/photos-0-017.png."""
        return f"{self.part}/{self.photo.class_name}/{self.photo.archive.stem}-{Path(self.photo.name).stem}.png"


def choose_photos(folder: Path, seed: int, num_classes: int = 20, num_train_images: int = 60) -> list[ShiftedPhoto]:
    """The photographs of a dataset: `num_classes` classes, with `num_train_images` training images and all held-out ones each.

    Args:
        folder: of `zipped_photos`.
    Raises: FileNotFoundError as `zipped_photos`; InputError naming the class with too few photographs, or for too many classes.
    """
    photos = zipped_photos(folder)
    names = sorted({photo.class_name for photo in photos})
    if num_classes > len(names):
        raise InputError(f"num_classes must be at most {len(names)}, the classes in {str(folder)!r}, got {num_classes}.")
    train, held_out = split_held_out([photo.caption for photo in photos], HELD_OUT_SHARE, PRETRAINING_SEED)
    rng = np.random.default_rng(seed)
    chosen = []
    for name in sorted(rng.choice(names, num_classes, replace=False).tolist()):
        seen, unseen = ([photos[index] for index in part if photos[index].class_name == name] for part in (train, held_out))
        _check_class(name, len(seen), len(unseen), num_train_images)
        trained = sorted(rng.choice(len(seen), num_train_images, replace=False).tolist())
        chosen += [ShiftedPhoto(seen[index], "train") for index in trained]
        chosen += [ShiftedPhoto(photo, "test") for photo in unseen]
    return chosen


def _check_class(name: str, num_seen: int, num_unseen: int, num_train_images: int) -> None:
    if num_seen < num_train_images or not num_unseen:
        raise InputError(
            f"Class {name!r} must have {num_train_images} photographs to train on and one that is held out, got {num_seen} and "
            f"{num_unseen}. Lower --num_train_images, or add photographs."
        )


def shifted_images(photos: Sequence[ShiftedPhoto], shift: str, seed: int) -> Iterator[Image.Image]:
    """The images of `photos` under `shift`; the random values of an image depend on its path, the shift and `seed` alone."""
    for shifted, image in zip(photos, read_photos([shifted.photo for shifted in photos]), strict=True):
        digest = hashlib.sha256(f"{seed}/{shift}/{shifted.path}".encode()).digest()
        yield SHIFTS[shift](image, np.random.default_rng(int.from_bytes(digest[:8], "big")))


def write_dataset(options: DomainShiftOptions) -> int:
    """Write the dataset to `options.output_dir`, as train/<class>/<image>.png and test/<class>/<image>.png.

    The folder is complete as soon as it exists. Returns: the number of images.

    Raises: InputError as `choose_photos`, or if the folder exists and is not empty; FileNotFoundError without photographs.
    """
    output = Path(options.output_dir)
    check_output_folder(output, "--output_dir")
    if output.is_dir() and any(output.iterdir()):
        raise InputError(f"--output_dir must be an empty or a new folder, but {str(output)!r} has files. Name another folder.")
    photos = choose_photos(Path(options.images_dir), options.seed, options.num_classes, options.num_train_images)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as folder:
        beside = Path(folder) / output.name
        for shifted, image in zip(photos, shifted_images(photos, options.shift, options.seed), strict=True):
            path = beside / shifted.path
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
        beside.replace(output)
    return len(photos)


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    parser = HfArgumentParser(DomainShiftOptions, description=__doc__, allow_abbrev=False, formatter_class=HelpFormatter)
    try:
        (options,) = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
        count = write_dataset(options)
    except (InputError, FileNotFoundError) as error:
        parser.exit(2, f"error: {error}\n")
    sys.stdout.write(f"{count:,} images in {options.output_dir}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
