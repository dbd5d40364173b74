"""Uploads of photos of a subject: images with captions, or a zip of them.

The files are put into a temporary folder and scanned like a folder on the command line, so that masks, captions and kohya's
folder names have the same meaning.
"""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.errors import InputError
from pipelines.fewshot.archives import read_zip
from pipelines.subject.caption_files import Captions, read_captions
from pipelines.subject.folder_entries import FolderAccount, listed
from pipelines.subject.folder_names import CLASS_PROMPT, is_system_name, stem_of, suffix_of
from pipelines.subject.folder_scan import scan_folder
from webui.datasets import Dataset
from webui.uploads import ZIP_LIMITS, Added, add_images, display_name

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

    def without_paths(self, sentence: str) -> str:
        """`sentence` without the path of the temporary folder."""
        return sentence.replace(f"{self.folder}/", "").replace(str(self.folder), self.folder.name)


def add_photos(dataset: Dataset, files: Sequence[str | Path]) -> Added:
    """Add photos and captions to a dataset; captions may also belong to photos that are already there.

    Args:
        files: uploaded images, caption files (text or metadata) and zips.
    Returns: the result; `refused` has the reason for every file that was not used.
    Raises: InputError if the dataset no longer exists.
    """
    zips = [file for file in map(Path, files) if zipfile.is_zipfile(file)]
    loose = [file for file in map(Path, files) if file not in zips]
    added = _add_loose(dataset, loose) if loose else Added()
    for file in zips:
        added.extend(_add_zip(dataset, file))
    added.summarise()
    return added


def _add_loose(dataset: Dataset, files: Sequence[Path]) -> Added:
    with tempfile.TemporaryDirectory() as temporary:
        layout, rest = _Layout(Path(temporary)), []
        for file in files:
            name = display_name(file)
            if is_system_name(name) or not file.is_file():
                rest.append(file)
            else:
                layout.files.append(layout.link(name, file))
        for image in dataset.photos():
            if not is_system_name(image.name):
                layout.present[layout.link(image.name, dataset.folder / image.file)] = image.file
        added = _add(dataset, layout)
    added.extend(add_images(dataset, rest))
    return added


def _add_zip(dataset: Dataset, file: Path) -> Added:
    """Add the photos in a zip, which must be of one subject."""
    name = display_name(file)
    with tempfile.TemporaryDirectory() as temporary:
        layout = _Layout(Path(temporary) / (stem_of(name).strip(".") or "zip"))
        try:
            layout.unpack(file)
            subjects = scan_folder(layout.folder).subjects
        except InputError as error:
            return Added(refused=[layout.without_paths(str(error)).replace(repr(str(file)), name)])
        except OSError as error:
            return Added(refused=[f"{name} cannot be unpacked ({error.strerror}). Pack the zip again."])
        if len(subjects) > 1:
            names = listed([subject.name for subject in subjects], limit=5)
            return Added(refused=[f"{name} contains several subjects ({names}). Add the photos of one subject."])
        return _add(dataset, layout)


def _add(dataset: Dataset, layout: _Layout) -> Added:
    """Add the images in the layout, then their captions, and report the files that are not used."""
    try:
        scan = scan_folder(layout.folder)
    except InputError:
        return _add_by_content(dataset, layout)
    captions, problems = Captions({}, scan.account), []
    try:
        captions = read_captions(scan)
    except InputError as error:
        problems.append(f"The captions were left out. {error}")
    entries = captions.account.entries
    hidden = NAMED_BY_SCAN | {"system"}
    images = {entry.path for entry in entries if entry.use in ("image", "unused") and entry.kind not in hidden}
    added = add_images(dataset, [path for path in layout.files if path in images])
    problems += _set_captions(dataset, layout, captions, added)
    visible = tuple(entry for entry in entries if entry.kind in NAMED_BY_SCAN or entry.path.is_dir())
    refused = [*FolderAccount(layout.folder, visible).warnings(), *problems]
    if any(entry.use == "class_prompt" for entry in entries):
        refused.append(f"{CLASS_PROMPT} was left out. Enter the class word under Check instead.")
    notes = FolderAccount(layout.folder, notes=captions.account.notes).warnings()
    added.extend(Added([], [*map(layout.without_paths, refused)], [*map(layout.without_paths, notes)]))
    return added


def _add_by_content(dataset: Dataset, layout: _Layout) -> Added:
    """Add files none of which has the name of an image; the upload recognises images by their content."""
    texts = [path for path in layout.files if suffix_of(path.name) in TEXT_SUFFIXES]
    added = add_images(dataset, [path for path in layout.files if path not in texts])
    if texts:
        added.refused.append(f"There is no photo for the captions in {listed(texts, layout.folder)}. Add photos first.")
    return added


def _set_captions(dataset: Dataset, layout: _Layout, captions: Captions, added: Added) -> list[str]:
    """Set the captions of new and earlier photos; returns the reasons for those that cannot be set."""
    texts = {path: caption.text for path, caption in captions.by_image.items()}
    by_name = {path.name: text for path, text in texts.items() if path in layout.files}
    by_file = {image.file: by_name.get(image.name) for image in dataset.photos() if image.file in added.names}
    by_file |= {file: texts.get(path) for path, file in layout.present.items()}
    problems = []
    for file, text in by_file.items():
        try:
            if text:
                dataset.set_caption(file, text)
        except InputError as error:
            problems.append(str(error))
    return problems
