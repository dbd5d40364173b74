"""The file name of model cards, and names and text as Markdown."""

from __future__ import annotations

import html
import re
from pathlib import Path

from pipelines.built_in import BUILT_IN, is_built_in

CARD = "README.md"
MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+|~-])")


def portable_name(model: str, private: bool = False) -> str:
    """The name of a local model without its folder; a hub name, or the name of the built-in model, as it is."""
    if is_built_in(model):
        return BUILT_IN
    if not Path(model).exists():
        return model
    return "BASE_MODEL" if private else Path(model).resolve().name


def as_text(words: str) -> str:
    """`words` as one line of Markdown, with all markup escaped."""
    return MARKDOWN.sub(r"\\\1", html.escape(" ".join(words.split()), quote=False))
