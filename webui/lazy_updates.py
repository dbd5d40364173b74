"""Updates of a screen's components that are sent only when their content has changed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr


@dataclass(frozen=True)
class LazyUpdate:
    """The update of one component, made only when needed.

    Args:
        key: differs whenever the content differs.
        make: returns the update.
    """

    key: Hashable
    make: Callable[[], Any]


def text(value: str) -> LazyUpdate:
    """HTML, hidden if empty."""
    return LazyUpdate(value, lambda: gr.HTML(value=value, visible=bool(value)))


def lazy_text(key: Hashable, make: Callable[[], str]) -> LazyUpdate:
    """HTML that is slow to make, hidden if empty."""

    def update() -> gr.HTML:
        value = make()
        return gr.HTML(value=value, visible=bool(value))

    return LazyUpdate(key, update)


def button(visible: bool, label: str | None = None) -> LazyUpdate:
    """A button, visible or hidden."""
    return LazyUpdate(
        (visible, label), lambda: gr.Button(visible=visible) if label is None else gr.Button(label, visible=visible)
    )


def frame(visible: bool) -> LazyUpdate:
    """An accordion, visible or hidden."""
    return LazyUpdate(visible, lambda: gr.Accordion(visible=visible))


def updates(now: Mapping[str, LazyUpdate], seen: Mapping[str, Hashable], names: Iterable[str]) -> list[Any]:
    """The updates of the outputs `names`; `gr.skip()` for those that the page shows already.

    Args:
        now: the current content.
        seen: the keys of what was sent before.
    """
    return [gr.skip() if name in seen and seen[name] == now[name].key else now[name].make() for name in names]


def keys(now: Mapping[str, LazyUpdate]) -> dict[str, Hashable]:
    """The keys of the current content, stored only to send less."""
    return {name: update.key for name, update in now.items()}
