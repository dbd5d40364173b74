"""Tables that a spreadsheet opens."""

from __future__ import annotations

# What makes a spreadsheet take a cell for a formula.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def harmless(cell: str) -> str:
    """A cell that is no formula to a spreadsheet."""
    return f"'{cell}" if cell.startswith(FORMULA_STARTS) else cell
