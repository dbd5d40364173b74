"""Uploads: images, photos of a subject with captions, zips, and adapter files.

Images are checked and re-encoded (`pipelines.untrusted_images`) and stored under generated names. Photos of a subject are put
into a temporary folder first and scanned like a folder on the command line, so that masks, captions and kohya's folder names
have the same meaning. An unusable file is refused with a reason; the other files are added.
"""

from __future__ import annotations

import secrets
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from PIL import Image

from pipelines.errors import InputError
from pipelines.fewshot.archives import ZipLimits, read_zip
from pipelines.fewshot.class_zips import read_class_zip
from pipelines.fewshot.sources import DatasetSource
from pipelines.image_formats import UPLOAD_SUFFIXES
from pipelines.subject.caption_files import read_captions
from pipelines.subject.folder_entries import FolderAccount, listed
from pipelines.subject.folder_names import CLASS_PROMPT, stem_of, suffix_of
from pipelines.subject.folder_scan import FolderScan, scan_folder
from pipelines.untrusted_images import UploadedImage, encoded, reencode
from webui.datasets import SET, Dataset, DatasetImage, caption_line, printable_name
from webui.inference_worker import WORKER
from webui.workspace import Workspace

MAX_SETS = 500
MAX_IMAGES = 20_000
MAX_USER_BYTES = 8 * 2**30
DELETE = "Delete a dataset that you no longer need."
ZIP_LIMITS = ZipLimits(members=MAX_IMAGES, total_bytes=2 * 2**30)
# Images held in memory before they are written.
BATCH = 8
# Enough for an adapter of SDXL and its text encoders at rank 64.
MAX_ADAPTER_BYTES = 512 * 2**20
# The leading dot keeps it from being the id of a dataset.
ADAPTERS = ".adapters"
# Files of these kinds are reported by the scan, if at all; all others by the upload.
NAMED_BY_SCAN = frozenset(
    {"mask", "condition", "caption_without_image", "foreign_caption", "other_caption", "same_caption", "latents_cache", "system"}
)
# Of a crop, in pixels, and in shares of the shorter side, since the browser rounds.
MIN_CROP, CROP_TOLERANCE = 64, 0.01
TEXT_SUFFIXES = frozenset({".txt", ".caption", ".csv", ".jsonl", ".json"})
# The maximum number of sentences; the others are summarised in one.
SENTENCES = 20


@dataclass
class Added:
    """The result of an upload.

    Args:
        names: the files of the added images, relative to the dataset's folder.
        refused: a sentence for each file that was not added.
        notes: sentences about added files, such as that only the first frame of an animation is used, or how the split of a
            zip was read.
    """

    names: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def summarised(self) -> Added:
        """It, with at most `SENTENCES` refusals and as many notes; one sentence replaces the others."""
        for sentences, rest in ((self.refused, "were left out for similar reasons"), (self.notes, "have similar notes")):
            if len(sentences) > SENTENCES:
                sentences[SENTENCES - 1 :] = [f"{len(sentences) - SENTENCES + 1} further files {rest}."]
        return self


class FullError(InputError):
    """The user's quota is used up, so no further image fits."""


def display_name(path: str | Path) -> str:
    """The display name of an uploaded file: the last part of its path in printable characters, truncated."""
    last = str(path).replace("\\", "/").rsplit("/", 1)[-1]
    return printable_name(last) or "The file"


def add_images(
    dataset: Dataset, files: Sequence[str | Path | DatasetSource], class_folder: str | None = None, part: str = ""
) -> Added:
    """Add images to a dataset. Unusable files are refused; the others are added.

    Args:
        files: uploaded files, or images of another dataset.
        class_folder: the folder of the class that they are added to; None for photos of a subject.
        part: "train" or "test"; by default, new images fill up the test share of the class.
    Raises: InputError if the dataset or the class is gone.
    """
    sources = [Path(file) if isinstance(file, str) else file for file in files]
    added = Added()
    add_groups(dataset, [(class_folder, part, sources)], added)
    return added.summarised()


def add_zip(dataset: Dataset, file: str | Path) -> Added:
    """Add the class folders of a zip to a dataset. Each folder with images is a class, named after the folder.

    If split folders or a split.json divide the images, the classes and the parts are those of the split.

    Args:
        file: the uploaded zip.
    Raises: InputError if the file is not a zip, exceeds a limit, has unsafe members or an ambiguous layout; nothing is added.
    """
    content = read_class_zip(Path(file), display_name(file), ZIP_LIMITS)
    parts = {None: "", "test": "test"}
    groups = ((dataset.add_class(name), parts.get(part, "train"), files) for (name, part), files in content.groups.items())
    added = Added(refused=content.refused, notes=content.notes)
    add_groups(dataset, groups, added)
    return added.summarised()


def add_groups(
    dataset: Dataset,
    groups: Iterable[tuple[str | None, str, Sequence[Path | DatasetSource]]],
    added: Added,
    captions: Mapping[Path, str] = MappingProxyType({}),
) -> None:
    """Add images in batches, between which the lock is released, until the quota is used up.

    Args:
        groups: for each the folder of a class, or None; a part, as for `add_images`; and images.
        added: gets the result.
        captions: of some of the images.
    Raises: InputError as `add_images`.
    """
    quota = None
    try:
        for class_folder, part, files in groups:
            images = _readable(files, added)
            while batch := list(islice(images, BATCH)):
                with dataset.change() as content:
                    # Counted under the lock, so that no file is removed meanwhile.
                    quota = quota or Quota(dataset.folder.parent)
                    quota.use(len(batch), sum(len(image.content) for _, image in batch))
                    group = content.photos if class_folder is None else content.class_in(class_folder)
                    for file, image in batch:
                        entry = DatasetImage("", display_name(file.name), captions.get(file, ""), part)
                        group.images.append(dataset.store(group, entry, image))
                        added.names.append(entry.file)
                        added.notes += image.notes
    except FullError as error:
        added.refused.append(str(error))


def _readable(files: Sequence[Path | DatasetSource], added: Added) -> Iterator[tuple[Path | DatasetSource, UploadedImage]]:
    """The usable images; adds the reasons for the others to `added.refused`."""
    for file in files:
        try:
            yield file, reencode(file, display_name(file) if isinstance(file, Path) else file.name)
        except InputError as error:
            added.refused.append(str(error))


class Quota:
    """A user's quota during an upload. Their files are counted once, so simultaneous uploads can exceed it by one of them.

    Args:
        sets: the folder of the user's datasets.
    """

    def __init__(self, sets: Path) -> None:
        self.datasets = len(list(sets.glob(f"*/{SET}")))
        sizes = [entry.stat().st_size for entry in sets.rglob("*") if entry.is_file()]
        self.files, self.size = len(sizes), sum(sizes)

    def use(self, images: int, size: int) -> None:
        """Count new files. Raises: FullError if `images` more images of `size` bytes in total exceed the quota."""
        self.files, self.size = self.files + images, self.size + size
        if self.datasets > MAX_SETS:
            raise FullError(f"You have reached the limit of {MAX_SETS} datasets. {DELETE}")
        if images and self.files > MAX_IMAGES:
            raise FullError(f"The limit is {MAX_IMAGES:,} images per user. {DELETE}")
        if self.size > MAX_USER_BYTES:
            raise FullError(f"The limit is {MAX_USER_BYTES >> 30} GB of files per user. {DELETE}")


def add_photos(dataset: Dataset, files: Sequence[str | Path]) -> Added:
    """Add photos and captions to a dataset; captions may also belong to photos that are already there.

    Args:
        files: uploaded images, caption files (text or metadata) and zips.
    Returns: the result; `refused` has the reason for every file that was not used.
    Raises: InputError if the dataset no longer exists.
    """
    added, zips = Added(), [file for file in map(Path, files) if zipfile.is_zipfile(file)]
    if loose := [file for file in map(Path, files) if file not in zips]:
        _add_loose(dataset, loose, added)
    for file in zips:
        _add_zipped(dataset, file, added)
    return added.summarised()


def _add_loose(dataset: Dataset, files: Sequence[Path], added: Added) -> None:
    """Add files as the photos and captions of one folder."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        new = [_link(folder, display_name(file), file) for file in files]
        # Captions may also belong to these.
        earlier = {_link(folder, image.name, dataset.folder / image.file): image.file for image in dataset.photos()}
        try:
            scan = scan_folder(folder)
        except InputError:
            # No file has the name of an image, so they are recognised by their content.
            texts = [path.name for path in new if suffix_of(path.name) in TEXT_SUFFIXES]
            add_groups(dataset, [(None, "", [path for path in new if path.name not in texts])], added)
            if texts:
                added.refused.append(f"There is no photo for the captions in {listed(texts)}. Add photos first.")
        else:
            _add_scanned(dataset, scan, new, earlier, added)


def _link(folder: Path, name: str, target: Path) -> Path:
    """Link `target` as `name`, with a number if it is taken; returns the link. An image is not hidden, unlike other files."""
    name = name.lstrip(".") if suffix_of(name) in UPLOAD_SUFFIXES else name
    path, number = folder / name, 1
    while path.is_symlink():
        number += 1
        path = folder / f"{stem_of(name)} ({number}){suffix_of(name)}"
    path.symlink_to(target.resolve())
    return path


def _add_zipped(dataset: Dataset, file: Path, added: Added) -> None:
    """Add the photos in a zip, which must be of one subject."""
    name = display_name(file)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / (stem_of(name).strip(".") or "zip")
        try:
            files = _unpacked(file, folder)
            scan = scan_folder(folder)
            if len(scan.subjects) > 1:
                names = listed([subject.name for subject in scan.subjects], limit=5)
                raise InputError(f"{name} contains several subjects ({names}). Add the photos of one subject.")
        except InputError as error:
            added.refused.append(_without_paths(str(error), folder).replace(repr(str(file)), name))
        except OSError as error:
            added.refused.append(f"{name} cannot be unpacked ({error.strerror}). Pack the zip again.")
        else:
            _add_scanned(dataset, scan, files, {}, added)


def _unpacked(file: Path, folder: Path) -> list[Path]:
    """The files of a zip, unpacked into a new folder. Raises: InputError as `read_zip`; OSError if one cannot be written."""
    folder.mkdir()
    members = read_zip(file, ZIP_LIMITS).files
    for entry in members:
        path = folder / entry.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(entry.content())
    return [folder / entry.name for entry in members]


def _add_scanned(dataset: Dataset, scan: FolderScan, files: Sequence[Path], earlier: Mapping[Path, str], added: Added) -> None:
    """Add the images in a folder with their captions, and report the files that are not used.

    Args:
        files: the uploaded files in the folder.
        earlier: the photos in it that the dataset has already, with their files there.
    """
    captions, account, refused = _captions(scan)
    images = {entry.path for entry in account.entries if entry.use in ("image", "unused") and entry.kind not in NAMED_BY_SCAN}
    add_groups(dataset, [(None, "", [path for path in files if path in images])], added, captions)
    for path in captions.keys() & earlier.keys():
        dataset.set_caption(earlier[path], captions[path])
    added.refused += [_without_paths(sentence, account.folder) for sentence in [*refused, *_unused(account)]]
    added.notes += [_without_paths(note.words, account.folder) for note in account.notes if note.is_warning]


def _unused(account: FolderAccount) -> list[str]:
    """Sentences on the files that the scan does not use and the upload does not report."""
    entries = tuple(entry for entry in account.entries if entry.kind in NAMED_BY_SCAN or entry.path.is_dir())
    has_prompt = any(entry.use == "class_prompt" for entry in account.entries)
    left_out = [f"{CLASS_PROMPT} was left out. Enter the class word under Check instead."] if has_prompt else []
    return FolderAccount(account.folder, entries).warnings() + left_out


def _captions(scan: FolderScan) -> tuple[dict[Path, str], FolderAccount, list[str]]:
    """The captions of a folder's images, the account of its files, and the reasons for captions that cannot be used."""
    try:
        read = read_captions(scan)
    except InputError as error:
        return {}, scan.account, [f"The captions were left out. {error}"]
    captions, problems = {}, []
    for path, caption in read.by_image.items():
        try:
            captions[path] = caption_line(caption.text)
        except InputError as error:
            problems.append(str(error))
    return captions, read.account, problems


def _without_paths(sentence: str, folder: Path) -> str:
    """`sentence` without the path of a temporary folder."""
    return sentence.replace(f"{folder}/", "").replace(str(folder), folder.name)


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
        Quota(dataset.folder.parent).use(1, len(crop.content))
        name = PurePosixPath(entry.name)
        copy = replace(entry, name=f"{name.stem} (crop){name.suffix}")
        group.images.insert(group.images.index(entry) + 1, dataset.store(group, copy, crop))
    return copy.file


def add_adapter(workspace: Workspace, file: str | Path) -> tuple[Path, list[str]]:
    """Copy a LoRA for SDXL to the user's files under a generated name; no code in the file is ever run.

    Returns: the copy, and sentences on the tensors that are not applied.
    Raises: InputError if it is not a valid safetensors file of a supported kind with finite values, or the quota is used up.
    """
    path, name = Path(file), display_name(file)
    size = path.stat().st_size
    if size > MAX_ADAPTER_BYTES:
        raise InputError(
            f"{name} is {size / 2**20:.0f} MB; an adapter may be at most {MAX_ADAPTER_BYTES // 2**20} MB. Choose a smaller one."
        )
    notes = WORKER.call("check_adapter", path, name)
    Quota(workspace.sets).use(0, size)
    folder = workspace.sets / ADAPTERS
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / f"{secrets.token_hex(8)}.safetensors"
    temporary = copy.with_suffix(".part")
    try:
        shutil.copyfile(path, temporary)
        copy.with_suffix(".txt").write_text(name, encoding="utf-8")
        temporary.replace(copy)
    finally:
        temporary.unlink(missing_ok=True)
    return copy, notes


def adapters(workspace: Workspace) -> list[tuple[str, Path]]:
    """The adapters that the user uploaded, newest first: display name (not escaped) and path."""
    files = sorted((workspace.sets / ADAPTERS).glob("*.safetensors"), key=lambda path: path.stat().st_mtime, reverse=True)
    return [(path.with_suffix(".txt").read_text(encoding="utf-8"), path) for path in files]
