"""Malicious and damaged files."""

from __future__ import annotations

import io
import os
import pickle
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

BOMB_SIDE = 12_000


def png_bytes(shade: int = 0, side: int = 16) -> bytes:
    """The content of a small valid PNG."""
    stream = io.BytesIO()
    Image.new("RGB", (side, side), (shade * 20 % 256, 100, 50)).save(stream, "PNG")
    return stream.getvalue()


def bomb_png() -> bytes:
    """A PNG of 17 KB that decodes to 144 megapixels: one bit a pixel, all of them black."""
    packer = zlib.compressobj(9)
    row = bytes(1 + BOMB_SIDE // 8)
    packed = b"".join(packer.compress(row) for _ in range(BOMB_SIDE)) + packer.flush()
    header = struct.pack(">IIBBBBB", BOMB_SIDE, BOMB_SIDE, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", packed) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def polyglot() -> bytes:
    """An image that is also a web page and a zip."""
    stream = io.BytesIO(png_bytes() + b"<!doctype html><script>alert(document.cookie)</script>")
    stream.seek(0, io.SEEK_END)
    with zipfile.ZipFile(stream, "a") as archive:
        archive.writestr("secret.txt", "hidden")
    return stream.getvalue()


class Runs:
    """An object whose pickle writes a file when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self._trace}'",)


def pickled(trace: Path) -> list[bytes]:
    """Pickles that write the file `trace` when they are loaded: bare, and as torch saves them."""
    saved = io.BytesIO()
    torch.save({"lora_A": Runs(trace)}, saved)
    return [pickle.dumps(Runs(trace), protocol=protocol) for protocol in range(6)] + [saved.getvalue()]


def hostile_zips() -> dict[str, tuple[Callable[[Path], Path], str]]:
    """Malicious zips by name: a function that writes the zip to a path, and part of the error message."""
    return {
        "parent": (_with("cat/../../../../out.png"), "neither absolute nor"),
        "absolute": (_with("/tmp/out/cat.png"), "neither absolute nor"),
        "windows": (_with("C:/cat/out.png"), "neither absolute nor"),
        "backslash": (_with("cat\\..\\out.png"), "neither absolute nor"),
        "link": (_with("cat/link.png", b"/etc/passwd", stat.S_IFLNK | 0o777), "a link or a device"),
        "device": (_with("cat/null.png", b"", stat.S_IFCHR | 0o666), "a link or a device"),
        "thousand-fold": (_with("cat/zeros.png", bytes(20 * 2**20)), "100 times its packed size"),
        "too long": (_with("cat/long.png", os.urandom(26 * 2**20)), "Shrink the image"),
        "many": (_many, "at most 20,000 files"),
        "nested alone": (_nested, "contains no folder with images"),
        "no zip": (_plain, "is not a zip"),
    }


def _with(name: str, content: bytes | None = None, mode: int = stat.S_IFREG | 0o644) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        info = zipfile.ZipInfo("cat/" + "x" * (len(name) - 4) if "\\" in name else name)
        info.external_attr, info.compress_type = mode << 16, zipfile.ZIP_DEFLATED
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("cat/honest.png", png_bytes())
            archive.writestr(info, png_bytes() if content is None else content)
        if "\\" in name:
            # zipfile would write "/" instead of the backslash.
            path.write_bytes(path.read_bytes().replace(info.filename.encode(), name.encode()))
        return path

    return write


def _nested(path: Path) -> Path:
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("cat/honest.png", png_bytes())
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cat/inner.zip", inner.getvalue())
    return path


def _many(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for place in range(20_001):
            archive.writestr(f"cat/{place}.png", b"")
    return path


def _plain(path: Path) -> Path:
    path.write_bytes(png_bytes())
    return path
