"""Read a split.json, a file beside class folders that lists the images of each part of a split."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from pipelines.errors import InputError
from pipelines.fewshot.layouts import FolderLayout, counted, listed
from pipelines.fewshot.sources import DatasetSource
from pipelines.fewshot.split_words import PARTS, Part, check_one_word_each, part_written, table_of_words
from pipelines.text_files import decode_text

AnySource = TypeVar("AnySource", bound=DatasetSource)
SPLIT_FILE = "split.json"
# Key of a list of all images, which is not a part.
ALL_PARTS = "all"
# Enough for a million images.
MAX_SPLIT_BYTES = 2**28


def split_file(files: Iterable[AnySource], layout: FolderLayout) -> AnySource | None:
    """The split.json of a dataset, beside its outermost class folders; None if there is none."""
    wanted = (layout.outer + SPLIT_FILE).casefold()
    return next((file for file in files if file.name.casefold() == wanted), None)


def parts_of_set(where: str, layout: FolderLayout, split: DatasetSource | None) -> tuple[Mapping[str, Part], list[str]]:
    """The parts that folders or a split.json define, by image name, and notes on the split.json.

    Raises: InputError as `listed_parts`, or if folders and file put an image into different parts.
    """
    if split is None:
        return layout.parts, []
    parts, notes = listed_parts(split.content(), where, layout.classes, layout.outer)
    other = next((name for name, part in parts.items() if layout.parts and layout.parts[name] != part), None)
    if other is not None:
        raise InputError(
            f"The folders of {where} and its {split.name} must define the same split, but {other!r} is {layout.parts[other]} by "
            f"folder and {parts[other]} by file. Remove the file, or move the images."
        )
    return parts or layout.parts, notes


def listed_parts(split: bytes, where: str, class_of: Mapping[str, str], outer: str) -> tuple[dict[str, Part], list[str]]:
    """The parts that a split.json defines.

    Each part lists the paths of its images, or lists that start with the path, as in CoOp's files:
    {"train": [["cat/1.jpg", 0, "cat"], ...], "test": ["cat/2.jpg", ...]}.

    Args:
        split: the content of the file.
        where: the dataset, for error messages.
        class_of: class by image name.
        outer: prefix of the image names, which the paths in the file leave out.
    Returns: part by image name, empty if the file only lists all images; and notes on how the file was read.
    Raises: InputError naming the entry, the image or the key that cannot be used.
    """
    content = read_json(split, f"{SPLIT_FILE} of {where}")
    called = {key: part for key in content if (part := part_written(key)) is not None}
    others = [key for key in content if key not in called]
    if not called:
        return {}, _note_without_parts(where, others)
    check_one_word_each(called, f"{SPLIT_FILE} of {where}")
    parts: dict[str, Part] = {}
    for key, part in called.items():
        for name in _names_in(content[key], key, where, class_of, outer):
            if name in parts:
                raise InputError(f"{SPLIT_FILE} of {where} lists {name!r} twice. Remove one entry.")
            parts[name] = part
    _check_all_listed(where, parts, class_of)
    counts = ", ".join(f"{key!r} is {part} ({counted(len(content[key]))})" for key, part in called.items())
    notes = [f"Split by {SPLIT_FILE}: {counts}."]
    return parts, notes + ([f"The keys {listed(others)} of {SPLIT_FILE} are not used."] if others else [])


def _names_in(entries: Any, key: str, where: str, class_of: Mapping[str, str], outer: str) -> Iterator[str]:
    """The names of the images in the list under `key`, whose entries are paths or lists that start with a path."""
    if not isinstance(entries, list):
        raise InputError(f"{SPLIT_FILE} of {where} must have a list of images in {key!r}, got {type(entries).__name__}.")
    for entry in entries:
        path = entry[0] if isinstance(entry, list) and entry else entry
        name = outer + path if isinstance(path, str) else None
        if name not in class_of:
            raise InputError(
                f"{SPLIT_FILE} of {where} lists {entry!r} in {key!r}, which is not an image of the dataset. Remove it."
            )
        yield name


def _note_without_parts(where: str, keys: list[str]) -> list[str]:
    """The note on a file without parts. Raises: InputError if it has keys other than `all`."""
    if set(keys) - {ALL_PARTS}:
        raise InputError(
            f"The keys of {SPLIT_FILE} of {where} must be words for the parts {', '.join(PARTS)}, got {listed(keys)}. "
            f"{table_of_words()}. Rename the keys, or remove {SPLIT_FILE}."
        )
    return [f"{SPLIT_FILE} defines no split and is not used."]


def _check_all_listed(where: str, parts: Mapping[str, Part], class_of: Mapping[str, str]) -> None:
    unlisted = [name for name in class_of if name not in parts]
    if unlisted:
        more = f" and {len(unlisted) - 1} more" if len(unlisted) > 1 else ""
        raise InputError(
            f"{SPLIT_FILE} of {where} must list every image, but lacks {unlisted[0]!r} of class {class_of[unlisted[0]]!r}{more}. "
            f"Add every image to a part, or remove {SPLIT_FILE}."
        )


def read_json(content: bytes, what: str) -> dict[str, Any]:
    """The JSON object in `content`.

    Raises: InputError naming `what` if the content is not a JSON object in UTF-8, or too long.
    """
    if len(content) > MAX_SPLIT_BYTES:
        raise InputError(f"{what} must have at most {MAX_SPLIT_BYTES:,} bytes, got {len(content):,}.")
    text = decode_text(content, what)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} is not valid JSON ({error}). Correct or remove it.") from error
    if not isinstance(value, dict):
        raise InputError(f"{what} must be a JSON object, got {type(value).__name__}. Correct or remove it.")
    return value
