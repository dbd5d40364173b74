"""Labelled pictures of one's own: a folder of class folders, a zip of one, or a CSV of path and label."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.errors import InputError
from pipelines.fewshot.archives import ZipLimits, is_shown, read_zip
from pipelines.fewshot.data import PARTS, LabelledPicture, LabelledSet, Part, rename
from pipelines.fewshot.sources import PictureFile, Source
from pipelines.pictures import has_picture_name

PART_FOLDERS: dict[str, Part] = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
SPLIT_FILE = "split.json"
CSV_DELIMITERS = ",;\t"
# A split.json of a million pictures stays below it.
MAX_SPLIT_BYTES = 2**28


def load_pictures(path: str | Path, class_names: Mapping[str, str] | None = None, limits: ZipLimits | None = None) -> LabelledSet:
    """A folder of class folders, a zip of one, or a CSV of path and label.

    Args:
        class_names: other names for classes, by what they are called where they were found.
        limits: of a zip.
    Raises: InputError naming what cannot be used.
    """
    path = Path(path)
    if path.is_dir():
        found = load_folder(path)
    elif path.suffix.lower() == ".zip" and path.is_file():
        found = load_zip(path, limits)
    elif path.suffix.lower() == ".csv" and path.is_file():
        found = load_csv(path)
    else:
        raise InputError(f"{str(path)!r} must be a folder of class folders, a .zip of one, or a .csv of path and label.")
    return rename(found, class_names or {})


def load_folder(folder: str | Path) -> LabelledSet:
    """Class folders of pictures; a class's pictures may lie in folders of its own.

    The set is split already where the class folders lie in folders `train`, `val` and `test`, or where a split.json beside
    them lists the parts: {"train": [["cats/1.jpg", "cats"], ...], "val": [...], "test": [...]}.

    Raises: InputError naming what cannot be used.
    """
    folder = Path(folder)
    names, folders = walk(folder)
    return _arranged(repr(str(folder)), [PictureFile(name, folder) for name in names], folders)


def load_zip(path: str | Path, limits: ZipLimits | None = None) -> LabelledSet:
    """The same from a zip, whose pictures are read in place; all may lie in one outer folder.

    Raises: InputError naming what cannot be used, and what of the zip is not trusted.
    """
    path = Path(path)
    found = read_zip(path, limits or ZipLimits())
    return _arranged(repr(str(path)), found.files, found.folders)


def load_csv(path: str | Path) -> LabelledSet:
    """The files that a CSV names: a header with `path` and `label`, and perhaps `part` (train, val or test), then a row each.

    Paths are relative to the CSV's folder, or absolute.

    Raises: InputError naming the file and the line that cannot be used.
    """
    path = Path(path)
    rows = _csv_rows(path)
    keys = sorted({row["label"] for _, row in rows})
    label_of = {key: label for label, key in enumerate(keys)}
    pictures, parts, line_of = [], {}, {}
    for line, row in rows:
        name = Path(row["path"]).as_posix()
        where = f"Line {line} of {str(path)!r}"
        if not (path.parent / name).is_file():
            raise InputError(f"{where} names {name!r} of class {row['label']!r}, but there is no such file. Mend the path.")
        if not has_picture_name(name):
            raise InputError(f"{where} names {name!r} of class {row['label']!r}, which is not called like a picture.")
        if name in line_of:
            raise InputError(f"{where} names {name!r} of class {row['label']!r} again, after line {line_of[name]}. Remove one.")
        line_of[name] = line
        pictures.append(LabelledPicture(PictureFile(name, path.parent), label_of[row["label"]], row["label"]))
        if row.get("part"):
            parts[name] = _part(row["part"], where)
    if parts and len(parts) < len(pictures):
        without = next(line for name, line in line_of.items() if name not in parts)
        raise InputError(f"Line {without} of {str(path)!r} has no part, others have. Give every row one of {', '.join(PARTS)}.")
    return LabelledSet(repr(str(path)), tuple(keys), tuple(keys), tuple(pictures), _with_test(parts))


def _csv_rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """The rows with the lines that they end on, stripped of outer spaces."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{str(path)!r} must be UTF-8 ({error}). Save it as such.") from error
    header = text.partition("\n")[0]
    delimiter = max(CSV_DELIMITERS, key=header.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        return _checked_rows(reader, repr(str(path)), header.strip())
    except csv.Error as error:
        raise InputError(
            f"What follows line {reader.line_num} of {str(path)!r} cannot be read ({error}). Mend or remove it."
        ) from error


def _checked_rows(reader: csv.DictReader, where: str, header: str) -> list[tuple[int, dict[str, str]]]:
    missing = {"path", "label"} - set(reader.fieldnames or ())
    if missing:
        raise InputError(f"The first line of {where} must name the columns path and label, got {header!r}.")
    rows = []
    for row in reader:
        if None in row or not all((row[column] or "").strip() for column in ("path", "label")):
            raise InputError(f"Line {reader.line_num} of {where} must hold a path and a label, got {row}. Mend or remove it.")
        rows.append((reader.line_num, {column: (value or "").strip() for column, value in row.items()}))
    return rows


def walk(folder: Path) -> tuple[list[str], list[str]]:
    """Names of all files and of all folders below `folder`; each linked folder is entered once, hidden ones are not."""
    names, folders, seen = [], [], set()
    for here, inner, files in os.walk(folder, followlinks=True):
        inner[:] = sorted(filter(is_shown, inner))
        real = os.path.realpath(here)
        if real in seen:
            inner.clear()
            continue
        seen.add(real)
        prefix = "" if Path(here) == folder else Path(here).relative_to(folder).as_posix() + "/"
        folders += [prefix + name for name in inner]
        names += [prefix + name for name in files if is_shown(name)]
    return sorted(names), sorted(folders)


def _arranged(where: str, files: Sequence[Source], folders: Sequence[str]) -> LabelledSet:
    """A set from pictures at `class/picture` or `part/class/picture`, all of them perhaps in one outer folder."""
    sources = [file for file in files if has_picture_name(file.name)]
    outer = _outer_folder([source.name for source in sources])
    inside = [folder.removeprefix(outer).split("/") for folder in folders if folder.startswith(outer)]
    in_parts = bool(inside) and {parts[0] for parts in inside} <= set(PART_FOLDERS)
    depth = 1 if in_parts else 0
    keys = sorted({parts[depth] for parts in inside if len(parts) > depth})
    label_of = {key: label for label, key in enumerate(keys)}
    pictures, parts = [], {}
    for source in sources:
        place = source.name.removeprefix(outer).split("/")
        if len(place) < depth + 2:
            raise InputError(f"{source.name!r} of {where} lies in no class's folder. Move it into one, or remove it.")
        pictures.append(LabelledPicture(source, label_of[place[depth]], place[depth]))
        if in_parts:
            parts[source.name] = PART_FOLDERS[place[0]]
    split = next((file for file in files if file.name == outer + SPLIT_FILE), None)
    if split is not None and not in_parts:
        parts = _listed_parts(split.content(), where, {picture.name: picture.class_name for picture in pictures}, outer)
    return LabelledSet(where, tuple(keys), tuple(keys), tuple(pictures), _with_test(parts))


def _outer_folder(names: Sequence[str]) -> str:
    """The one folder that holds folders with all pictures, ending in "/"; "" where there is none."""
    tops = {name.partition("/")[0] for name in names}
    return f"{tops.pop()}/" if len(tops) == 1 and all(name.count("/") >= 2 for name in names) else ""


def _part(word: str, where: str) -> Part:
    if word.lower() not in PART_FOLDERS:
        raise InputError(f"{where} must be in one of the parts {', '.join(PARTS)}, got {word!r}.")
    return PART_FOLDERS[word.lower()]


def _with_test(parts: dict[str, Part]) -> dict[str, Part]:
    """The parts; where there is validation and no test, as in ImageNet's folders, the test is what is called validation."""
    if "test" in parts.values():
        return parts
    return {name: "test" if part == "val" else part for name, part in parts.items()}


def _listed_parts(split: bytes, where: str, class_of: Mapping[str, str], outer: str) -> dict[str, Part]:
    """The parts that a split.json lists; none where it lists no train and test, but say all pictures."""
    listed = read_json(split, f"{SPLIT_FILE} of {where}")
    parts: dict[str, Part] = {}
    for word in sorted(set(listed) & set(PART_FOLDERS)):
        for entry in listed[word]:
            name = outer + entry[0] if isinstance(entry, list) and entry and isinstance(entry[0], str) else None
            if name not in class_of:
                raise InputError(
                    f"{SPLIT_FILE} of {where} lists {entry!r} in {word!r}, which is no picture of the set. Remove it."
                )
            if name in parts:
                raise InputError(f"{SPLIT_FILE} of {where} lists {name!r} twice. Remove one.")
            parts[name] = PART_FOLDERS[word]
    unlisted = [name for name in class_of if name not in parts]
    if parts and unlisted:
        name = unlisted[0]
        raise InputError(
            f"{SPLIT_FILE} of {where} does not list {name!r} of class {class_of[name]!r}. Add it to a part, or remove the "
            f"{SPLIT_FILE}."
        )
    return parts


def read_json(content: bytes, what: str) -> dict[str, Any]:
    """The JSON object in `content`.

    Raises: InputError naming `what` if it is none.
    """
    if len(content) > MAX_SPLIT_BYTES:
        raise InputError(f"{what} must have at most {MAX_SPLIT_BYTES:,} bytes, got {len(content):,}.")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} is not JSON ({error}). Mend or remove it.") from error
    if not isinstance(found, dict):
        raise InputError(f"{what} must hold an object, got {type(found).__name__}.")
    return found
