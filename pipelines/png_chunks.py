"""PNG files without the texts that programs write into them.

ComfyUI and others keep megabytes of text in a PNG, which Pillow refuses as a whole, since compressed text may expand
without bound. The image needs none of it, so text chunks are left out before Pillow sees the file; colour profiles are
unpacked here, where their size is bounded.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import BinaryIO

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# The chunks that are looked into: texts and colours.
EXAMINED = frozenset({b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"cICP"})
# What tells the orientation where there is no eXIf chunk.
ORIENTATION_KEYWORDS = frozenset({"Raw profile type exif", "XML:com.adobe.xmp"})
# No kept text may be longer; Pillow's own limit.
MAX_TEXT = 2**20
# The largest profiles of printers have a few megabytes.
MAX_PROFILE = 2**24
_LENGTH_TYPE, _CHECKSUM = 8, 4


@dataclass
class PngParts:
    """What a PNG holds beside its pixels.

    Args:
        content: the file without its texts and its colour profile, as Pillow is to read it; the file itself if it has none.
        profile: the ICC profile, unpacked; b"" for one that is damaged, None for none.
        code_points: of the cICP chunk: primaries, transfer, matrix, range; None for none.
        texts: the keywords of those that were left in.
    """

    content: BinaryIO
    profile: bytes | None = None
    code_points: tuple[int, ...] | None = None
    texts: set[str] = field(default_factory=set)


def split_png(source: BinaryIO, keywords: Collection[str] = ()) -> PngParts:
    """Read the chunks of the PNG at `source` that are not pixels, without unpacking more than is needed.

    Args:
        source: the file, which can be sought in.
        keywords: texts to leave in, where they are at most `MAX_TEXT` long; orientations stay in any case.
    """
    parts, keywords = PngParts(source), {*keywords, *ORIENTATION_KEYWORDS}
    end, offset, ranges = source.seek(0, io.SEEK_END), len(SIGNATURE), [(0, len(SIGNATURE))]
    kind = b""
    while offset < end and kind != b"IEND":
        source.seek(offset)
        head = source.read(_LENGTH_TYPE)
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        # A file that is cut short goes on to Pillow as it is.
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
    """Whether a text has at most `MAX_TEXT` bytes, unpacked, and can be unpacked at all."""
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
    """The ICC profile in an iCCP chunk: name, zero byte, compression method 0, zlib stream; b"" for one that is damaged."""
    rest = data.partition(b"\0")[2]
    return (_unpacked(rest[1:], MAX_PROFILE) or b"") if rest[:1] == b"\0" else b""


def _unpacked(packed: bytes, limit: int) -> bytes | None:
    """The unpacked bytes; None if they are damaged or more than `limit`."""
    stream = zlib.decompressobj()
    try:
        content = stream.decompress(packed, limit)
    except zlib.error:
        return None
    return content if stream.eof else None
