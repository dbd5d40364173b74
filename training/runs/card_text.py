"""What every model card needs: its file, and names and words as Markdown text."""

from __future__ import annotations

import html
import re
from pathlib import Path

from pipelines.built_in import BUILT_IN_MODEL, is_built_in

CARD = "README.md"
MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+|~-])")


def portable_name(model: str, private: bool = False) -> str:
    """A local model's own name, without where it lies, the built-in one's place in the project; a hub name as it is."""
    if is_built_in(model):
        return f"assets/{BUILT_IN_MODEL.name}"
    if not Path(model).exists():
        return model
    return "BASE_MODEL" if private else Path(model).resolve().name


def as_text(words: str) -> str:
    """`words` as one line of Markdown that shows just them, whatever they hold."""
    return MARKDOWN.sub(r"\\\1", html.escape(" ".join(words.split()), quote=False))
