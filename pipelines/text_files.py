"""Text files: reading those of the user, which may have a byte order mark, and writing our own."""

from __future__ import annotations

import codecs
import os
from pathlib import Path

from pipelines.errors import InputError

# UTF-32's mark begins with UTF-16's, so it comes first.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
REMEDY = "Save it as UTF-8 in your editor"


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, without its byte order mark and with "\\n" at the end of every line.

    Raises: InputError naming the file if it cannot be read or is not UTF-8, with the encoding that it may have instead.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"There is no file {str(path)!r}. Check the path.") from error
    except OSError as error:
        raise InputError(f"The file {str(path)!r} cannot be read: {error.strerror}.") from error
    return decode_text(content, repr(str(path)))


def decode_text(content: bytes, name: str) -> str:
    """Decode `content` as `read_text` does.

    Args:
        name: the file's name in error messages.
    Raises: InputError if `content` is not UTF-8.
    """
    encoding = next((encoding for mark, encoding in BYTE_ORDER_MARKS.items() if content.startswith(mark)), None)
    if encoding is not None:
        raise InputError(f"{name} is {encoding} text and must be UTF-8. {REMEDY}, or convert it: {_conversion(encoding)}.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{name} must be UTF-8 text, but has the byte 0x{content[error.start]:02X} in line {line}; it may be in a Windows "
            f"encoding such as cp1252. {REMEDY}, or convert it: {_conversion('CP1252')}."
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise InputError(
            f"{name} must be UTF-8 text, but has a NUL byte in line {line}; it may be UTF-16 or no text at all. {REMEDY}, or "
            f"convert it: {_conversion('UTF-16LE')}."
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def write_text_atomically(path: Path, text: str) -> None:
    """As `write_atomically`, in UTF-8.

    Characters that UTF-8 cannot encode, as in some file names, are escaped, so that the file is written all the same.
    """
    write_atomically(path, text.encode("utf-8", errors="backslashreplace"))


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside `path` and rename, so that a reader sees the old file or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _conversion(encoding: str) -> str:
    return f"`iconv -f {encoding} -t UTF-8 FILE > NEW`"
