"""Files in a zip, read in place: nothing is unpacked onto disk, and nothing that a zip says of itself is believed."""

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

# Python's zipfile bounds the memory of no other decompressor.
METHODS = frozenset({zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED})
ENCRYPTED = 0x1
# What a record of the zip's directory begins with, and the length of a member's header before its name.
DIRECTORY_SIGNATURE, HEADER_LENGTH = b"PK\x01\x02", 30
CHUNK = 2**20
# All that zipfile raises for what is none or is damaged.
UNREADABLE_ZIP = (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, OSError, struct.error)


@dataclass(frozen=True)
class ZipLimits:
    """What a zip may hold at most.

    Args:
        members: files and folders.
        member_bytes: of one image's file.
        total_bytes: of all files, unpacked.
        ratio: bytes unpacked to bytes packed, of one file; images, being compressed, hardly exceed 1.
        pixels: of one image.
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
        name: its member's name.
        archive: the zip.
        max_bytes: of it, unpacked.
        max_pixels: as of `pipelines.fewshot.sources.DatasetSource`.
    """

    name: str
    archive: Path
    max_bytes: int
    max_pixels: int | None

    def size(self) -> int:
        """Its bytes as the zip says, which `content` holds it to."""
        return self._member().file_size

    def content(self) -> bytes:
        """Its content.

        Raises: InputError naming the member if it is gone, damaged, or longer than it says or may be.
        """
        return read_member(_opened(self.archive), self._member(), self.archive, self.max_bytes)

    def _member(self) -> zipfile.ZipInfo:
        try:
            return _opened(self.archive).getinfo(self.name)
        except KeyError as error:
            message = f"{str(self.archive)!r} no longer holds {self.name!r}. Put back the zip that the set was read from."
            raise InputError(message) from error


@dataclass(frozen=True)
class ZipContent:
    """What a zip holds: its files that are not hidden, sorted by name, the names of their folders, and the hidden files'."""

    files: tuple[ZippedFile, ...]
    folders: tuple[str, ...]
    hidden: tuple[str, ...] = ()


def read_zip(path: Path, limits: ZipLimits) -> ZipContent:
    """What is in the zip at `path`, after all of it has been checked against `limits`.

    Raises: InputError naming the zip and the member that cannot be used.
    """
    if _directory_records(path) > limits.members:
        raise InputError(f"{str(path)!r} must hold at most {limits.members:,} files. Split it, or unpack it and give the folder.")
    members = _opened(path).infolist()
    _check_whole(path, members, limits)
    for entry in members:
        _check_member(path, entry, limits)
    seen = [entry for entry in members if is_shown(entry.filename)]
    names = sorted(entry.filename for entry in seen if not entry.is_dir())
    files = tuple(ZippedFile(name, path, limits.member_bytes, limits.pixels) for name in names)
    hidden = sorted(entry.filename for entry in members if not is_shown(entry.filename) and not entry.is_dir())
    return ZipContent(files, tuple(sorted({folder for entry in seen for folder in _folders(entry)})), tuple(hidden))


def is_shown(name: str) -> bool:
    """Whether a path within a set is to be looked at: no part of it is hidden, nor what a Mac adds to zips."""
    return not any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def read_member(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path, max_bytes: int) -> bytes:
    """The content of one member of the zip at `path`, of which no more is unpacked than it may have.

    Raises: InputError naming the member if it is damaged or longer than it says or may be.
    """
    where = f"{entry.filename!r} in {str(path)!r}"
    try:
        with archive.open(entry) as stream:
            content = stream.read(max_bytes + 1)
    except (*UNREADABLE_ZIP, zlib.error, RuntimeError) as error:
        raise InputError(f"{where} cannot be unpacked ({error}). Pack the zip again.") from error
    if len(content) > max_bytes or len(content) != entry.file_size:
        raise InputError(
            f"{where} says that it has {entry.file_size:,} bytes, of at most {max_bytes:,}, but unpacks to {len(content):,}. "
            "Pack the zip again."
        )
    return content


def _directory_records(path: Path) -> int:
    """At least as many as zipfile would make objects of, counted without making any."""
    overlap = len(DIRECTORY_SIGNATURE) - 1
    count, tail = 0, b""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            count += (tail + chunk).count(DIRECTORY_SIGNATURE)
            tail = (tail + chunk)[-overlap:]
    return count


def _opened(path: Path) -> zipfile.ZipFile:
    """The zip at `path`, opened once a process: forked ones would move each other's place in one open file."""
    state = path.stat()
    return _opened_as(path, state.st_mtime_ns, state.st_size, os.getpid())


@lru_cache(maxsize=4)
def _opened_as(path: Path, changed: int, size: int, process: int) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except UNREADABLE_ZIP as error:
        raise InputError(f"{str(path)!r} cannot be read as a zip ({error}). Pack it again.") from error


def _check_whole(path: Path, members: Sequence[zipfile.ZipInfo], limits: ZipLimits) -> None:
    total = sum(entry.file_size for entry in members)
    if total > limits.total_bytes:
        raise InputError(
            f"{str(path)!r} must unpack to at most {limits.total_bytes:,} bytes, got {total:,}. Unpack it and give the folder."
        )
    name, times = Counter(entry.filename for entry in members).most_common(1)[0] if members else ("", 0)
    if times > 1:
        raise InputError(f"{str(path)!r} holds {name!r} {times} times. Pack it again.")
    placed = sorted(members, key=lambda entry: entry.header_offset)
    ends = [*(entry.header_offset for entry in placed[1:]), path.stat().st_size]
    for entry, end in zip(placed, ends, strict=False):
        if entry.header_offset + HEADER_LENGTH + entry.compress_size > end:
            raise InputError(f"{entry.filename!r} in {str(path)!r} lies over what follows it. Pack the zip again.")


def _check_member(path: Path, entry: zipfile.ZipInfo, limits: ZipLimits) -> None:
    name, where = entry.filename, f"{entry.orig_filename!r} in {str(path)!r}"
    if not entry.orig_filename.isprintable() or {"", ".", ".."} & set(_parts(entry)) or "\\" in name or name[1:2] == ":":
        raise InputError(f"{where} must be a plain path within the zip: neither absolute nor with '..'. Pack it again.")
    if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise InputError(f"{where} is neither a file nor a folder, but a link or a device. Pack the zip without it.")
    if entry.flag_bits & ENCRYPTED:
        raise InputError(f"{where} is encrypted. Pack the zip without a password.")
    if entry.compress_type not in METHODS:
        raise InputError(f"{where} must be stored or deflated, got method {entry.compress_type}. Pack the zip again.")
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
    """The folders that a member says are there: those on its path, and itself if it is one."""
    parts = _parts(entry)
    return ["/".join(parts[:depth]) for depth in range(1, len(parts) + entry.is_dir())]
