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
    for layout in LAYOUTS:
        size = _size(record, layout)
        # A method without a compact form keeps the full one of every step.
        if layout != "compact" or size is not None or not _keeps(record, "full"):
            sizes[layout] = size
    return sizes


def _keeps(record: RunRecord, layout: Layout) -> bool:
    """Whether the run keeps the adapters of its steps in `layout`."""
    steps = kept_steps(record)
    folders = [record.path / "adapter", *(adapter_at(record, step) for step in steps[-1:])]
    return any((folder / layout).is_dir() for folder in folders)


def _size(record: RunRecord, layout: Layout) -> int | None:
    folder = record.path / "adapter" / layout if layout in ("compact", "full") else record.path / layout
    if last_step(record) is None:
        steps = kept_steps(record)
        folder = adapter_at(record, steps[-1]) / layout if steps else folder
    return _bytes_in(folder)


def _bytes_in(folder: Path) -> int | None:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) or None if folder.is_dir() else None


def size_text(size: int | None) -> str:
    """A size for people."""
    if size is None:
        return "made when asked for"
    return f"{size / 2**20:.1f} MB" if size >= 2**20 else f"{max(1, round(size / 1024))} KB"
