"""Zips of class folders: their images by class and part, and the files that are not used."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from pipelines.errors import InputError
from pipelines.fewshot.archives import ZipContent, ZipLimits, ZippedFile, read_zip
from pipelines.fewshot.layouts import FolderLayout, arrange, check_spellings, with_test
from pipelines.fewshot.split_files import SPLIT_FILE, parts_of_set, split_file
from pipelines.fewshot.split_words import Part
from pipelines.image_formats import UPLOAD_FORMATS, UPLOAD_SUFFIXES, listed


@dataclass
class ClassZip:
    """The content of a zip of class folders.

    Args:
        groups: the images by class and part; the part is None if the zip is not split.
        refused: a sentence for each file that is not used.
        notes: sentences on how the split was read.
    """

    groups: dict[tuple[str, Part | None], list[ZippedFile]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_class_zip(path: Path, name: str, limits: ZipLimits) -> ClassZip:
    """The images of a zip by class and, if the zip is split, by part.

    Args:
        name: its name in messages.
    Raises: InputError if it is not a zip, exceeds a limit, has unsafe members or an ambiguous layout.
    """
    try:
        if not zipfile.is_zipfile(path):
            raise InputError(f"{name} is not a zip. Pack one folder of images for each class into a zip.")
        content = _grouped(name, read_zip(path, limits))
    except InputError as error:
        # Users of the web app must not see where the server stores uploads.
        raise InputError(str(error).replace(repr(str(path)), name)) from error
    if not content.groups:
        raise InputError(f"{name} contains no folder with images. Pack one folder of images for each class into a zip.")
    return content


def _grouped(name: str, content: ZipContent) -> ClassZip:
    result = ClassZip()
    images = [file for file in content.files if _is_usable(file, result)]
    layout = arrange(name, [file.name for file in images], content.folders)
    split = split_file(content.files, layout)
    parts = _parts(name, layout, split, result)
    stray = [file.name for file in content.files if PurePosixPath(file.name).name.casefold() == SPLIT_FILE and file != split]
    result.refused += [f"{other} is not next to the class folders and was left out." for other in stray]
    for file in images:
        key = layout.classes[file.name] if parts else PurePosixPath(file.name).parent.name
        result.groups.setdefault((key, parts.get(file.name)), []).append(file)
    return result


def _is_usable(file: ZippedFile, result: ClassZip) -> bool:
    """Whether a file of a zip is an image in a folder. Other files except split.json are refused."""
    path = PurePosixPath(file.name)
    if path.suffix.lower() == ".zip":
        result.refused.append(f"{file.name} is a zip inside the zip and was left out. Unpack it, or add it separately.")
    elif path.suffix.lower() not in UPLOAD_SUFFIXES:
        if path.name.casefold() != SPLIT_FILE:
            result.refused.append(f"{file.name} is not a {listed(UPLOAD_FORMATS)} image and was left out.")
    elif len(path.parts) < 2:
        result.refused.append(f"{file.name} is not in a class folder and was left out. Move it to the folder of its class.")
    else:
        return True
    return False


def _parts(name: str, layout: FolderLayout, split: ZippedFile | None, result: ClassZip) -> Mapping[str, Part]:
    """The split that a zip came with, by the names of its files; empty if it came with none."""
    parts, notes = parts_of_set(name, layout, split)
    if parts:
        check_spellings(name, layout.classes, parts)
        result.notes += [*layout.notes, *notes, "Its test images are used only for testing, all others only for training."]
    return with_test(parts)
