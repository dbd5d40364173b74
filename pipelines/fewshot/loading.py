"""Load a dataset of labelled images: a folder of class folders, a zip of one, or a CSV of path and label."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import InputError
from pipelines.fewshot.archives import ZipLimits, is_visible, read_zip
from pipelines.fewshot.csv_files import read_rows
from pipelines.fewshot.data import LabelledImage, LabelledSet, rename
from pipelines.fewshot.layouts import arrange, check_spellings, with_test
from pipelines.fewshot.sources import DatasetSource, ImageFile
from pipelines.fewshot.split_files import parts_of_set, split_file
from pipelines.fewshot.split_words import Part
from pipelines.fewshot.unused import notes_on, notes_on_unused
from pipelines.images import has_image_name

VALIDATION_IS_TEST = "The split has no test part: its validation images are used as test images, once, at the end."


@dataclass(frozen=True)
class FolderContent:
    """The content of a folder as sorted paths relative to it.

    Args:
        files: regular files that are not hidden.
        folders: folders that are not hidden.
        hidden: files and folders that start with a dot, and macOS's `__MACOSX`; the content of hidden folders is not listed.
        broken: broken links and special files.
    """

    files: tuple[str, ...]
    folders: tuple[str, ...]
    hidden: tuple[str, ...]
    broken: tuple[str, ...]


def load_images(path: str | Path, class_names: Mapping[str, str] | None = None, limits: ZipLimits | None = None) -> LabelledSet:
    """Load a folder of class folders, a zip of one, or a CSV of path and label.

    Args:
        class_names: new class names by key, such as a folder's name. A folder named here is a class, even if it is named like a
            part of a split.
        limits: of a zip.
    Raises: InputError naming the file or folder that cannot be used.
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
    """Load class folders of images, which may have subfolders.

    The folders (`pipelines.fewshot.layouts`) or a split.json beside the class folders (`pipelines.fewshot.split_files`) may
    define a split. Files that are not used are listed in the notes.

    Args:
        classes: names of folders that are classes even if they are named like parts of a split.
    Raises: InputError naming the file or folder that cannot be used.
    """
    folder = Path(folder)
    content = walk(folder)
    sources = [ImageFile(name, folder) for name in content.files]
    notes = (
        *_note_on_hidden(content.hidden),
        *notes_on(content.broken, "broken link or special file", "broken links or special files"),
    )
    return _arranged(repr(str(folder)), sources, content.folders, classes, notes)


def load_zip(path: str | Path, limits: ZipLimits | None = None, classes: Collection[str] = ()) -> LabelledSet:
    """Load class folders from a zip like `load_folder`; images are read in place.

    Raises: InputError naming the member that cannot be used.
    """
    path = Path(path)
    content = read_zip(path, limits or ZipLimits())
    return _arranged(repr(str(path)), content.files, content.folders, classes, _note_on_hidden(content.hidden))


def load_csv(path: str | Path) -> LabelledSet:
    """Load the images listed in a CSV (`pipelines.fewshot.csv_files`): path, label, and optionally a split column.

    Paths are relative to the CSV's folder, or absolute.

    Raises: InputError naming the file, and the line or column that cannot be used.
    """
    path = Path(path)
    rows, notes = read_rows(path)
    keys = sorted({row.label for row in rows})
    label_of = {key: label for label, key in enumerate(keys)}
    images = [LabelledImage(ImageFile(row.name, path.parent), label_of[row.label], row.label) for row in rows]
    parts = {row.name: row.part for row in rows if row.part is not None}
    return _dataset_of(repr(str(path)), keys, images, parts, notes)


def walk(folder: Path) -> FolderContent:
    """List everything below `folder`. Each linked folder is entered once; hidden folders are not entered.

    Raises: InputError naming a folder that cannot be listed.
    """
    files: dict[bool, list[str]] = {True: [], False: []}
    folders, hidden, seen = [], [], set()
    for here, inner, names in os.walk(folder, followlinks=True, onerror=_refuse_unlisted):
        prefix = "" if Path(here) == folder else Path(here).relative_to(folder).as_posix() + "/"
        hidden += [prefix + name for name in (*inner, *names) if not is_visible(name)]
        inner[:] = sorted(filter(is_visible, inner))
        real = os.path.realpath(here)
        if real in seen:
            inner.clear()
            continue
        seen.add(real)
        folders += [prefix + name for name in inner]
        for name in filter(is_visible, names):
            files[os.path.isfile(os.path.join(here, name))].append(prefix + name)
    return FolderContent(*(tuple(sorted(part)) for part in (files[True], folders, hidden, files[False])))


def _refuse_unlisted(error: OSError) -> None:
    raise InputError(f"The folder {error.filename!r} cannot be listed ({error.strerror}). Make it readable.") from error


def _note_on_hidden(names: Sequence[str]) -> list[str]:
    return notes_on(names, "hidden file or folder", "hidden files or folders")


def _arranged(
    where: str, files: Sequence[DatasetSource], folders: Collection[str], classes: Collection[str], notes: Sequence[str]
) -> LabelledSet:
    """The dataset of files at `class/image` or `part/class/image`, possibly in outer folders."""
    sources = [file for file in files if has_image_name(file.name)]
    layout = arrange(where, [source.name for source in sources], folders, classes)
    label_of = {key: label for label, key in enumerate(layout.keys)}
    images = [LabelledImage(source, label_of[layout.classes[source.name]], layout.classes[source.name]) for source in sources]
    split = split_file(files, layout)
    parts, split_notes = parts_of_set(where, layout, split)
    used = {source.name for source in sources} | ({split.name} if split is not None else set())
    unused = notes_on_unused((file.name for file in files), used, layout)
    return _dataset_of(where, layout.keys, images, parts, (*layout.notes, *split_notes, *unused, *notes))


def _dataset_of(
    where: str, keys: Sequence[str], images: Sequence[LabelledImage], parts: Mapping[str, Part], notes: Sequence[str]
) -> LabelledSet:
    """The dataset, after checking that class names do not differ between the parts of the split."""
    check_spellings(where, {image.name: image.class_name for image in images}, parts)
    parts_with_test = with_test(parts)
    more = [VALIDATION_IS_TEST] if parts_with_test != parts else []
    return LabelledSet(where, tuple(keys), tuple(keys), tuple(images), parts_with_test, (*notes, *more))
