"""The files of an adapter: which program each is for, and how large it is."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from training.runs.record import RunRecord
from training.subject.measured import adapter_at, kept_steps
from webui.adapters import last_step

Layout = Literal["compact", "full", "diffusers", "kohya"]
LAYOUTS: dict[Layout, tuple[str, str]] = {
    "compact": ("Compact", "For this app and for Python with NoRA Vision, on the very same base model. The smallest."),
    "full": ("Full", "For Python with the PEFT library; for NoRA with NoRA Vision too. Everything is inside."),
    "diffusers": ("For diffusers", "An ordinary LoRA file for Python with the diffusers library, and programs built on it."),
    "kohya": ("For ComfyUI and A1111", "An ordinary LoRA file for ComfyUI, AUTOMATIC1111, Forge and kohya's scripts."),
}


def layouts_of(record: RunRecord) -> dict[Layout, int | None]:
    """The layouts that the run's adapters can be had in, and the bytes of each; None where that is not known yet."""
    sizes: dict[Layout, int | None] = {}
    compact = record.options().get("adapter", {}).get("method") == "nora"
    for layout in LAYOUTS:
        if layout != "compact" or compact:
            sizes[layout] = _size(record, layout)
    return sizes


def _size(record: RunRecord, layout: Layout) -> int | None:
    folder = record.path / "adapter" / layout if layout in ("compact", "full") else record.path / layout
    if last_step(record) is None:
        steps = kept_steps(record)
        folder = adapter_at(record, steps[-1]) / layout if steps else folder
    return _bytes_in(folder)


def _bytes_in(folder: Path) -> int | None:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) or None if folder.is_dir() else None


def in_words(size: int | None) -> str:
    """A size for people."""
    if size is None:
        return "made when asked for"
    return f"{size / 2**20:.1f} MB" if size >= 2**20 else f"{max(1, round(size / 1024))} KB"
