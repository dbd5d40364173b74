"""Metadata files, which hold the captions of many images.

metadata.jsonl and metadata.csv have the format of `datasets`' imagefolder (columns file_name and text). metadata.json has the
same objects in a list or, like meta_*.json, sd-scripts' format: {image: {"caption": ..., "tags": ...}}.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.errors import InputError
from pipelines.images import is_image
from pipelines.subject.folder_entries import FolderNote, listed
from pipelines.text_files import read_text

FILE_COLUMNS = ("file_name", "filename", "file", "image_file", "image_path", "image", "path")
TEXT_COLUMNS = ("text", "caption", "prompt")
DELIMITERS = ",;\t"
# sd-scripts puts this between caption and tags.
SEPARATOR = ", "
REMEDIES = {
    ".jsonl": 'Write one object a line, such as {"file_name": "00.jpg", "text": "a photo of sks dog"}.',
    ".csv": "Write the columns file_name and text, and one image a row, or remove the file.",
}
# RecursionError for deep nesting, and a plain ValueError for numbers with too many digits.
UNREADABLE_JSON = (ValueError, RecursionError)


@dataclass
class MetadataFile:
    """The content of a metadata file.

    Args:
        path: the file.
        captions: by `location` of the image.
        targets: captions by the resolved path of the image; None if links to one file have different captions.
        ignored: columns that are not read.
        missing: names of images that do not exist, in formats where that is not an error.
        repeated: names of images with several different captions.
        problem: why the file cannot be read; empty if it can.
    """

    path: Path
    captions: dict[Path, str] = field(default_factory=dict)
    targets: dict[Path, str | None] = field(default_factory=dict)
    ignored: set[str] = field(default_factory=set)
    missing: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    problem: str = ""

    def add(self, image: Path, caption: str) -> None:
        """Add the caption of `image`."""
        where, target = location(image), image.resolve()
        if self.captions.get(where, caption) != caption:
            self.repeated.append(image.name)
        self.captions[where] = caption
        self.targets[target] = caption if self.targets.get(target, caption) == caption else None

    def caption_of(self, image: Path) -> tuple[str, Path] | None:
        """The caption of `image`, with this file's path; None if it has none."""
        caption = self.captions.get(location(image)) or self.targets.get(image.resolve())
        return None if caption is None else (caption, self.path)

    def notes(self, images: set[Path]) -> Iterator[FolderNote]:
        """Notes on unused, missing and repeated images and on ignored columns.

        Args:
            images: locations of all images that are used.
        """
        targets = {image.resolve() for image in images}
        unused = [path.name for path in self.captions if path not in images and path.resolve() not in targets]
        for kind, names, words in (
            ("captions_unused", unused, "has captions for files that are not used as images"),
            ("captions_missing", self.missing, "has captions for images that do not exist"),
            ("captions_repeated", self.repeated, "has several captions for an image, of which the last one is used"),
        ):
            if names:
                yield FolderNote(kind, f"{self.path.name} {words}: {listed(names)}.")
        if self.ignored and self.captions:
            words = f"Columns of {self.path.name} that are not read: {listed(sorted(self.ignored))}."
            yield FolderNote("columns_ignored", words, is_warning=False)


def location(path: Path) -> Path:
    """`path` with its folder resolved, so that relative and absolute paths and those through linked folders are equal."""
    return path.parent.resolve() / path.name


def read_metadata(file: Path) -> MetadataFile:
    """Read a metadata file.

    Raises: InputError naming the line of a metadata.jsonl or metadata.csv that cannot be used, or a file that is not UTF-8.
    """
    metadata = MetadataFile(file)
    if file.suffix.lower() == ".json":
        _read_json(metadata)
        return metadata
    rows = _jsonl_rows(file) if file.suffix.lower() == ".jsonl" else _csv_rows(file)
    for where, row in rows:
        name, caption = _columns(row, where, REMEDIES[file.suffix.lower()], metadata)
        image = _located(file.parent, name)
        if image is None:
            raise InputError(f"{where} names {name!r}, which does not exist. Correct or remove the line.")
        metadata.add(image, caption)
    return metadata


def _jsonl_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """The name of each line in error messages, and its value."""
    # Split at "\n" only: captions may contain other line separators.
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        where = f"Line {number} of {str(file)!r}"
        if line.strip():
            try:
                yield where, json.loads(line)
            except UNREADABLE_JSON as error:
                raise InputError(f"{where} is not JSON ({error}). {REMEDIES['.jsonl']}") from error


def _csv_rows(file: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The name of each row in error messages, and its cells by column."""
    text = read_text(file)
    header = text.partition("\n")[0]
    reader = csv.DictReader(io.StringIO(text), delimiter=max(DELIMITERS, key=header.count), strict=True)
    try:
        for row in reader:
            where = f"Line {reader.line_num} of {str(file)!r}"
            if None in row:
                raise InputError(f"{where} has more cells than the first line. Put captions that contain commas into quotes.")
            if any(value and value.strip() for value in row.values()):
                yield where, row
    except csv.Error as error:
        raise InputError(f"Line {reader.line_num} of {str(file)!r} is not CSV ({error}). {REMEDIES['.csv']}") from error


def _columns(row: Any, where: str, remedy: str, metadata: MetadataFile) -> tuple[str, str]:
    """The name and the caption of the image in `row`. Raises: InputError if either is missing or empty."""
    if not isinstance(row, dict):
        raise InputError(f"{where} must be an object, got {json.dumps(row)[:40]!r}. {remedy}")
    names = {str(name).strip().lower(): name for name in row}
    values = []
    for columns in (FILE_COLUMNS, TEXT_COLUMNS):
        column = next((column for column in columns if column in names), columns[0])
        value = row.get(names.get(column))
        if not isinstance(value, str) or not value.strip():
            there = f" The columns are {', '.join(map(repr, row))}." if column not in names else ""
            raise InputError(f"{where} must have a {column!r} that is not empty, got {value!r}.{there} {remedy}")
        values.append(value.strip())
        names.pop(column)
    metadata.ignored.update(names)
    return values[0], values[1]


def _located(folder: Path, name: str) -> Path | None:
    """The file that a metadata file in `folder` names, with either path separator; None if it does not exist."""
    # Unlike Path.is_file, os.path.isfile accepts names that no file can have.
    return next((path for path in (folder / name, folder / name.replace("\\", "/")) if os.path.isfile(path)), None)


def _read_json(metadata: MetadataFile) -> None:
    """Read metadata.json or meta_*.json. An unknown format sets `problem` only, as other programs write files of these names."""
    try:
        values = json.loads(read_text(metadata.path))
    except UNREADABLE_JSON as error:
        metadata.problem = f"{metadata.path.name} is not JSON ({error})."
        return
    entries = _json_entries(values)
    if entries is None:
        metadata.problem = f"{metadata.path.name} is neither a list of file_name and text nor sd-scripts' captions by image."
        return
    for name, caption in entries:
        images = _images_called(metadata.path.parent, name)
        for image in images:
            metadata.add(image, caption)
        if not images:
            metadata.missing.append(name)


def _json_entries(values: Any) -> list[tuple[str, str]] | None:
    """The names and captions in `values`; None for an unknown structure. Images without a caption are left out."""
    if isinstance(values, list) and _all_are(dict, values):
        pairs = [(_value(value, FILE_COLUMNS), _value(value, TEXT_COLUMNS)) for value in values]
    elif isinstance(values, dict) and _all_are(dict, values.values()):
        pairs = [(name, _sd_scripts_caption(value)) for name, value in values.items()]
    elif isinstance(values, dict) and _all_are(str, values.values()):
        pairs = list(values.items())
    else:
        return None
    entries = list(filter(all, pairs))
    return entries or None


def _all_are(kind: type, values: Iterable[Any]) -> bool:
    return all(isinstance(value, kind) for value in values)


def _value(row: Mapping[str, Any], columns: tuple[str, ...]) -> str:
    return next((row[column].strip() for column in columns if isinstance(row.get(column), str)), "")


def _sd_scripts_caption(entry: Mapping[str, Any]) -> str:
    """The caption of an entry in sd-scripts: its caption, then its tags."""
    tags = entry.get("tags")
    tags = SEPARATOR.join(map(str, tags)) if isinstance(tags, list) else tags
    parts = [_value(entry, ("caption",)) or _value(entry, TEXT_COLUMNS), tags.strip() if isinstance(tags, str) else ""]
    return SEPARATOR.join(part for part in parts if part)


def _images_called(folder: Path, name: str) -> list[Path]:
    """The files of sd-scripts' key `name`: a path, possibly from another machine, with or without a suffix."""
    image = _located(folder, name) or _located(folder, name.replace("\\", "/").rpartition("/")[2])
    if image is not None:
        return [image]
    stem = name.replace("\\", "/").rpartition("/")[2]
    return sorted(path for path in folder.iterdir() if path.stem == stem and is_image(path))
