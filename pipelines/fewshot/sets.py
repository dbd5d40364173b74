"""Load the eleven datasets of the CoOp protocol: one folder each below a root folder, with CoOp's split files.

The layout is that of DATASETS.md in github.com/KaiyangZhou/CoOp, which CLIP-LoRA and most other methods use too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pipelines.errors import InputError
from pipelines.fewshot.data import LabelledImage, LabelledSet
from pipelines.fewshot.sources import ImageFile
from pipelines.fewshot.split_files import read_json
from pipelines.fewshot.split_words import PARTS, Part
from pipelines.images import has_image_name
from pipelines.text_files import read_text

INSTRUCTIONS = "Arrange its files as in DATASETS.md of github.com/KaiyangZhou/CoOp"
# Path, label, class and part of an image.
Listed = tuple[str, int, str, Part]


@dataclass(frozen=True)
class SetLayout:
    """The files of a dataset.

    Args:
        title: name of the dataset in papers.
        folder: its folder below the root; case-insensitive.
        images: folder below `folder` that the paths in the split are relative to.
        split: split file in `folder`; None for datasets with another kind of split.
    """

    title: str
    folder: str
    images: str
    split: str | None = None


SETS: Mapping[str, SetLayout] = {
    "imagenet": SetLayout("ImageNet", "imagenet", "images"),
    "caltech101": SetLayout("Caltech101", "caltech-101", "101_ObjectCategories", "split_zhou_Caltech101.json"),
    "oxford_pets": SetLayout("OxfordPets", "oxford_pets", "images", "split_zhou_OxfordPets.json"),
    "stanford_cars": SetLayout("StanfordCars", "stanford_cars", ".", "split_zhou_StanfordCars.json"),
    "oxford_flowers": SetLayout("Flowers102", "oxford_flowers", "jpg", "split_zhou_OxfordFlowers.json"),
    "food101": SetLayout("Food101", "food-101", "images", "split_zhou_Food101.json"),
    "fgvc_aircraft": SetLayout("FGVCAircraft", "fgvc_aircraft", "images"),
    "sun397": SetLayout("SUN397", "sun397", "SUN397", "split_zhou_SUN397.json"),
    "dtd": SetLayout("DTD", "dtd", "images", "split_zhou_DescribableTextures.json"),
    "eurosat": SetLayout("EuroSAT", "eurosat", "2750", "split_zhou_EuroSAT.json"),
    "ucf101": SetLayout("UCF101", "ucf101", "UCF-101-midframes", "split_zhou_UCF101.json"),
}


def load_set(root: str | Path, name: str) -> LabelledSet:
    """Load one of the eleven datasets with the parts of its split file.

    As in CoOp, ImageNet's validation folder is the test part. CoOp also validates on it; here ImageNet has no validation part,
    so validation images are sampled from the training images.

    Args:
        root: the folder that contains the folders of the datasets.
        name: a key of `SETS`.
    Raises: InputError naming the file that is missing or cannot be used.
    """
    if name not in SETS:
        raise InputError(f"dataset must be one of {', '.join(SETS)}, got {name!r}. Leave it out for a folder of class folders.")
    layout = SETS[name]
    folder = _folder_of(Path(root), layout)
    read: Callable[[Path, SetLayout], list[Listed]] = READERS.get(name, _from_split_file)
    listed = read(folder, layout)
    class_of = _classes(listed, layout)
    image_folder = folder / layout.images
    labels = sorted(class_of)
    if labels != list(range(len(labels))):
        raise InputError(
            f"The labels of {layout.title} must be 0 to {len(labels) - 1}, got {labels[0]} to {labels[-1]}. {INSTRUCTIONS}."
        )
    images = tuple(LabelledImage(ImageFile(path, image_folder), label, key) for path, label, key, _ in listed)
    keys = tuple(class_of[label] for label in labels)
    parts = {path: part for path, _, _, part in listed}
    if len(parts) < len(listed):
        raise InputError(f"{layout.title} lists an image twice. {INSTRUCTIONS}.")
    return LabelledSet(layout.title, keys, keys, images, parts)


def _folder_of(root: Path, layout: SetLayout) -> Path:
    if root.is_dir():
        for folder in sorted(root.iterdir()):
            if folder.name.casefold() == layout.folder.casefold() and folder.is_dir():
                return folder
    raise InputError(f"{layout.title} must be in {str(root / layout.folder)!r}, but there is no such folder. {INSTRUCTIONS}.")


def _classes(listed: list[Listed], layout: SetLayout) -> dict[int, str]:
    class_of: dict[int, str] = {}
    for path, label, key, _ in listed:
        if class_of.setdefault(label, key) != key:
            raise InputError(
                f"Label {label} of {layout.title} must be one class, but is {key!r} for {path!r} and {class_of[label]!r} before. "
                f"{INSTRUCTIONS}."
            )
    return class_of


def _from_split_file(folder: Path, layout: SetLayout) -> list[Listed]:
    """Read CoOp's file: {"train": [[path below the image folder, label, class], ...], "val": [...], "test": [...]}."""
    split = _needed(folder / layout.split, layout)
    what = f"{str(split)!r}"
    content = read_json(split.read_bytes(), what)
    missing = [part for part in PARTS if not isinstance(content.get(part), list)]
    if missing:
        raise InputError(f"{what} must list the images of {missing[0]!r}. {INSTRUCTIONS}.")
    listed = [_entry(entry, part, what) for part in PARTS for entry in content[part]]
    for path, _, key, _ in listed:
        if not (folder / layout.images / path).is_file():
            raise InputError(
                f"{what} lists {path!r} of class {key!r}, but there is no such file in {str(folder / layout.images)!r}. "
                f"{INSTRUCTIONS}."
            )
    return listed


def _is_relative(path: PurePosixPath) -> bool:
    return ".." not in path.parts and not path.is_absolute()


def _entry(entry: Any, part: Part, what: str) -> Listed:
    match entry:
        case [str(path), int(label), str(key)] if _is_relative(PurePosixPath(path)):
            return path, label, key, part
    raise InputError(f"{what} must list [path below the image folder, label, class] in {part!r}, got {entry!r}. {INSTRUCTIONS}.")


def _from_imagenet(folder: Path, layout: SetLayout) -> list[Listed]:
    """Read images/train/<wordnet id>/... and images/val/<wordnet id>/...; lines of classnames.txt are "<wordnet id> <name>"."""
    images = folder / layout.images
    train = sorted(path.name for path in _needed(images / "train", layout).iterdir() if path.is_dir())
    val = sorted(path.name for path in _needed(images / "val", layout).iterdir() if path.is_dir())
    if train != val:
        odd = sorted(set(train) ^ set(val))[0]
        raise InputError(
            f"{str(images)!r} must have the same classes in train and val, but {odd!r} is in only one of them. {INSTRUCTIONS}."
        )
    names = _imagenet_names(folder / "classnames.txt", train, layout)
    parts: tuple[tuple[str, Part], ...] = (("train", "train"), ("val", "test"))
    return [
        (f"{where}/{ident}/{file.name}", label, names[ident], part)
        for where, part in parts
        for label, ident in enumerate(train)
        for file in sorted((images / where / ident).iterdir())
        if has_image_name(file.name)
    ]


def _imagenet_names(path: Path, idents: list[str], layout: SetLayout) -> dict[str, str]:
    # Imported here: open_clip takes seconds to import, and --help needs only the names of the datasets.
    from open_clip import IMAGENET_CLASSNAMES

    if not path.is_file() and len(idents) == len(IMAGENET_CLASSNAMES):
        return dict(zip(idents, IMAGENET_CLASSNAMES, strict=True))
    lines = [line.split(" ", 1) for line in read_text(_needed(path, layout)).splitlines() if line.strip()]
    names = {line[0]: line[-1].strip() for line in lines}
    unnamed = [ident for ident in idents if ident not in names]
    if unnamed:
        raise InputError(f"{str(path)!r} must name every class, but lacks {unnamed[0]!r}. Add a line '{unnamed[0]} <name>'.")
    return names


def _from_aircraft(folder: Path, layout: SetLayout) -> list[Listed]:
    """Read the classes from variants.txt, and lines "<image name without .jpg> <class>" from images_variant_<part>.txt."""
    variants = read_text(_needed(folder / "variants.txt", layout)).splitlines()
    label_of = {variant.strip(): label for label, variant in enumerate(variants) if variant.strip()}
    listed: list[Listed] = []
    for part in PARTS:
        table = _needed(folder / f"images_variant_{part}.txt", layout)
        for line in filter(None, map(str.strip, read_text(table).splitlines())):
            image, _, key = line.partition(" ")
            if key not in label_of or not (folder / layout.images / f"{image}.jpg").is_file():
                raise InputError(f"{str(table)!r} lists {line!r}, but its image or class is missing. {INSTRUCTIONS}.")
            listed.append((f"{image}.jpg", label_of[key], key, part))
    return listed


def _needed(path: Path, layout: SetLayout) -> Path:
    if not path.exists():
        raise InputError(f"{layout.title} needs {str(path)!r}, which is missing. {INSTRUCTIONS}.")
    return path


READERS: Mapping[str, Callable[[Path, SetLayout], list[Listed]]] = {
    "imagenet": _from_imagenet,
    "fgvc_aircraft": _from_aircraft,
}
