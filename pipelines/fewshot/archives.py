"""Read files inside a zip without unpacking it to disk. What the zip states about its members is checked, not trusted."""

from __future__ import annotations

import os
import stat
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pipelines.errors import InputError

# Python's zipfile does not bound the memory of the other decompressors.
METHODS = frozenset({zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED})
ENCRYPTED = 0x1
# Signature of a record in the zip's central directory, and the length of a member's header before its name.
DIRECTORY_SIGNATURE, HEADER_LENGTH = b"PK\x01\x02", 30
CHUNK = 2**20
# Everything that zipfile raises for a file that is damaged or not a zip.
UNREADABLE_ZIP = (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, OSError, struct.error)


@dataclass(frozen=True)
class ZipLimits:
    """Upper limits for the content of a zip.

    Args:
        members: number of files and folders.
        member_bytes: size of one file, unpacked.
        total_bytes: size of all files, unpacked.
        ratio: unpacked to packed size of one file; images are compressed already, so theirs is about 1.
        pixels: number of pixels of one image.
    """

    members: int = 100_000
    member_bytes: int = 25 * 2**20
    total_bytes: int = 8 * 2**30
    ratio: float = 100.0
    pixels: int = 40_000_000


@dataclass(frozen=True)
class ZippedFile:
    """A file in a zip.

    Args:
        name: the member's name.
        archive: the zip.
        max_bytes: limit of the unpacked size.
        max_pixels: see `pipelines.fewshot.sources.DatasetSource`.
    """

    name: str
    archive: Path
    max_bytes: int
    max_pixels: int | None

    def size(self) -> int:
        """The unpacked size that the zip states, in bytes; `content` checks it."""
        return self._member().file_size

    def content(self) -> bytes:
        """The bytes of the file.

        Raises: InputError naming the member if it is missing, damaged, or longer than stated or allowed.
        """
        return read_member(_opened(self.archive), self._member(), self.archive, self.max_bytes)

    def _member(self) -> zipfile.ZipInfo:
        try:
            return _opened(self.archive).getinfo(self.name)
        except KeyError as error:
            message = f"{str(self.archive)!r} no longer contains {self.name!r}. Restore the zip that the dataset was read from."
            raise InputError(message) from error


@dataclass(frozen=True)
class ZipContent:
    """The content of a zip: visible files sorted by name, the names of visible folders, and the names of hidden files."""

    files: tuple[ZippedFile, ...]
    folders: tuple[str, ...]
    hidden: tuple[str, ...] = ()


def read_zip(path: Path, limits: ZipLimits) -> ZipContent:
    """List the content of the zip at `path` after checking every member against `limits`.

    Raises: InputError naming the zip and the member that cannot be used.
    """
    if _directory_records(path) > limits.members:
        raise InputError(
            f"{str(path)!r} must contain at most {limits.members:,} files. Split it, or unpack it and use the folder."
        )
    members = _opened(path).infolist()
    _check_archive(path, members, limits)
    for entry in members:
        _check_member(path, entry, limits)
    visible = [entry for entry in members if is_visible(entry.filename)]
    names = sorted(entry.filename for entry in visible if not entry.is_dir())
    files = tuple(ZippedFile(name, path, limits.member_bytes, limits.pixels) for name in names)
    hidden = sorted(entry.filename for entry in members if not is_visible(entry.filename) and not entry.is_dir())
    return ZipContent(files, tuple(sorted({folder for entry in visible for folder in _folders(entry)})), tuple(hidden))


def is_visible(name: str) -> bool:
    """Whether no part of a path is hidden: none starts with a dot, and none is macOS's `__MACOSX`."""
    return not any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def read_member(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path, max_bytes: int) -> bytes:
    """The content of one member of the zip at `path`; at most `max_bytes` and one byte are unpacked.

    Raises: InputError naming the member if it is damaged, or longer than stated or allowed.
    """
    where = f"{entry.filename!r} in {str(path)!r}"
    try:
        with archive.open(entry) as stream:
            content = stream.read(max_bytes + 1)
    except (*UNREADABLE_ZIP, zlib.error, RuntimeError) as error:
        raise InputError(f"{where} cannot be unpacked ({error}). Create the zip again.") from error
    if len(content) > max_bytes or len(content) != entry.file_size:
        raise InputError(
            f"{where} must unpack to the {entry.file_size:,} bytes that the zip states, and at most {max_bytes:,}, got "
            f"{len(content):,}. Create the zip again."
        )
    return content


def _directory_records(path: Path) -> int:
    """An upper bound on the number of members, counted before zipfile creates an object for each."""
    overlap = len(DIRECTORY_SIGNATURE) - 1
    count, tail = 0, b""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            count += (tail + chunk).count(DIRECTORY_SIGNATURE)
            tail = (tail + chunk)[-overlap:]
    return count


def _opened(path: Path) -> zipfile.ZipFile:
    """The zip at `path`, opened once per process: forked processes would share the position in one open file."""
    state = path.stat()
    return _opened_as(path, state.st_mtime_ns, state.st_size, os.getpid())


@lru_cache(maxsize=4)
def _opened_as(path: Path, changed: int, size: int, process: int) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except UNREADABLE_ZIP as error:
        raise InputError(f"{str(path)!r} cannot be read as a zip ({error}). Create it again.") from error


def _check_archive(path: Path, members: Sequence[zipfile.ZipInfo], limits: ZipLimits) -> None:
    total = sum(entry.file_size for entry in members)
    if total > limits.total_bytes:
        raise InputError(
            f"{str(path)!r} must unpack to at most {limits.total_bytes:,} bytes, got {total:,}. Unpack it and use the folder."
        )
    name, times = Counter(entry.filename for entry in members).most_common(1)[0] if members else ("", 0)
    if times > 1:
        raise InputError(f"{str(path)!r} contains {name!r} {times} times. Create it again.")
    by_offset = sorted(members, key=lambda entry: entry.header_offset)
    ends = [*(entry.header_offset for entry in by_offset[1:]), path.stat().st_size]
    for entry, end in zip(by_offset, ends, strict=False):
        if entry.header_offset + HEADER_LENGTH + entry.compress_size > end:
            raise InputError(f"{entry.filename!r} in {str(path)!r} overlaps the data that follows it. Create the zip again.")


def _check_member(path: Path, entry: zipfile.ZipInfo, limits: ZipLimits) -> None:
    name, where = entry.filename, f"{entry.orig_filename!r} in {str(path)!r}"
    if not entry.orig_filename.isprintable() or {"", ".", ".."} & set(_parts(entry)) or "\\" in name or name[1:2] == ":":
        raise InputError(f"{where} must be a plain path within the zip, neither absolute nor with '..'. Create the zip again.")
    if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise InputError(f"{where} must be a file or a folder, not a link or a device. Create the zip without it.")
    if entry.flag_bits & ENCRYPTED:
        raise InputError(f"{where} is encrypted. Create the zip without a password.")
    if entry.compress_type not in METHODS:
        raise InputError(f"{where} must be stored or deflated, got method {entry.compress_type}. Create the zip again.")
    if entry.file_size > limits.member_bytes:
        raise InputError(f"{where} must have at most {limits.member_bytes:,} bytes, got {entry.file_size:,}. Shrink the image.")
    if entry.file_size > limits.ratio * max(entry.compress_size, 1):
        raise InputError(
            f"{where} must unpack to at most {limits.ratio:g} times its packed size, got {entry.file_size:,} bytes from "
            f"{entry.compress_size:,}. Save the image as JPEG, PNG or WebP."
        )


def _parts(entry: zipfile.ZipInfo) -> list[str]:
    return entry.filename.removesuffix("/").split("/")


def _folders(entry: zipfile.ZipInfo) -> list[str]:
    """The folders that a member implies: those on its path, and the member itself if it is a folder."""
    parts = _parts(entry)
    return ["/".join(parts[:depth]) for depth in range(1, len(parts) + entry.is_dir())]
