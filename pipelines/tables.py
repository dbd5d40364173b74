"""Tables: cells that are safe to open in a spreadsheet, and Markdown tables, also in documents."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

# Spreadsheets read a cell that begins with one of these as a formula.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def harmless(cell: str) -> str:
    """`cell`, prefixed with an apostrophe if a spreadsheet would read it as a formula."""
    return f"'{cell}" if cell.startswith(FORMULA_STARTS) else cell


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [titles, ["---"] * len(titles), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def replace_parts(document: Path, parts: Mapping[str, str], command: str) -> None:
    """Replace parts of `document`, each between two comments that name it and the command that writes it.

    Args:
        parts: the text of each part by its name, ending with a line break.
    Raises: ValueError naming the comments that are missing.
    """
    text = document.read_text(encoding="utf-8")
    for name, part in parts.items():
        begin, end = f"<!-- begin: {name}, by {command} -->", f"<!-- end: {name} -->"
        pattern = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"{document} must contain {begin!r} and {end!r} once, on lines of their own.")
        text = pattern.sub(lambda _, new=f"{begin}\n{part}{end}": new, text)
    document.write_text(text, encoding="utf-8")
