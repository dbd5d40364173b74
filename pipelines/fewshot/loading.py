"""Labelled images of one's own: a folder of class folders, a zip of one, or a CSV of path and label."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import InputError
from pipelines.fewshot.archives import ZipLimits, is_shown, read_zip
from pipelines.fewshot.csv_files import read_rows
from pipelines.fewshot.data import LabelledImage, LabelledSet, rename
from pipelines.fewshot.layouts import arrange, check_spellings, with_test
from pipelines.fewshot.sources import DatasetSource, ImageFile
from pipelines.fewshot.split_files import parts_of_set, split_file
from pipelines.fewshot.split_words import Part
from pipelines.fewshot.unused import notes_on, notes_on_unused
from pipelines.images import has_image_name

VALIDATION_IS_TEST = "No part of its split is a test, so that its validation images are tested on, once, at the end."


@dataclass(frozen=True)
class FolderContent:
    """What lies below a folder, by paths within it, sorted.

    Args:
        files: that can be read and are not hidden.
        folders: that are not hidden.
        hidden: files and folders whose name begins with a dot, and what a Mac adds to zips; nothing in such folders.
        broken: links to nothing, and what is no regular file.
    """

    files: tuple[str, ...]
    folders: tuple[str, ...]
    hidden: tuple[str, ...]
    broken: tuple[str, ...]


def load_images(path: str | Path, class_names: Mapping[str, str] | None = None, limits: ZipLimits | None = None) -> LabelledSet:
    """A folder of class folders, a zip of one, or a CSV of path and label.

    Args:
        class_names: other names for classes, by what they are called where they were found; folders that are named here are
            classes, also where they are called like parts of a split.
        limits: of a zip.
    Raises: InputError naming what cannot be used.
    """
    path, names = Path(path), class_names or {}
    if path.is_dir():
        labelled = load_folder(path, names)
    elif path.suffix.lower() == ".zip" and path.is_file():
        labelled = load_zip(path, limits, names)
    elif path.suffix.lower() == ".csv" and path.is_file():
        labelled = load_csv(path)
    else:
        raise InputError(f"{str(path)!r} must be a folder of class folders, a .zip of one, or a .csv of path and label.")
    return rename(labelled, names)


def load_folder(folder: str | Path, classes: Collection[str] = ()) -> LabelledSet:
    """Class folders of images; a class's images may lie in folders of its own.

    The set is split already where its folders say so (`pipelines.fewshot.layouts`), or a split.json beside the class folders
    (`pipelines.fewshot.split_files`). What is not used is named in the set's notes.

    Args:
        classes: folders that are classes whatever they are called.
    Raises: InputError naming what cannot be used.
    """
    folder = Path(folder)
    content = walk(folder)
    sources = [ImageFile(name, folder) for name in content.files]
    notes = (
        *_on_hidden(content.hidden),
        *notes_on(content.broken, "broken link or special file", "broken links or special files"),
    )
    return _arranged(repr(str(folder)), sources, content.folders, classes, notes)


def load_zip(path: str | Path, limits: ZipLimits | None = None, classes: Collection[str] = ()) -> LabelledSet:
    """The same from a zip, whose images are read in place; all may lie in one outer folder.

    Raises: InputError naming what cannot be used, and what of the zip is not trusted.
    """
    path = Path(path)
    content = read_zip(path, limits or ZipLimits())
    return _arranged(repr(str(path)), content.files, content.folders, classes, _on_hidden(content.hidden))


def load_csv(path: str | Path) -> LabelledSet:
    """The files that a CSV names (`pipelines.fewshot.csv_files`): path, label, and perhaps a column that says how it is split.

    Paths are relative to the CSV's folder, or absolute.

    Raises: InputError naming the file, and the line or the column that cannot be used.
    """
    path = Path(path)
    rows, notes = read_rows(path)
    keys = sorted({row.label for row in rows})
    label_of = {key: label for label, key in enumerate(keys)}
    images = [LabelledImage(ImageFile(row.name, path.parent), label_of[row.label], row.label) for row in rows]
    parts = {row.name: row.part for row in rows if row.part is not None}
    return _set_of(repr(str(path)), keys, images, parts, notes)


def walk(folder: Path) -> FolderContent:
    """All that lies below `folder`; each linked folder is entered once, hidden ones are not.

    Raises: InputError naming a folder that cannot be listed.
    """
    files: dict[bool, list[str]] = {True: [], False: []}
    folders, hidden, seen = [], [], set()
    for here, inner, names in os.walk(folder, followlinks=True, onerror=_unlisted):
        prefix = "" if Path(here) == folder else Path(here).relative_to(folder).as_posix() + "/"
        hidden += [prefix + name for name in (*inner, *names) if not is_shown(name)]
        inner[:] = sorted(filter(is_shown, inner))
        real = os.path.realpath(here)
        if real in seen:
            inner.clear()
            continue
        seen.add(real)
        folders += [prefix + name for name in inner]
        for name in filter(is_shown, names):
            files[os.path.isfile(os.path.join(here, name))].append(prefix + name)
    return FolderContent(*(tuple(sorted(part)) for part in (files[True], folders, hidden, files[False])))


def _unlisted(error: OSError) -> None:
    raise InputError(f"The folder {error.filename!r} cannot be listed ({error.strerror}). Make it readable.") from error


def _on_hidden(names: Sequence[str]) -> list[str]:
    return notes_on(names, "hidden file or folder", "hidden files or folders")


def _arranged(
    where: str, files: Sequence[DatasetSource], folders: Collection[str], classes: Collection[str], notes: Sequence[str]
) -> LabelledSet:
    """A set from files at `class/image` or `part/class/image`, all of them perhaps in outer folders."""
    sources = [file for file in files if has_image_name(file.name)]
    layout = arrange(where, [source.name for source in sources], folders, classes)
    label_of = {key: label for label, key in enumerate(layout.keys)}
    images = [LabelledImage(source, label_of[layout.classes[source.name]], layout.classes[source.name]) for source in sources]
    split = split_file(files, layout)
    parts, on_split = parts_of_set(where, layout, split)
    used = {source.name for source in sources} | ({split.name} if split is not None else set())
    unused = notes_on_unused((file.name for file in files), used, layout)
    return _set_of(where, layout.keys, images, parts, (*layout.notes, *on_split, *unused, *notes))


def _set_of(
    where: str, keys: Sequence[str], images: Sequence[LabelledImage], parts: Mapping[str, Part], notes: Sequence[str]
) -> LabelledSet:
    """The set, once its classes are called alike in all parts."""
    check_spellings(where, {image.name: image.class_name for image in images}, parts)
    tested = with_test(parts)
    more = [VALIDATION_IS_TEST] if tested != parts else []
    return LabelledSet(where, tuple(keys), tuple(keys), tuple(images), tested, (*notes, *more))
