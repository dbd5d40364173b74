"""File names as text: on Linux, a name may have bytes that are not UTF-8 and cannot be written to UTF-8 output."""

from __future__ import annotations

import os


def display_path(path: str | os.PathLike[str]) -> str:
    r"""`path` as text that can be written as UTF-8.

    A byte that is not UTF-8, which Python keeps as a lone surrogate (PEP 383), becomes `\udcff`, as in `repr` and on stderr.
    Different names stay different, but only the original name opens the file.
    """
    return os.fspath(path).encode("utf-8", "backslashreplace").decode("utf-8")
