"""Uploads: images, photos of a subject with captions, zips, and adapter files.

An image is identified by its content, checked against limits before it is decoded, and re-encoded under a generated name, so that
neither metadata nor hidden content is stored. An unusable file is refused with a reason; the other files are added.
"""

from __future__ import annotations

import io
import os
import secrets
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath

from PIL import Image

from pipelines.errors import InputError
from pipelines.fewshot.archives import ZipContent, ZipLimits, ZippedFile, read_zip
from pipelines.fewshot.layouts import FolderLayout, arrange, check_spellings, with_test
from pipelines.fewshot.sources import DatasetSource
from pipelines.fewshot.split_files import SPLIT_FILE, parts_of_set, split_file
from pipelines.fewshot.split_words import Part
from pipelines.image_decoding import SEVERAL_JPEGS, TURNED, ReadImage, decode
from pipelines.image_formats import (
    HEIC,
    JPEG,
    UPLOAD_FORMATS,
    UPLOAD_SUFFIXES,
    DecoderMissingError,
    UnsupportedFormatError,
    listed,
)
from pipelines.images import UNREADABLE, open_image
from webui.datasets import SET, Dataset, DatasetImage, ImageGroup, printable_name
from webui.inference_worker import WORKER
from webui.workspace import Workspace

MAX_BYTES = 25 * 2**20
# Larger photos of phones are halved until they have at most MAX_PIXELS. A JPEG is halved while it is decoded, a HEIC only
# afterwards, so it needs more memory. Images of other formats are refused: a bomb of few bytes can have any number of pixels.
MAX_PIXELS = 40_000_000
MAX_PHOTO_PIXELS = {JPEG.pillow: 128_000_000, SEVERAL_JPEGS: 128_000_000, HEIC.pillow: 64_000_000}
# Just below the limits of JPEG and WebP.
MAX_SIDE = 16_000
# Images up to SDXL's resolution are stored losslessly. Larger ones are downscaled for training anyway, which hides the loss of
# JPEG at quality 95 without chroma subsampling; a PNG of a 24-megapixel photograph takes 40 MB and ten seconds.
LOSSLESS_PIXELS = 1024 * 1280
JPEG_QUALITY = 95
MAX_SETS = 500
MAX_IMAGES = 20_000
MAX_USER_BYTES = 8 * 2**30
ZIP_LIMITS = ZipLimits(members=MAX_IMAGES, total_bytes=2 * 2**30)
# Images held in memory before they are written.
BATCH = 8
# Enough for an adapter of SDXL and its text encoders at rank 64.
MAX_ADAPTER_BYTES = 512 * 2**20
# The leading dot keeps it from being the id of a dataset.
ADAPTERS = ".adapters"
# The maximum number of sentences; the others are summarised in one.
SENTENCES = 20


@dataclass(frozen=True)
class UploadedImage:
    """A re-encoded image.

    Args:
        content: the content of the file.
        suffix: ".png" or ".jpg".
        notes: sentences on how it was read.
    """

    content: bytes
    suffix: str
    notes: tuple[str, ...] = ()


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

    def extend(self, other: Added) -> None:
        """Append the result of another upload."""
        self.names += other.names
        self.refused += other.refused
        self.notes += other.notes

    def summarise(self) -> None:
        """Keep at most `SENTENCES` refusals and as many notes; one sentence replaces the others."""
        for sentences, rest in ((self.refused, "were left out for similar reasons"), (self.notes, "have similar notes")):
            if len(sentences) > SENTENCES:
                sentences[SENTENCES - 1 :] = [f"{len(sentences) - SENTENCES + 1} further files {rest}."]


class FullError(InputError):
    """The user's quota is used up, so no further image fits."""


def display_name(path: str | Path) -> str:
    """The display name of an uploaded file: the last part of its path in printable characters, truncated."""
    last = str(path).replace("\\", "/").rsplit("/", 1)[-1]
    return printable_name(last) or "The file"


def read_upload(file: Path | DatasetSource, name: str) -> UploadedImage:
    """An image: upright, in sRGB, without metadata, with at most `MAX_PIXELS`.

    Args:
        name: its name in error messages.
    Raises: InputError if it is not an image, too large or damaged.
    """
    content = _content(file, name)
    try:
        with open_image(io.BytesIO(content), name, UPLOAD_FORMATS) as opened:
            size = opened.size
            read = _decoded(opened, name)
        notes = [f"{name}: {note.words} {note.advice}" for note in read.notes if note is not TURNED]
        if read.image.width * read.image.height < size[0] * size[1]:
            notes.append(_downscaled(name, size, read.image.size))
        return encoded(read.image, tuple(notes))
    except DecoderMissingError:
        raise
    except (UnsupportedFormatError, Image.UnidentifiedImageError) as error:
        raise InputError(f"{name} is not a {listed(UPLOAD_FORMATS)} image. Save it in one of these formats.") from error
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"{name} has too many pixels. Downscale it and add it again.") from error
    except UNREADABLE as error:
        raise InputError(f"{name} is damaged or truncated. Add it again, or export it again from the original.") from error


def _content(file: Path | DatasetSource, name: str) -> bytes:
    try:
        size = file.stat().st_size if isinstance(file, Path) else file.size()
        if size > MAX_BYTES:
            raise InputError(
                f"{name} is {size / 2**20:.0f} MB; an image may be at most {MAX_BYTES >> 20} MB. Save it as JPEG or downscale it."
            )
        return file.read_bytes() if isinstance(file, Path) else file.content()
    except OSError as error:
        raise InputError(f"{name} could not be read. Add it again.") from error


def _decoded(opened: Image.Image, name: str) -> ReadImage:
    width, height = opened.size
    most = MAX_PHOTO_PIXELS.get(opened.format, MAX_PIXELS)
    if width * height > most or max(opened.size) > MAX_SIDE:
        raise InputError(
            f"{name} is {width:,} x {height:,}; a {opened.format} image may have at most {most // 1_000_000} million pixels and "
            f"{MAX_SIDE:,} pixels per side. Downscale it, or save it as JPEG, and add it again."
        )
    factor = 1
    while width * height > MAX_PIXELS * factor**2:
        factor *= 2
    if factor > 1:
        opened.draft(None, (width // factor, height // factor))
    read = decode(opened)
    is_full = read.image.width * read.image.height > MAX_PIXELS
    return ReadImage(read.image.reduce(factor), read.notes) if is_full else read


def _downscaled(name: str, before: tuple[int, int], after: tuple[int, int]) -> str:
    pixels = before[0] * before[1] / 1_000_000
    return f"{name} has {pixels:.0f} million pixels. It was downscaled to {after[0]:,} x {after[1]:,}, more than training uses."


def encoded(image: Image.Image, notes: tuple[str, ...] = ()) -> UploadedImage:
    """The pixels of an image alone, as a file."""
    plain = Image.new("RGB", image.size)
    plain.paste(image)
    stream = io.BytesIO()
    if plain.width * plain.height <= LOSSLESS_PIXELS:
        plain.save(stream, "PNG")
        return UploadedImage(stream.getvalue(), ".png", notes)
    plain.save(stream, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return UploadedImage(stream.getvalue(), ".jpg", notes)


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
    added = Added()
    sources = [Path(file) if isinstance(file, str) else file for file in files]
    _add(dataset, ((display_name(file.name), file) for file in sources), class_folder, part, added)
    added.summarise()
    return added


def add_zip(dataset: Dataset, file: str | Path) -> Added:
    """Add the class folders of a zip to a dataset. Each folder with images is a class, named after the folder.

    If split folders or a split.json divide the images, the classes and the parts are those of the split.

    Args:
        file: the uploaded zip.
    Raises: InputError if the file is not a zip, exceeds a limit, has unsafe members or an ambiguous layout; nothing is added.
    """
    added = Added()
    for (name, part), members in _class_folders(Path(file), added).items():
        group = "" if part is None else "test" if part == "test" else "train"
        if not _add(dataset, ((entry.name, entry) for entry in members), dataset.add_class(name), group, added):
            break
    added.summarise()
    return added


def _add(
    dataset: Dataset, named: Iterable[tuple[str, Path | DatasetSource]], class_folder: str | None, part: str, added: Added
) -> bool:
    """Write images to a dataset in batches, between which the lock is released; returns whether the quota sufficed."""
    images = _readable(named, added)
    while batch := list(islice(images, BATCH)):
        with dataset.change() as content:
            group = content.photos if class_folder is None else content.class_in(class_folder)
            try:
                check_quota(dataset.folder.parent, len(batch), sum(len(image.content) for _, image in batch))
            except FullError as error:
                added.refused.append(str(error))
                return False
            for name, image in batch:
                entry = DatasetImage("", display_name(name), part=part)
                added.names.append(store(dataset, group, image, entry, len(group.images)))
                added.notes += image.notes
    return True


def store(dataset: Dataset, group: ImageGroup, image: UploadedImage, entry: DatasetImage, position: int) -> str:
    """Write an image under the next name of its group; returns the name."""
    path = dataset.next_path(group, image.suffix)
    temporary = path.with_name(f".{path.name}")
    temporary.write_bytes(image.content)
    os.replace(temporary, path)
    entry.file = path.relative_to(dataset.folder).as_posix()
    group.images.insert(position, entry)
    return entry.file


def _readable(named: Iterable[tuple[str, Path | DatasetSource]], added: Added) -> Iterator[tuple[str, UploadedImage]]:
    """The usable images with their names; adds the reasons for the others to `added.refused`."""
    for name, file in named:
        try:
            yield name, read_upload(file, name)
        except InputError as error:
            added.refused.append(str(error))


def check_quota(sets: Path, images: int, size: int) -> None:
    """Raise FullError if `images` more images of `size` bytes in total exceed the user's quota in the folder `sets`."""
    held = [entry.stat().st_size for entry in sets.rglob("*") if entry.is_file()]
    if len(list(sets.glob(f"*/{SET}"))) > MAX_SETS:
        raise FullError(f"You have reached the limit of {MAX_SETS} datasets. Delete one that you no longer need.")
    if images and len(held) + images > MAX_IMAGES:
        raise FullError(f"The limit is {MAX_IMAGES:,} images per user. Delete a dataset that you no longer need.")
    if sum(held) + size > MAX_USER_BYTES:
        raise FullError(f"The limit is {MAX_USER_BYTES >> 30} GB of files per user. Delete a dataset that you no longer need.")


def _class_folders(path: Path, added: Added) -> dict[tuple[str, Part | None], list[ZippedFile]]:
    """The images of a zip by class and, if the zip is split, by part; other files are refused."""
    name = display_name(path)
    try:
        if not zipfile.is_zipfile(path):
            raise InputError(f"{name} is not a zip. Pack one folder of images for each class into a zip.")
        groups = _grouped(name, read_zip(path, ZIP_LIMITS), added)
    except InputError as error:
        # The page must not show where the server stores uploads.
        raise InputError(str(error).replace(repr(str(path)), name)) from error
    if not groups:
        raise InputError(f"{name} contains no folder with images. Pack one folder of images for each class into a zip.")
    return groups


def _grouped(name: str, content: ZipContent, added: Added) -> dict[tuple[str, Part | None], list[ZippedFile]]:
    images = [file for file in content.files if _is_usable(file, added)]
    layout = arrange(name, [file.name for file in images], content.folders)
    split = split_file(content.files, layout)
    parts = _parts(name, layout, split, added)
    stray = [file.name for file in content.files if PurePosixPath(file.name).name.casefold() == SPLIT_FILE and file != split]
    added.refused += [f"{other} is not next to the class folders and was left out." for other in stray]
    groups: dict[tuple[str, Part | None], list[ZippedFile]] = {}
    for file in images:
        key = layout.classes[file.name] if parts else PurePosixPath(file.name).parent.name
        groups.setdefault((key, parts.get(file.name)), []).append(file)
    return groups


def _is_usable(file: ZippedFile, added: Added) -> bool:
    """Whether a file of a zip is an image in a folder. Other files except split.json are refused."""
    path = PurePosixPath(file.name)
    if path.suffix.lower() == ".zip":
        added.refused.append(f"{file.name} is a zip inside the zip and was left out. Unpack it, or add it separately.")
    elif path.suffix.lower() not in UPLOAD_SUFFIXES:
        if path.name.casefold() != SPLIT_FILE:
            added.refused.append(f"{file.name} is not a {listed(UPLOAD_FORMATS)} image and was left out.")
    elif len(path.parts) < 2:
        added.refused.append(f"{file.name} is not in a class folder and was left out. Move it to the folder of its class.")
    else:
        return True
    return False


def _parts(name: str, layout: FolderLayout, split: ZippedFile | None, added: Added) -> Mapping[str, Part]:
    """The split that a zip came with, by the names of its files; empty if it came with none."""
    parts, notes = parts_of_set(name, layout, split)
    if parts:
        check_spellings(name, layout.classes, parts)
        added.notes += [*layout.notes, *notes, "Its test images are used only for testing, all others only for training."]
    return with_test(parts)


def check_adapter(file: str | Path) -> Path:
    """Check that a file is a LoRA for SDXL: valid safetensors of a supported kind, all values finite.

    Returns: the file.
    Raises: InputError if it is not. No code in the file is ever run.
    """
    path, name = Path(file), display_name(file)
    size = path.stat().st_size
    if size > MAX_ADAPTER_BYTES:
        raise InputError(
            f"{name} is {size / 2**20:.0f} MB; an adapter may be at most {MAX_ADAPTER_BYTES // 2**20} MB. Choose a smaller one."
        )
    WORKER.call("check_adapter", path, name)
    return path


def left_out(file: str | Path) -> list[str]:
    """Sentences on the tensors of a valid adapter that are not applied."""
    return WORKER.call("left_out", Path(file), display_name(file))


def add_adapter(workspace: Workspace, file: str | Path) -> Path:
    """Copy an adapter to the user's files under a generated name; returns the copy.

    Raises: InputError as `check_adapter`, or if the quota is used up.
    """
    checked = check_adapter(file)
    check_quota(workspace.sets, 0, checked.stat().st_size)
    folder = workspace.sets / ADAPTERS
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / f"{secrets.token_hex(8)}.safetensors"
    temporary = copy.with_suffix(".part")
    try:
        shutil.copyfile(checked, temporary)
        copy.with_suffix(".txt").write_text(display_name(file), encoding="utf-8")
        temporary.replace(copy)
    finally:
        temporary.unlink(missing_ok=True)
    return copy


def adapters(workspace: Workspace) -> list[tuple[str, Path]]:
    """The adapters that the user uploaded, newest first: display name (not escaped) and path."""
    files = sorted((workspace.sets / ADAPTERS).glob("*.safetensors"), key=lambda path: path.stat().st_mtime, reverse=True)
    return [(path.with_suffix(".txt").read_text(encoding="utf-8"), path) for path in files]
