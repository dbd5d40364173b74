"""Table cells that are safe to open in a spreadsheet."""

from __future__ import annotations

# Spreadsheets read a cell that begins with one of these as a formula.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def harmless(cell: str) -> str:
    """`cell`, prefixed with an apostrophe if a spreadsheet would read it as a formula."""
    return f"'{cell}" if cell.startswith(FORMULA_STARTS) else cell
