"""What of a set's files is not used, in sentences: nothing is passed over in silence."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import PurePosixPath

from pipelines.fewshot.layouts import LISTED, FolderLayout, counted, listed
from pipelines.fewshot.split_words import part_named

# Written by systems beside every folder that is looked at.
SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini", "ehthumbs.db"})
# What the web app writes into its sets.
APP_FILES = frozenset({"set.json"})
# Formats of images; those that are read never come here.
OTHER_IMAGES = frozenset(
    {".heic", ".heif", ".avif", ".tif", ".tiff", ".gif", ".jfif", ".jpe", ".jp2", ".jxl", ".ppm", ".pgm", ".tga", ".psd", ".svg"}
    | {".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2"}
)
MOST_SUFFIXES = 10


def notes_on_unused(files: Iterable[str], used: Collection[str], layout: FolderLayout) -> list[str]:
    """Sentences on the files that are not used, those of a suffix together.

    Args:
        files: paths within the set.
        used: those of them that are.
        layout: which files lie in the folders of which classes.
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
    return [*_on_suffixes(within), *_on_outside(outside), *notes_on(system, "file of the system", "files of the system")]


def notes_on(names: Sequence[str], one: str, several: str) -> list[str]:
    """A sentence on files that are not used, all for one reason; none where there are none.

    Args:
        one, several: what one and what several of them are called.
    """
    if not names:
        return []
    return [f"{len(names)} {one if len(names) == 1 else several} {_is_not_used(len(names))}: {listed(sorted(names))}."]


def _is_not_used(count: int) -> str:
    return "is not used" if count == 1 else "are not used"


def _on_suffixes(within: Mapping[str, Counter[str]]) -> list[str]:
    """Files in class folders, a sentence for each suffix, the most frequent first."""
    order = sorted(within, key=lambda suffix: (-within[suffix].total(), suffix))
    notes = [_on_suffix(suffix, within[suffix]) for suffix in order[:MOST_SUFFIXES]]
    rest = order[MOST_SUFFIXES:]
    if rest:
        count = sum(within[suffix].total() for suffix in rest)
        notes.append(f"{counted(count, 'file')} in class folders with other suffixes {_is_not_used(count)}: {listed(rest)}.")
    return notes


def _on_suffix(suffix: str, counts: Counter[str]) -> str:
    count, first = counts.total(), dict(sorted(counts.items())[:LISTED])
    called = f"with the suffix {suffix if suffix.isprintable() else repr(suffix)}" if suffix else "without a suffix"
    classes = ", ".join(f"{suffix_names} in class {key!r}" for key, suffix_names in first.items())
    more = f" and {count - sum(first.values())} in others" if len(counts) > LISTED else ""
    return f"{counted(count, 'file')} {called} {_is_not_used(count)}: {classes}{more}.{_remedy(suffix, count)}"


def _remedy(suffix: str, count: int) -> str:
    """What can be done about files with a suffix that may be images."""
    if not suffix:
        return " It is not called like an image." if count == 1 else " They are not called like an image."
    if suffix in OTHER_IMAGES:
        return f" This format is not read: save {'it' if count == 1 else 'them'} as JPEG or PNG."
    return ""


def _on_outside(names: Sequence[str]) -> list[str]:
    lists = sorted(name for name in names if part_named(PurePosixPath(name).stem))
    others = [name for name in names if name not in lists]
    notes = notes_on(others, "file outside of the class folders", "files outside of the class folders")
    if lists:
        notes.append(
            f"{listed(lists)} {'is' if len(lists) == 1 else 'are'} called like the lists of a split, but not read. Write the "
            "split as folders, as a split.json, or as a CSV with the columns path, label and split."
        )
    return notes
