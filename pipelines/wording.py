"""English phrases for captions and messages."""

from __future__ import annotations

from collections.abc import Sequence


def with_article(noun: str) -> str:
    """`noun` after "a" or "an", by its first letter."""
    return f"{'an' if noun[:1].lower() in tuple('aeiou') else 'a'} {noun}"


def alternatives(words: Sequence[str]) -> str:
    """The words as "a, b or c"."""
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last
