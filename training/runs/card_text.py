"""The file name of model cards, and names and text as Markdown."""

from __future__ import annotations

import html
import re

CARD = "README.md"
MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+|~-])")


def as_text(words: str) -> str:
    """`words` as one line of Markdown, with all markup escaped."""
    return MARKDOWN.sub(r"\\\1", html.escape(" ".join(words.split()), quote=False))
