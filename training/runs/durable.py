"""Files that survive a power cut: written beside, flushed to the disk and renamed; and what to say when the disk is full."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from pathlib import Path

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class DiskFullError(OSError):
    """The disk is full; the message says what is safe and how to go on."""


def is_disk_full(error: OSError) -> bool:
    """Whether `error` says that the disk, or the quota on it, is full."""
    return error.errno in FULL


def write_durably(path: Path, data: bytes) -> str:
    """Write a file and flush it to the disk; returns the sha256 of `data`."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest()


def flush_folder(folder: Path) -> None:
    """Flush to the disk which files `folder` holds."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text_atomically(path: Path, text: str) -> None:
    """Write beside `path` and rename, so that a reader sees the old file or the new one.

    What is not UTF-8, such as part of a file's name, is escaped: a report is not lost for a name in it.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def free_bytes(folder: Path) -> int:
    """What is free on the disk that `folder` is on."""
    return shutil.disk_usage(folder).free
