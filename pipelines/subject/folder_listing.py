"""The direct content of one folder: images, masks, folders, other files, and unreadable entries."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pipelines.errors import InputError
from pipelines.images import has_image_name
from pipelines.subject.folder_entries import FolderEntry
from pipelines.subject.folder_names import is_system_name, mask_or_condition

# The maximum number of folders that are searched for images in deeper folders.
MAX_WALKED = 2000


@dataclass(frozen=True)
class FolderListing:
    """The direct content of a folder, sorted by name.

    Args:
        path: the folder.
        images: image files that are not masks.
        masks: the kind and the image of each mask or conditioning image.
        folders: folders that are not hidden.
        files: other files.
        unusable: entries that are hidden or cannot be read.
    """

    path: Path
    images: tuple[Path, ...]
    masks: Mapping[Path, tuple[str, Path]]
    folders: tuple[Path, ...]
    files: tuple[Path, ...]
    unusable: tuple[FolderEntry, ...]


def check_folder(folder: str | Path, option: str = "--instance_data_dir") -> Path:
    """`folder` as a path.

    Args:
        option: the flag that gives it.
    Raises: InputError if there is no such folder, or it cannot be read.
    """
    path = Path(folder)
    try:
        is_folder, exists = path.is_dir(), path.exists()
        if is_folder:
            os.scandir(path).close()
    except OSError as error:
        raise InputError(f"The folder {str(path)!r} cannot be read ({error.strerror}). Change its permissions.") from error
    if exists and not is_folder:
        raise InputError(f"{option} must be a folder with images, but {str(path)!r} is a file. Give the folder that contains it.")
    if not is_folder:
        raise InputError(f"There is no folder {str(path)!r}. Give {option} a folder with images of the subject.")
    return path


def list_folder(folder: Path) -> FolderListing:
    """List the direct content of `folder`.

    Raises: OSError if it cannot be read.
    """
    images, folders, files, unusable = [], [], [], []
    for path in sorted(folder.iterdir()):
        kind = "system" if is_system_name(path.name) else _kind_of(path)
        if kind == "folder":
            folders.append(path)
        elif kind == "file":
            (images if has_image_name(path.name) else files).append(path)
        else:
            unusable.append(FolderEntry(path, "unused", kind))
    names = [path.name for path in images]
    pairs = {path: pair for path in images if (pair := mask_or_condition(path.name, names)) is not None}
    masks = {path: (kind, folder / image) for path, (kind, image) in pairs.items()}
    return FolderListing(
        folder, tuple(path for path in images if path not in masks), masks, tuple(folders), tuple(files), tuple(unusable)
    )


def first_image_below(folder: Path) -> Path | None:
    """An image anywhere below `folder`; None if the first `MAX_WALKED` folders hold none."""
    for path, folders, files in islice(os.walk(folder), MAX_WALKED):
        folders[:] = sorted(name for name in folders if not is_system_name(name))
        image = min(filter(has_image_name, files), default=None)
        if image is not None:
            return Path(path) / image
    return None


def _kind_of(path: Path) -> str:
    """ "folder", "file", or the reason why it is neither, as a key of `folder_entries.REASONS`."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return "broken_link" if error.errno in (errno.ENOENT, errno.ELOOP) else "unreadable"
    if stat.S_ISDIR(mode):
        return "folder"
    return "file" if stat.S_ISREG(mode) else "not_a_file"
