"""Checks that output paths can be written, to be made before long work starts; they leave no files behind."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from pipelines.errors import InputError
from pipelines.wording import alternatives

OUTPUT_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def check_output_folder(path: str | Path, option: str) -> None:
    """Check that `path` is a folder in which files can be written, or can become one.

    Args:
        option: the option that gives the folder, for error messages.
    Raises: InputError naming the option, the path and what is wrong.
    """
    try:
        folder = _nearest_existing(Path(path))
        if not folder.is_dir():
            raise InputError(f"{option} must be a folder, but {str(folder)!r} is a file. Name another folder.")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"Nothing can be written to {option} {str(path)!r}: {error.strerror}. Name another folder.") from error


def check_output_file(path: str | Path, option: str, suffixes: Sequence[str]) -> None:
    """Check that `path` can be written and has one of the `suffixes`, such as ".csv", in upper or lower case.

    Raises: InputError naming the option, the path and what is wrong.
    """
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        raise InputError(f"{option} must be a {alternatives(suffixes)} file, got {str(path)!r}. Give a name with this suffix.")
    try:
        if path.is_dir():
            raise InputError(f"{option} must be a file, but {str(path)!r} is a folder. Name a file in it.")
        if path.exists():
            with path.open("ab"):
                return
    except OSError as error:
        raise InputError(f"{option} {str(path)!r} cannot be written: {error.strerror}. Name another file.") from error
    check_output_folder(path.parent, f"the folder of {option}")


def _nearest_existing(path: Path) -> Path:
    return next((folder for folder in (path, *path.parents) if folder.exists()), Path())
