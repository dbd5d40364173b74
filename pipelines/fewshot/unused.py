"""Notes on the files of a dataset that are not used, so that no file is ignored silently."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import PurePosixPath

from pipelines.fewshot.layouts import LISTED, FolderLayout, counted, is_or_are, listed
from pipelines.fewshot.split_words import part_named

# Files that operating systems add to folders.
SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini", "ehthumbs.db"})
# Files that the web app adds to its datasets.
APP_FILES = frozenset({"set.json"})
# Suffixes of image formats that are not supported.
OTHER_IMAGES = frozenset(
    {".heic", ".heif", ".avif", ".tif", ".tiff", ".gif", ".jfif", ".jpe", ".jp2", ".jxl", ".ppm", ".pgm", ".tga", ".psd", ".svg"}
    | {".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2"}
)
MOST_SUFFIXES = 10


def notes_on_unused(files: Iterable[str], used: Collection[str], layout: FolderLayout) -> list[str]:
    """Notes on the files that are not used, one for each suffix.

    Args:
        files: paths within the dataset.
        used: the files that are used.
        layout: the class folders.
    """
    used = set(used)
    system, outside = [], []
    within: dict[str, Counter[str]] = defaultdict(Counter)
    for name in files:
        path = PurePosixPath(name)
        if name in used or name in APP_FILES:
            continue
        if path.name.casefold() in SYSTEM_FILES:
            system.append(name)
        elif (key := layout.class_of(name)) is None:
            outside.append(name)
        else:
            within[path.suffix.lower()][key] += 1
    return [*_on_suffixes(within), *_on_outside(outside), *notes_on(system, "system file", "system files")]


def notes_on(names: Sequence[str], one: str, several: str) -> list[str]:
    """A note on files that are not used for the same reason; empty if there are no files.

    Args:
        one, several: the noun for the files, singular and plural.
    """
    if not names:
        return []
    count = len(names)
    return [f"{count} {one if count == 1 else several} {is_or_are(count)} not used: {listed(sorted(names))}."]


def _on_suffixes(within: Mapping[str, Counter[str]]) -> list[str]:
    """Notes on files in class folders, one for each suffix, most frequent first."""
    order = sorted(within, key=lambda suffix: (-within[suffix].total(), suffix))
    notes = [_on_suffix(suffix, within[suffix]) for suffix in order[:MOST_SUFFIXES]]
    rest = order[MOST_SUFFIXES:]
    if rest:
        count = sum(within[suffix].total() for suffix in rest)
        notes.append(
            f"{counted(count, 'file')} in class folders with other suffixes {is_or_are(count)} not used: {listed(rest)}."
        )
    return notes


def _on_suffix(suffix: str, counts: Counter[str]) -> str:
    count, first = counts.total(), dict(sorted(counts.items())[:LISTED])
    called = f"with the suffix {suffix if suffix.isprintable() else repr(suffix)}" if suffix else "without a suffix"
    classes = ", ".join(f"{suffix_names} in class {key!r}" for key, suffix_names in first.items())
    more = f" and {count - sum(first.values())} in others" if len(counts) > LISTED else ""
    return f"{counted(count, 'file')} {called} {is_or_are(count)} not used: {classes}{more}.{_remedy(suffix, count)}"


def _remedy(suffix: str, count: int) -> str:
    """The remedy for unused files that may be images."""
    if not suffix:
        return f" Add a suffix such as .jpg if {'it is an image' if count == 1 else 'they are images'}."
    if suffix in OTHER_IMAGES:
        return f" This format is not supported: save {'it' if count == 1 else 'them'} as JPEG or PNG."
    return ""


def _on_outside(names: Sequence[str]) -> list[str]:
    lists = sorted(name for name in names if part_named(PurePosixPath(name).stem))
    others = [name for name in names if name not in lists]
    notes = notes_on(others, "file outside the class folders", "files outside the class folders")
    if lists:
        notes.append(
            f"{listed(lists)} {is_or_are(len(lists))} named like a part of a split, but not used. Define the split with folders, "
            "a split.json, or a CSV with the columns path, label and split."
        )
    return notes
