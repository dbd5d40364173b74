"""Uploads of photos of a subject: images with captions, or a zip of them.

The files are put into a temporary folder and scanned like a folder on the command line, so that masks, captions and kohya's
folder names have the same meaning.
"""

from __future__ import annotations

import re
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from PIL import Image

from pipelines.errors import InputError
from pipelines.fewshot.archives import read_zip
from pipelines.subject.caption_files import Captions, read_captions
from pipelines.subject.folder_entries import FolderAccount, listed
from pipelines.subject.folder_names import CLASS_PROMPT, is_system_name, stem_of, suffix_of
from pipelines.subject.folder_scan import scan_folder
from webui.datasets import Dataset, DatasetImage
from webui.uploads import ZIP_LIMITS, Added, add_images, check_quota, display_name, encoded, store

# Files of these kinds are reported with the scan's reason; all others with the upload's.
NAMED_BY_SCAN = frozenset(
    {"mask", "condition", "caption_without_image", "foreign_caption", "other_caption", "same_caption", "latents_cache"}
)
# Of a crop, in pixels, and in shares of the shorter side, since the browser rounds.
MIN_CROP, CROP_TOLERANCE = 64, 0.01
# Words and numbers of file names that cameras and programs choose.
GENERIC = re.compile(
    r"\d+|[a-z]|img|image|images|dsc[fn]?|dscn|dji|pxl|photo|photos|pic|picture|pasted|screenshot|whatsapp|signal|received|scan|"
    r"untitled|file|download|copy|crop|edit|edited|final|new|at|am|pm|mvimg|burst|hdr|portrait|wa\d+",
    re.IGNORECASE,
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


def add_crop(dataset: Dataset, file: str, x: float, y: float, side: float) -> str:
    """Add a square of an image as a new one after it; returns its file.

    Args:
        x, y: the left upper corner, in units of the shorter side of the image.
        side: the side of the square, in the same units.
    Raises: InputError if the image does not exist, or the square is too small or outside of the image.
    """
    with dataset.change() as content:
        group, entry = content.find(file)
        with Image.open(dataset.folder / file, formats=("JPEG", "PNG")) as opened:
            image = opened.convert("RGB")
        short = min(image.size)
        width, height = image.width / short, image.height / short
        is_inside = 0 <= x <= width - side + CROP_TOLERANCE and 0 <= y <= height - side + CROP_TOLERANCE
        if not is_inside or side * short < MIN_CROP:
            raise InputError(f"The crop must lie in the image and have at least {MIN_CROP} pixels. Choose a larger square.")
        left, top, extent = round(x * short), round(y * short), round(side * short)
        crop = encoded(image.crop((left, top, min(left + extent, image.width), min(top + extent, image.height))))
        check_quota(dataset.folder.parent, 1, len(crop.content))
        name = PurePosixPath(entry.name)
        copy = DatasetImage("", f"{name.stem} (crop){name.suffix}", entry.caption, entry.part)
        added = store(dataset, group, crop, copy, group.images.index(entry) + 1)
    if entry.caption:
        dataset.set_caption(added, entry.caption)
    return added


def proposed_caption(prompt: str, name: str) -> str:
    """A caption for a photo from its file name, such as "a photo of sks duck, on the beach"; empty if the name says nothing.

    Args:
        prompt: the instance prompt, which the caption would replace.
    """
    words = [word for word in re.split(r"[\W_]+", stem_of(name)) if word and not GENERIC.fullmatch(word)]
    said = [word for word in words if word.lower() not in prompt.lower().split()]
    return f"{prompt}, {' '.join(words).lower()}" if len(said) > 1 and all(word.isalpha() for word in words) else ""


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
