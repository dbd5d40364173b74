"""Names of files as text: on Linux a file's name may hold bytes that are no UTF-8, which no UTF-8 output takes."""

from __future__ import annotations

import os


def display_path(path: str | os.PathLike[str]) -> str:
    r"""`path` as text that every UTF-8 output takes: a byte that is not UTF-8, which Python keeps as a lone surrogate (PEP 383),
    is spelled `\udcff`, as `repr` and stderr spell it.

    Different names stay different. The file itself is found by its true name alone.
    """
    return os.fspath(path).encode("utf-8", "backslashreplace").decode("utf-8")
