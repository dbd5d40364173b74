"""Writing files that survive a power failure, and detecting a full disk."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from pathlib import Path

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class DiskFullError(OSError):
    """The disk is full; the message names the newest checkpoint and how to resume."""


def is_disk_full(error: OSError) -> bool:
    """Whether the disk or its quota is full."""
    return error.errno in FULL


def write_durably(path: Path, data: bytes) -> str:
    """Write a file and flush it to the disk; returns the sha256 of `data`."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest()


def flush_folder(folder: Path) -> None:
    """Flush the entries of `folder` to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(folder: Path) -> int:
    """The number of free bytes on the disk of `folder`."""
    return shutil.disk_usage(folder).free
