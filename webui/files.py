"""The file formats of an adapter: the programs that read each, and its size."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from training.runs.record import RunRecord
from training.subject.measured import adapter_at, saved_steps
from webui.adapters import last_step

Layout = Literal["compact", "full", "diffusers", "kohya"]
LAYOUTS: dict[Layout, tuple[str, str]] = {
    "compact": ("Compact", "The smallest: for this app and the NoRA Vision library, with exactly the same base model."),
    "full": ("Full", "Self-contained, for the PEFT library. NoRA adapters also need the NoRA Vision library."),
    "diffusers": ("For diffusers", "A standard LoRA file for the diffusers library and programs that use it."),
    "kohya": ("For ComfyUI and A1111", "A standard LoRA file for ComfyUI, AUTOMATIC1111, Forge and kohya's scripts."),
}


def layouts_of(record: RunRecord) -> dict[Layout, int | None]:
    """The layouts in which the run's adapters can be downloaded, and the size of each in bytes; None if not yet known."""
    sizes: dict[Layout, int | None] = {}
    for layout in LAYOUTS:
        size = _size(record, layout)
        if size is not None or not _is_missing(record, layout):
            sizes[layout] = size
    return sizes


def _is_missing(record: RunRecord, layout: Layout) -> bool:
    """Whether a layout without files cannot be made."""
    if layout == "compact":
        # A method without a compact layout saves every step in the full one.
        return _saves(record, "full")
    # An adapter that is no change of weights is not exported.
    return layout != "full" and (record.path / "adapter").is_dir()


def _saves(record: RunRecord, layout: Layout) -> bool:
    """Whether the run saves the adapters of its steps in `layout`."""
    steps = saved_steps(record)
    folders = [record.path / "adapter", *(adapter_at(record, step) for step in steps[-1:])]
    return any((folder / layout).is_dir() for folder in folders)


def _size(record: RunRecord, layout: Layout) -> int | None:
    folder = record.path / "adapter" / layout if layout in ("compact", "full") else record.path / layout
    if last_step(record) is None:
        steps = saved_steps(record)
        folder = adapter_at(record, steps[-1]) / layout if steps else folder
    return _bytes_in(folder)


def _bytes_in(folder: Path) -> int | None:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) or None if folder.is_dir() else None


def size_text(size: int | None) -> str:
    """A file size as text."""
    if size is None:
        return "created when downloaded"
    return f"{size / 2**20:.1f} MB" if size >= 2**20 else f"{max(1, round(size / 1024))} KB"
