"""Uploads: images, zips of class folders and adapter files.

An image is identified by its content, checked against limits before it is decoded, and re-encoded under a generated name
(`webui.incoming`), so that neither metadata nor hidden content is stored. An unusable file is refused with a reason; the other
files are added.
"""

from __future__ import annotations

import os
import secrets
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TypeVar

from pipelines.errors import InputError
from pipelines.fewshot.archives import ZipContent, ZipLimits, ZippedFile, read_zip
from pipelines.fewshot.layouts import FolderLayout, arrange, check_spellings, with_test
from pipelines.fewshot.split_files import SPLIT_FILE, parts_of_set, split_file
from pipelines.fewshot.split_words import Part
from pipelines.image_formats import UPLOAD_FORMATS, UPLOAD_SUFFIXES, listed
from webui.image_datasets import SET, Entry, add_class, changing, next_path
from webui.incoming import UploadedImage, check_size, display_name, read_upload, reencoded
from webui.workspace import Workspace

File = TypeVar("File")
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


@dataclass
class Added:
    """The result of an upload.

    Args:
        names: the files of the added images, relative to the dataset's folder.
        refused: a sentence for each file that was not added; escape it before it goes into HTML.
        notes: sentences about added files, such as that only the first frame of an animation is used, or how the split of a
            zip was read.
        parts: the split that a zip came with, by the images' names; empty if it came with none.
    """

    names: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    parts: dict[str, Part] = field(default_factory=dict)


class FullError(InputError):
    """The user's quota is used up, so no further image fits."""


def add_images(folder: Path, files: Sequence[str | Path], class_folder: str | None = None) -> Added:
    """Add images to a dataset. Unusable files are refused; the others are added.

    Args:
        folder: the folder of the dataset.
        files: uploaded files.
        class_folder: the folder of the class that they are added to; None for a dataset without classes.
    Raises: InputError if the dataset or the class is gone.
    """
    added = Added()
    named = ((display_name(file), Path(file)) for file in files)
    try:
        _add(folder, _readable(named, read_upload, added), class_folder, added)
    except FullError as error:
        added.refused.append(str(error))
    return summarised(added)


def add_zip(folder: Path, file: str | Path) -> Added:
    """Add the class folders of a zip to a dataset. Each folder with images is a class, named after the folder.

    If split folders or a split.json divide the images, the classes are those of the split and `Added.parts` holds it.

    Args:
        folder: the folder of the dataset.
        file: the uploaded zip.
    Raises: InputError if the file is not a zip, exceeds a limit, has unsafe members or an ambiguous layout; nothing is added.
    """
    path, added = Path(file), Added()
    groups = _class_folders(path, added)
    try:
        for (name, part), members in groups.items():
            named = ((entry.name, entry) for entry in members)
            before = len(added.names)
            _add(folder, _readable(named, _read_zipped, added), add_class(folder, name), added)
            added.parts |= dict.fromkeys(added.names[before:], part) if part is not None else {}
    except FullError as error:
        added.refused.append(str(error))
    return summarised(added)


def check_adapter(file: str | Path) -> Path:
    """Check that a file is a LoRA for SDXL: valid safetensors of a supported kind, all values finite.

    Returns: the file.
    Raises: InputError if it is not. No code in the file is ever run.
    """
    # Imported here because it loads torch.
    from webui.work import adapter_files

    path, name = Path(file), display_name(file)
    size = path.stat().st_size
    if size > MAX_ADAPTER_BYTES:
        raise InputError(
            f"{name} is {size / 2**20:.0f} MB; an adapter may be at most {MAX_ADAPTER_BYTES // 2**20} MB. Choose a smaller one."
        )
    adapter_files.check_tensors(path, name)
    return path


def left_out(file: str | Path) -> list[str]:
    """Sentences on the tensors of a valid adapter that are not applied; escape them before they go into HTML."""
    from webui.work import adapter_files

    return adapter_files.left_out(Path(file), display_name(file))


def add_adapter(workspace: Workspace, file: str | Path) -> Path:
    """Copy an adapter to the user's files under a generated name; returns the copy.

    Raises: InputError as `check_adapter`, or if the quota is used up.
    """
    checked = check_adapter(file)
    _check_room(workspace.sets, 0, checked.stat().st_size)
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


def _add(folder: Path, images: Iterator[tuple[str, UploadedImage]], class_folder: str | None, added: Added) -> None:
    """Write images to a dataset in batches; the lock is released between batches."""
    while batch := list(islice(images, BATCH)):
        with changing(folder) as content:
            container = content if class_folder is None else content.class_in(class_folder)
            _check_room(folder.parent, len(batch), sum(len(image.content) for _, image in batch))
            for name, image in batch:
                path = next_path(folder, container, image.suffix)
                temporary = path.with_name(f".{path.name}")
                temporary.write_bytes(image.content)
                os.replace(temporary, path)
                container.images.append(Entry(path.relative_to(folder).as_posix(), display_name(name)))
                added.names.append(container.images[-1].file)
                added.notes += image.notes


def _readable(
    named: Iterable[tuple[str, File]], read: Callable[[File, str], UploadedImage], added: Added
) -> Iterator[tuple[str, UploadedImage]]:
    """The usable images with their names; adds the reasons for the others to `added.refused`."""
    for name, file in named:
        try:
            yield name, read(file, name)
        except InputError as error:
            added.refused.append(str(error))


def _read_zipped(entry: ZippedFile, name: str) -> UploadedImage:
    check_size(entry.size(), name)
    return reencoded(entry.content(), name)


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


def _check_room(sets: Path, images: int, size: int) -> None:
    """Raise FullError if `images` more images of `size` bytes in total exceed the user's quota in the folder `sets`."""
    held = [entry.stat().st_size for entry in sets.rglob("*") if entry.is_file()]
    if len(list(sets.glob(f"*/{SET}"))) > MAX_SETS:
        raise FullError(f"You have reached the limit of {MAX_SETS} datasets. Delete one that you no longer need.")
    if images and len(held) + images > MAX_IMAGES:
        raise FullError(f"The limit is {MAX_IMAGES:,} images per user. Delete a dataset that you no longer need.")
    if sum(held) + size > MAX_USER_BYTES:
        raise FullError(f"The limit is {MAX_USER_BYTES >> 30} GB of files per user. Delete a dataset that you no longer need.")


def summarised(added: Added) -> Added:
    """`added` with at most `SENTENCES` refusals and as many notes; the rest is summarised."""
    for sentences, rest in ((added.refused, "were left out for similar reasons"), (added.notes, "have similar notes")):
        if len(sentences) > SENTENCES:
            sentences[SENTENCES - 1 :] = [f"{len(sentences) - SENTENCES + 1} further files {rest}."]
    return added
