"""What a user hands in: images, zips of class folders and adapter files, of which nothing else gets in.

An image is recognised by its content, checked against limits before it is decoded, and written anew under a name of ours
(`webui.incoming`), so that neither metadata nor anything that hides in a file comes along. One that cannot be used is refused
in a sentence, and the others are added.
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
from webui.image_datasets import SET, Entry, add_class, changing, place_for
from webui.incoming import UploadedImage, check_size, display_name, read_upload, reencoded
from webui.workspace import Workspace

File = TypeVar("File")
MAX_SETS = 500
MAX_IMAGES = 20_000
MAX_USER_BYTES = 8 * 2**30
ZIP_LIMITS = ZipLimits(members=MAX_IMAGES, total_bytes=2 * 2**30)
# No more is kept in memory before it is written.
BATCH = 8
# A file of adapters for SDXL with text encoders at rank 64.
MAX_ADAPTER_BYTES = 512 * 2**20
# Hidden, so that it is no image set's id.
ADAPTERS = ".adapters"
# More sentences than this are summed up in one.
SENTENCES = 20


@dataclass
class Added:
    """What became of an upload.

    Args:
        names: what the images are called by now: their files, below the set's folder.
        refused: a plain sentence for each file that was not taken; it holds users' words, to be escaped wherever it is shown.
        notes: the same for what was taken and its owner should know: that of an animation the first frame is read, or how a zip
            was read that came with a split.
        parts: of a split that a zip came with, by the images' names; empty where it came with none.
    """

    names: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    parts: dict[str, Part] = field(default_factory=dict)


class FullError(InputError):
    """The user's room is used up, so that no further image fits either."""


def add_images(folder: Path, files: Sequence[str | Path], class_folder: str | None = None) -> Added:
    """Add images to a set; those that cannot be used are refused and keep none of the others out.

    Args:
        folder: the set's.
        files: uploaded files.
        class_folder: the class that they are added to; None for none.
    Raises: InputError if the set or the class is gone.
    """
    added = Added()
    named = ((display_name(file), Path(file)) for file in files)
    try:
        _add(folder, _readable(named, read_upload, added), class_folder, added)
    except FullError as error:
        added.refused.append(str(error))
    return summed_up(added)


def add_zip(folder: Path, file: str | Path) -> Added:
    """Add the class folders of a zip to a set: each folder that holds images is a class, called as the folder.

    Where its folders or a split.json split it, the classes are those of the split, and the parts are told.

    Args:
        folder: the set's.
        file: the uploaded zip.
    Raises: InputError if it is none, or anything in it is such as no honest zip has, or it can be read in two ways; then
        nothing of it is added.
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
    return summed_up(added)


def check_adapter(file: str | Path) -> Path:
    """Check that a file is a LoRA of SDXL: safetensors by its content, of a kind that is read, with values all finite.

    Returns: the file.
    Raises: InputError saying what is wrong with it; nothing in it was run.
    """
    # Here, since it loads torch.
    from webui.work import adapter_files

    path, name = Path(file), display_name(file)
    size = path.stat().st_size
    if size > MAX_ADAPTER_BYTES:
        raise InputError(f"{name} has {size / 2**20:.0f} MB, and an adapter may have {MAX_ADAPTER_BYTES // 2**20} MB at most.")
    adapter_files.check_tensors(path, name)
    return path


def left_out(file: str | Path) -> list[str]:
    """What of an adapter that passes `check_adapter` is left out, in sentences with users' words in them."""
    from webui.work import adapter_files

    return adapter_files.left_out(Path(file), display_name(file))


def add_adapter(workspace: Workspace, file: str | Path) -> Path:
    """Copy an adapter among the user's files, under a name of ours; returns the copy.

    Raises: InputError as `check_adapter`, or if there is no room.
    """
    checked = check_adapter(file)
    _check_room(workspace.sets, 0, checked.stat().st_size)
    folder = workspace.sets / ADAPTERS
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / f"{secrets.token_hex(8)}.safetensors"
    beside = copy.with_suffix(".part")
    try:
        shutil.copyfile(checked, beside)
        copy.with_suffix(".txt").write_text(display_name(file), encoding="utf-8")
        beside.replace(copy)
    finally:
        beside.unlink(missing_ok=True)
    return copy


def adapters(workspace: Workspace) -> list[tuple[str, Path]]:
    """The adapters that the user added, newest first: what each is called (to be escaped) and where it lies."""
    files = sorted((workspace.sets / ADAPTERS).glob("*.safetensors"), key=lambda path: path.stat().st_mtime, reverse=True)
    return [(path.with_suffix(".txt").read_text(encoding="utf-8"), path) for path in files]


def _add(folder: Path, images: Iterator[tuple[str, UploadedImage]], class_folder: str | None, added: Added) -> None:
    """Write images into a set as they come; others may change it between two batches."""
    while batch := list(islice(images, BATCH)):
        with changing(folder) as content:
            home = content if class_folder is None else content.class_in(class_folder)
            _check_room(folder.parent, len(batch), sum(len(image.content) for _, image in batch))
            for name, image in batch:
                path = place_for(folder, home, image.suffix)
                beside = path.with_name(f".{path.name}")
                beside.write_bytes(image.content)
                os.replace(beside, path)
                home.images.append(Entry(path.relative_to(folder).as_posix(), display_name(name)))
                added.names.append(home.images[-1].file)
                added.notes += image.notes


def _readable(
    named: Iterable[tuple[str, File]], read: Callable[[File, str], UploadedImage], added: Added
) -> Iterator[tuple[str, UploadedImage]]:
    """The images that can be used, each with its name; the others are refused."""
    for name, file in named:
        try:
            yield name, read(file, name)
        except InputError as error:
            added.refused.append(str(error))


def _read_zipped(entry: ZippedFile, name: str) -> UploadedImage:
    check_size(entry.size(), name)
    return reencoded(entry.content(), name)


def _class_folders(path: Path, added: Added) -> dict[tuple[str, Part | None], list[ZippedFile]]:
    """The images of a zip by their class, and their part where the zip is split; what is no image is refused."""
    name = display_name(path)
    try:
        if not zipfile.is_zipfile(path):
            raise InputError(f"{name} is not a zip. Pack one folder of images for each class into a zip.")
        groups = _grouped(name, read_zip(path, ZIP_LIMITS), added)
    except InputError as error:
        # The page does not tell where the server keeps uploads.
        raise InputError(str(error).replace(repr(str(path)), name)) from error
    if not groups:
        raise InputError(f"{name} holds no folder with images. Pack one folder of images for each class into a zip.")
    return groups


def _grouped(name: str, content: ZipContent, added: Added) -> dict[tuple[str, Part | None], list[ZippedFile]]:
    images = [file for file in content.files if _is_usable(file, added)]
    layout = arrange(name, [file.name for file in images], content.folders)
    split = split_file(content.files, layout)
    parts = _parts(name, layout, split, added)
    stray = [file.name for file in content.files if PurePosixPath(file.name).name.casefold() == SPLIT_FILE and file != split]
    added.refused += [f"{other} does not lie beside the class folders and was left out." for other in stray]
    groups: dict[tuple[str, Part | None], list[ZippedFile]] = {}
    for file in images:
        key = layout.classes[file.name] if parts else PurePosixPath(file.name).parent.name
        groups.setdefault((key, parts.get(file.name)), []).append(file)
    return groups


def _is_usable(file: ZippedFile, added: Added) -> bool:
    """Whether a file of a zip is an image in a folder; what is not is refused, but for a split.json, which is read."""
    path = PurePosixPath(file.name)
    if path.suffix.lower() == ".zip":
        added.refused.append(f"{file.name} is a zip within the zip and was left out. Unpack it first, or add it by itself.")
    elif path.suffix.lower() not in UPLOAD_SUFFIXES:
        if path.name.casefold() != SPLIT_FILE:
            added.refused.append(f"{file.name} is not a {listed(UPLOAD_FORMATS)} image and was left out.")
    elif len(path.parts) < 2:
        added.refused.append(f"{file.name} lies in no class's folder and was left out. Put it into the folder of its class.")
    else:
        return True
    return False


def _parts(name: str, layout: FolderLayout, split: ZippedFile | None, added: Added) -> Mapping[str, Part]:
    """The parts of the split that a zip came with, by the names in it; none where it came with none."""
    parts, notes = parts_of_set(name, layout, split)
    if parts:
        check_spellings(name, layout.classes, parts)
        added.notes += [*layout.notes, *notes, "Its images for the test are only ever tested on, all others only learned from."]
    return with_test(parts)


def _check_room(sets: Path, images: int, size: int) -> None:
    """Raise FullError if the user's folder `sets` has no room for so many more images and bytes."""
    held = [entry.stat().st_size for entry in sets.rglob("*") if entry.is_file()]
    if len(list(sets.glob(f"*/{SET}"))) > MAX_SETS:
        raise FullError(f"You have {MAX_SETS} sets of images, and no more are kept. Delete one that you no longer need.")
    if images and len(held) + images > MAX_IMAGES:
        raise FullError(f"You have {MAX_IMAGES:,} images, and no more are kept. Delete a set that you no longer need.")
    if sum(held) + size > MAX_USER_BYTES:
        raise FullError(f"Your files take {MAX_USER_BYTES >> 30} GB, and no more is kept. Delete a set that you no longer need.")


def summed_up(added: Added) -> Added:
    """`added` with at most `SENTENCES` sentences on what was refused, and on what was taken."""
    for sentences, rest in ((added.refused, "were left out for like reasons"), (added.notes, "were read in like ways")):
        if len(sentences) > SENTENCES:
            sentences[SENTENCES - 1 :] = [f"{len(sentences) - SENTENCES + 1} further files {rest}."]
    return added
