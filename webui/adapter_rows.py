"""Parts of a screen that are sent again only when they have changed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr


@dataclass(frozen=True)
class AdapterRow:
    """A part of a screen.

    Args:
        key: differs whenever what is shown differs.
        make: the update that shows it; called only where that is needed.
    """

    key: Hashable
    make: Callable[[], Any]


def text(value: str) -> AdapterRow:
    """HTML, out of sight where there is none."""
    return AdapterRow(value, lambda: gr.HTML(value=value, visible=bool(value)))


def made_text(key: Hashable, make: Callable[[], str]) -> AdapterRow:
    """HTML that takes long to make, out of sight where there is none."""

    def update() -> gr.HTML:
        value = make()
        return gr.HTML(value=value, visible=bool(value))

    return AdapterRow(key, update)


def button(visible: bool, label: str | None = None) -> AdapterRow:
    """A button, there or not."""
    return AdapterRow(
        (visible, label), lambda: gr.Button(visible=visible) if label is None else gr.Button(label, visible=visible)
    )


def frame(visible: bool) -> AdapterRow:
    """A frame that opens, there or not."""
    return AdapterRow(visible, lambda: gr.Accordion(visible=visible))


def updates(now: Mapping[str, AdapterRow], seen: Mapping[str, Hashable], names: Iterable[str]) -> list[Any]:
    """The updates of the outputs `names`, none for what the page shows already.

    Args:
        now: what is to be shown.
        seen: the keys of what was sent before.
    """
    return [gr.skip() if name in seen and seen[name] == now[name].key else now[name].make() for name in names]


def keys(now: Mapping[str, AdapterRow]) -> dict[str, Hashable]:
    """What is to be remembered of what is shown: only to send less, never to decide by."""
    return {name: part.key for name, part in now.items()}
