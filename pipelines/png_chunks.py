"""Removal of text chunks from PNG files.

ComfyUI and other programs write megabytes of text into PNG files. Pillow refuses such files, as compressed text can expand
without limit. The image does not need the text, so it is removed before Pillow reads the file. Colour profiles are decompressed
here, with a limit on their size.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import BinaryIO

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# The chunks that are examined: texts and colours.
EXAMINED = frozenset({b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"cICP"})
# Texts that hold the orientation if there is no eXIf chunk.
ORIENTATION_KEYWORDS = frozenset({"Raw profile type exif", "XML:com.adobe.xmp"})
# Longer texts are removed; this is Pillow's own limit.
MAX_TEXT = 2**20
# Profiles of printers have up to a few megabytes.
MAX_PROFILE = 2**24
_LENGTH_TYPE, _CHECKSUM = 8, 4


@dataclass
class PngParts:
    """A PNG file without texts, and its colour information.

    Args:
        content: the file without its texts and its colour profile, for Pillow; the original file if it has neither.
        profile: the decompressed ICC profile; b"" if it is damaged, None if there is none.
        code_points: the cICP chunk's primaries, transfer, matrix and range; None if there is none.
        texts: the keywords of the texts that were kept.
    """

    content: BinaryIO
    profile: bytes | None = None
    code_points: tuple[int, ...] | None = None
    texts: set[str] = field(default_factory=set)


def split_png(source: BinaryIO, keywords: Collection[str] = ()) -> PngParts:
    """Remove the texts from a PNG and extract its colour information, without decompressing more than is needed.

    Args:
        source: the file, which must be seekable.
        keywords: of the texts to keep beside those with the orientation, if they have at most `MAX_TEXT` bytes.
    """
    parts, keywords = PngParts(source), {*keywords, *ORIENTATION_KEYWORDS}
    end, offset, ranges = source.seek(0, io.SEEK_END), len(SIGNATURE), [(0, len(SIGNATURE))]
    kind = b""
    while offset < end and kind != b"IEND":
        source.seek(offset)
        head = source.read(_LENGTH_TYPE)
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        # A truncated file is passed on to Pillow as it is.
        after = min(offset + _LENGTH_TYPE + length + _CHECKSUM, end)
        if kind not in EXAMINED or _is_kept(parts, kind, source.read(min(length, MAX_PROFILE)), keywords):
            ranges.append((offset, after - offset))
        else:
            parts.content = io.BytesIO()
        offset = after
    if parts.content is not source:
        for start, count in ranges:
            source.seek(start)
            parts.content.write(source.read(count))
        parts.content.seek(0)
    return parts


def _is_kept(parts: PngParts, kind: bytes, data: bytes, keywords: Collection[str]) -> bool:
    if kind == b"iCCP":
        parts.profile = _profile(data)
        return False
    if kind == b"cICP":
        parts.code_points = tuple(data)
        return True
    keyword = data.partition(b"\0")[0].decode("latin-1")
    if keyword not in keywords or keyword in parts.texts or not _is_short(kind, data):
        return False
    parts.texts.add(keyword)
    return True


def _is_short(kind: bytes, data: bytes) -> bool:
    """Whether a text can be decompressed and has at most `MAX_TEXT` bytes then."""
    if len(data) > MAX_TEXT:
        return False
    rest = data.partition(b"\0")[2]
    if kind == b"zTXt":
        packed = rest[1:]
    elif kind == b"iTXt" and rest[:1] == b"\1":
        # Compression flag and method, then language and translated keyword, each ending in a zero byte.
        packed = rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    else:
        return True
    return _unpacked(packed, MAX_TEXT) is not None


def _profile(data: bytes) -> bytes:
    """The ICC profile in an iCCP chunk (name, zero byte, compression method 0, zlib stream); b"" if it is damaged."""
    rest = data.partition(b"\0")[2]
    return (_unpacked(rest[1:], MAX_PROFILE) or b"") if rest[:1] == b"\0" else b""


def _unpacked(packed: bytes, limit: int) -> bytes | None:
    """The decompressed bytes; None if they are damaged or more than `limit`."""
    stream = zlib.decompressobj()
    try:
        content = stream.decompress(packed, limit)
    except zlib.error:
        return None
    return content if stream.eof else None
