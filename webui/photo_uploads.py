"""Uploads of photos of a subject: images with captions, or a zip of them.

The files are put into a temporary folder and scanned like a folder on the command line, so that masks, captions and kohya's
folder names have the same meaning.
"""

from __future__ import annotations

import functools
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.errors import InputError
from pipelines.fewshot.archives import read_zip
from pipelines.subject.caption_files import Captions, read_captions
from pipelines.subject.folder_entries import FolderAccount, FolderEntry, listed
from pipelines.subject.folder_names import CLASS_PROMPT, is_system_name, stem_of, suffix_of
from pipelines.subject.folder_scan import FolderScan, scan_folder
from webui.image_datasets import read_set, set_caption
from webui.incoming import display_name
from webui.uploads import ZIP_LIMITS, Added, add_images, summarised

# Files of these kinds are reported with the scan's reason; all others with the upload's.
NAMED_BY_SCAN = frozenset(
    {"mask", "condition", "caption_without_image", "foreign_caption", "other_caption", "same_caption", "latents_cache"}
)
TEXT_SUFFIXES = frozenset({".txt", ".caption", ".csv", ".jsonl", ".json"})


@dataclass
class _Layout:
    """Uploaded files in a temporary folder, under the names that the user gave them.

    Args:
        folder: the temporary folder.
        files: the uploaded files in it.
        present: the images that are already in the dataset, to which captions may belong, and their file names there.
    """

    folder: Path
    files: list[Path] = field(default_factory=list)
    present: dict[Path, str] = field(default_factory=dict)

    def link(self, name: str, target: Path) -> Path:
        """Link `target` as `name`, with a number if the name is taken; returns the link."""
        path, number = self.folder / name, 1
        while path.is_symlink():
            number += 1
            path = self.folder / f"{stem_of(name)} ({number}){suffix_of(name)}"
        path.symlink_to(target.resolve())
        return path

    def unpack(self, file: Path) -> None:
        """Unpack a zip into the folder. Raises: InputError as `read_zip`; OSError if a file cannot be written."""
        self.folder.mkdir()
        for entry in read_zip(file, ZIP_LIMITS).files:
            path = self.folder / entry.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(entry.content())
            self.files.append(path)


def add_photos(folder: Path, files: Sequence[str | Path]) -> Added:
    """Add photos and captions to the dataset in `folder`; captions may also belong to photos that are already there.

    Args:
        files: uploaded images, caption files (text or metadata) and zips.
    Returns: the result; `refused` has the reason for every file that was not used.
    Raises: InputError if the dataset no longer exists.
    """
    zips = [file for file in map(Path, files) if zipfile.is_zipfile(file)]
    loose = [file for file in map(Path, files) if file not in zips]
    parts = [*([_add_loose(folder, loose)] if loose else []), *(_add_zip(folder, file) for file in zips)]
    return summarised(functools.reduce(_merged, parts, Added()))


def _add_loose(folder: Path, files: Sequence[Path]) -> Added:
    with tempfile.TemporaryDirectory() as temporary:
        layout, rest = _Layout(Path(temporary)), []
        for file in files:
            name = display_name(file)
            if is_system_name(name) or not file.is_file():
                rest.append(file)
            else:
                layout.files.append(layout.link(name, file))
        for entry in read_set(folder).images:
            if not is_system_name(entry.name) and (folder / entry.file).is_file():
                layout.present[layout.link(entry.name, folder / entry.file)] = entry.file
        added = _add(folder, layout)
        return _merged(added, add_images(folder, rest)) if rest else added


def _add_zip(folder: Path, file: Path) -> Added:
    """Add the photos in a zip, which must be of one subject."""
    name = display_name(file)
    with tempfile.TemporaryDirectory() as temporary:
        layout = _Layout(Path(temporary) / (stem_of(name).strip(".") or "zip"))
        try:
            layout.unpack(file)
            subjects = scan_folder(layout.folder).subjects
        except InputError as error:
            return Added(refused=[_without_paths(str(error), layout.folder).replace(repr(str(file)), name)])
        except OSError as error:
            return Added(refused=[f"{name} cannot be unpacked ({error.strerror}). Pack the zip again."])
        if len(subjects) > 1:
            names = listed([subject.name for subject in subjects], limit=5)
            return Added(refused=[f"{name} contains several subjects ({names}). Add the photos of one subject."])
        return _add(folder, layout)


def _add(folder: Path, layout: _Layout) -> Added:
    """Add the images in the layout, then their captions, and report the files that are not used."""
    try:
        scan = scan_folder(layout.folder)
    except InputError:
        return _add_by_content(folder, layout)
    captions, problems = _captions(scan, layout.folder)
    entries = captions.account.entries
    images = {entry.path for entry in entries if _may_be_image(entry)}
    added = add_images(folder, [path for path in layout.files if path in images])
    problems += _set_captions(folder, layout, captions, added)
    visible = tuple(entry for entry in entries if entry.kind in NAMED_BY_SCAN or entry.path.is_dir())
    refused = [*FolderAccount(layout.folder, visible).warnings(), *problems]
    if any(entry.use == "class_prompt" for entry in entries):
        refused.append(f"{CLASS_PROMPT} was left out. Enter the class word under Check instead.")
    notes = FolderAccount(layout.folder, notes=captions.account.notes).warnings()
    report = Added([], *([_without_paths(words, layout.folder) for words in each] for each in (refused, notes)))
    return _merged(added, report)


def _add_by_content(folder: Path, layout: _Layout) -> Added:
    """Add files none of which has the name of an image; the upload recognises images by their content."""
    texts = [path for path in layout.files if suffix_of(path.name) in TEXT_SUFFIXES]
    added = add_images(folder, [path for path in layout.files if path not in texts])
    if texts:
        added.refused.append(f"There is no photo for the captions in {listed(texts, layout.folder)}. Add photos first.")
    return added


def _captions(scan: FolderScan, folder: Path) -> tuple[Captions, list[str]]:
    """The captions in `folder`; if a caption file cannot be read, no captions and the reason."""
    try:
        return read_captions(scan), []
    except InputError as error:
        return Captions({}, scan.account), [f"The captions were left out. {error}"]


def _set_captions(folder: Path, layout: _Layout, captions: Captions, added: Added) -> list[str]:
    """Set the captions of new and earlier photos; returns the reasons for those that cannot be set."""
    texts = {path: caption.text for path, caption in captions.by_image.items()}
    by_name = {path.name: text for path, text in texts.items() if path in layout.files}
    by_file = {entry.file: by_name.get(entry.name) for entry in read_set(folder).images if entry.file in added.names}
    by_file |= {file: texts.get(path) for path, file in layout.present.items()}
    problems = [_caption(folder, file, text) for file, text in by_file.items() if text]
    return [problem for problem in problems if problem is not None]


def _may_be_image(entry: FolderEntry) -> bool:
    """Whether the upload must check the content of a file."""
    return entry.use in ("image", "unused") and entry.kind not in NAMED_BY_SCAN | {"system"}


def _caption(folder: Path, file: str, text: str) -> str | None:
    """Set the caption of the photo `file`; returns the reason if it cannot be set, else None."""
    try:
        set_caption(folder, file, text)
    except InputError as error:
        return str(error)
    return None


def _merged(added: Added, more: Added) -> Added:
    return Added(added.names + more.names, added.refused + more.refused, added.notes + more.notes)


def _without_paths(words: str, folder: Path) -> str:
    """`words` without the path of the temporary folder."""
    return words.replace(f"{folder}/", "").replace(str(folder), folder.name)
