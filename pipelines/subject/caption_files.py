"""Captions from files, and their precedence if several files have a caption for the same image.

The order of precedence: the metadata files of the subject's folder (metadata.jsonl, metadata.csv, metadata.json, sd-scripts'
meta_*.json), those of the folder above it, then NAME.txt, NAME.caption, NAME.jpg.txt and NAME.jpg.caption beside NAME.jpg.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pipelines.errors import InputError
from pipelines.subject.folder_entries import FolderAccount, FolderEntry, FolderNote, listed
from pipelines.subject.folder_scan import FolderScan, images_of
from pipelines.subject.metadata_files import MetadataFile, location, read_metadata
from pipelines.text_files import read_text


@dataclass(frozen=True)
class Caption:
    """The caption of an image, and the file that it comes from."""

    text: str
    source: Path


@dataclass(frozen=True)
class Captions:
    """The captions of a folder's images.

    Args:
        by_image: the caption of each image that has one.
        account: the account of the scan, updated with which caption files are used.
    """

    by_image: dict[Path, Caption]
    account: FolderAccount


def read_captions(scan: FolderScan) -> Captions:
    """Read all captions of the images in `scan`.

    Raises: InputError naming a caption file that cannot be read, an invalid line of metadata, or an empty caption.
    """
    files = (*scan.metadata, *(file for subject in scan.subjects for file in subject.metadata))
    metadata = {file: read_metadata(file) for file in files}
    by_image: dict[Path, Caption] = {}
    given: dict[Path, list[Caption]] = {}
    for image, subject in images_of(scan):
        from_metadata = (metadata[file].caption_of(image) for file in (*subject.metadata, *scan.metadata))
        captions = [caption for caption in from_metadata if caption is not None]
        texts = [Caption(text, source) for text, source in captions]
        texts += [Caption(read_text(file).strip(), file) for file in subject.captions[image]]
        if texts:
            by_image[image], given[image] = _first(texts, image), texts
    return Captions(by_image, _account(scan, metadata, given))


def _first(captions: list[Caption], image: Path) -> Caption:
    """The caption that takes precedence. Raises: InputError if it is empty."""
    if not captions[0].text:
        raise InputError(f"{str(captions[0].source)!r} is empty. Write the caption of {image.name!r} into it, or remove it.")
    return captions[0]


def _account(scan: FolderScan, metadata: dict[Path, MetadataFile], given: dict[Path, list[Caption]]) -> FolderAccount:
    """The account of `scan`, updated with unused caption files and with notes on the captions."""
    first = {image: captions[0] for image, captions in given.items()}
    sources = {caption.source for caption in first.values()}
    differing = {c.source for captions in given.values() for c in captions[1:] if c.text != captions[0].text}
    as_unused = partial(_unused_entry, metadata=metadata, differing=differing)
    entries = (entry if entry.path in sources else as_unused(entry) for entry in scan.account.entries)
    images = {location(path) for path in [*dict(images_of(scan)), *scan.account.of_kind("excluded")]}
    notes = [*scan.account.notes, *_origins(scan, first), *_conflicts(scan.account.folder, given)]
    notes += [note for file in metadata.values() for note in file.notes(images)]
    return FolderAccount(scan.account.folder, tuple(entries), tuple(notes))


def _unused_entry(entry: FolderEntry, metadata: Mapping[Path, MetadataFile], differing: Collection[Path]) -> FolderEntry:
    """The entry of a file that gives no caption; for caption files, with the reason.

    Args:
        differing: files with another caption for an image than the one that is used.
    """
    if entry.path in metadata:
        return _unused_metadata(entry, metadata[entry.path], entry.path in differing)
    if entry.use == "caption":
        return replace(entry, use="unused", kind="other_caption" if entry.path in differing else "same_caption")
    return entry


def _unused_metadata(entry: FolderEntry, file: MetadataFile, differs: bool) -> FolderEntry:
    if file.problem:
        return replace(entry, use="unused", kind="foreign_caption", detail=file.problem)
    if file.captions:
        return replace(entry, use="unused", kind="other_caption" if differs else "same_caption")
    return replace(entry, use="unused", kind="foreign_caption", detail=f"{entry.path.name} has no caption for any image here.")


def _origins(scan: FolderScan, first: dict[Path, Caption]) -> list[FolderNote]:
    """A note with the number of captions from each source."""
    if not first:
        return []
    root = scan.account.folder
    counts = Counter(_label(caption.source, image, root) for image, caption in first.items())
    parts = [f"{count} from {label}" for label, count in counts.items()]
    without = [image for image, _ in images_of(scan) if image not in first]
    rest = f" Without a caption: {listed(without, root)}." if without else ""
    words = f"Captions of {len(first)} of {len(first) + len(without)} images: {', '.join(parts)}.{rest}"
    return [FolderNote("captions", words, is_warning=False)]


def _conflicts(root: Path, given: dict[Path, list[Caption]]) -> list[FolderNote]:
    """A note for each pair of sources that have different captions for an image."""
    groups: dict[tuple[str, str], list[Path]] = {}
    for image, captions in given.items():
        winner = _label(captions[0].source, image, root)
        for caption in captions[1:]:
            if caption.text not in ("", captions[0].text):
                groups.setdefault((winner, _label(caption.source, image, root)), []).append(image)
    return [
        FolderNote("caption_conflict", f"{winner} and {loser} differ; {winner} is used for {listed(images, root)}.")
        for (winner, loser), images in groups.items()
    ]


def _label(source: Path, image: Path, root: Path) -> str:
    """The name of a source of captions: a metadata file's path, or a text file's pattern such as NAME.txt."""
    for pattern, base in (("NAME", image.stem), (f"NAME{image.suffix}", image.name)):
        if source.parent == image.parent and source.stem == base:
            return f"{pattern}{source.suffix}"
    return source.relative_to(root).as_posix() if source.is_relative_to(root) else source.name
