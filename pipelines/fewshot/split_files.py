"""A split.json beside class folders: which images are in which part of a split."""

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
# A list of all images, which is no split.
ALL_PARTS = "all"
# A split.json of a million images stays below it.
MAX_SPLIT_BYTES = 2**28


def split_file(files: Iterable[AnySource], layout: FolderLayout) -> AnySource | None:
    """The split.json of a set, which lies beside its outermost class folders; None if there is none."""
    wanted = (layout.outer + SPLIT_FILE).casefold()
    return next((file for file in files if file.name.casefold() == wanted), None)


def parts_of_set(where: str, layout: FolderLayout, split: DatasetSource | None) -> tuple[Mapping[str, Part], list[str]]:
    """The parts that the folders of a set or its split.json say, by the images' names, and sentences on what was read.

    Raises: InputError as `listed_parts`, or if folders and file say something else of an image.
    """
    if split is None:
        return layout.parts, []
    parts, notes = listed_parts(split.content(), where, layout.classes, layout.outer)
    other = next((name for name, part in parts.items() if layout.parts and layout.parts[name] != part), None)
    if other is not None:
        raise InputError(
            f"{where} is split by its folders and by its {split.name}, but {other!r} is {layout.parts[other]} by the folders and "
            f"{parts[other]} by the file. Remove the file, or move the images."
        )
    return parts or layout.parts, notes


def listed_parts(split: bytes, where: str, class_of: Mapping[str, str], outer: str) -> tuple[dict[str, Part], list[str]]:
    """The parts that a split.json lists.

    Each part holds the paths of its images, or lists that begin with the path, as CoOp's do:
    {"train": [["cat/1.jpg", 0, "cat"], ...], "test": ["cat/2.jpg", ...]}.

    Args:
        split: the file's content.
        where: the set, for errors.
        class_of: the classes of all images' names.
        outer: what the names begin with before what the file lists.
    Returns: the parts of all images' names, none where the file lists all images only; and sentences on what was read.
    Raises: InputError naming the entry, the image or the key that cannot be used.
    """
    content = read_json(split, f"{SPLIT_FILE} of {where}")
    called = {key: part for key in content if (part := part_written(key)) is not None}
    others = [key for key in content if key not in called]
    if not called:
        return {}, _on_no_part(where, others)
    check_one_word_each(called, f"{SPLIT_FILE} of {where}")
    parts: dict[str, Part] = {}
    for key, part in called.items():
        for name in _names_in(content[key], key, where, class_of, outer):
            if name in parts:
                raise InputError(f"{SPLIT_FILE} of {where} lists {name!r} twice. Remove one.")
            parts[name] = part
    _check_all_listed(where, parts, class_of)
    counts = ", ".join(f"{key!r} is {part} ({counted(len(content[key]))})" for key, part in called.items())
    notes = [f"It is split by its {SPLIT_FILE}: {counts}."]
    return parts, notes + ([f"The keys {listed(others)} of its {SPLIT_FILE} are not used."] if others else [])


def _names_in(entries: Any, key: str, where: str, class_of: Mapping[str, str], outer: str) -> Iterator[str]:
    """The images that the list under `key` names: each by its path, or by a list that begins with it."""
    if not isinstance(entries, list):
        raise InputError(f"{SPLIT_FILE} of {where} must hold a list in {key!r}, got {type(entries).__name__}.")
    for entry in entries:
        path = entry[0] if isinstance(entry, list) and entry else entry
        name = outer + path if isinstance(path, str) else None
        if name not in class_of:
            raise InputError(f"{SPLIT_FILE} of {where} lists {entry!r} in {key!r}, which is no image of the set. Remove it.")
        yield name


def _on_no_part(where: str, keys: list[str]) -> list[str]:
    """What a file without any part says. Raises: InputError unless it lists all images alone, or nothing."""
    if set(keys) - {ALL_PARTS}:
        raise InputError(
            f"{SPLIT_FILE} of {where} must list the images of {', '.join(PARTS)}, but none of its keys is a word for a part: "
            f"{listed(keys)}. {table_of_words()}. Rename the keys, or remove the {SPLIT_FILE}."
        )
    return [f"Its {SPLIT_FILE} lists no part of a split and is not used."]


def _check_all_listed(where: str, parts: Mapping[str, Part], class_of: Mapping[str, str]) -> None:
    unlisted = [name for name in class_of if name not in parts]
    if unlisted:
        more = f", nor {len(unlisted) - 1} more" if len(unlisted) > 1 else ""
        raise InputError(
            f"{SPLIT_FILE} of {where} does not list {unlisted[0]!r} of class {class_of[unlisted[0]]!r}{more}. Add every image to "
            f"a part, or remove the {SPLIT_FILE}."
        )


def read_json(content: bytes, what: str) -> dict[str, Any]:
    """The JSON object in `content`.

    Raises: InputError naming `what` if it is none, or no UTF-8.
    """
    if len(content) > MAX_SPLIT_BYTES:
        raise InputError(f"{what} must have at most {MAX_SPLIT_BYTES:,} bytes, got {len(content):,}.")
    text = decode_text(content, what)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} is not JSON ({error}). Mend or remove it.") from error
    if not isinstance(value, dict):
        raise InputError(f"{what} must hold an object, got {type(value).__name__}.")
    return value
