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


def free_bytes(folder: Path) -> int:
    """What is free on the disk that `folder` is on."""
    return shutil.disk_usage(folder).free
