"""From a generation request to images, and from an adapter to files for other programs."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from diffusers import StableDiffusionXLPipeline

from nora_vision.components import adapted_components
from pipelines.errors import InputError
from pipelines.subject.adapters import save_everywhere
from pipelines.subject.generation_request import GeneratedImage, GenerationProgress, GenerationRequest
from training.runs.record import RunRecord
from training.runs.run_files import Suggestion
from training.subject.finishing import SUGGESTED
from training.subject.measured import adapter_at
from webui.generation import LAYOUTS, GeneratedImages, Layout, find_adapter, last_step, reference_of
from webui.runs import read_cached
from webui.work.pipeline_cache import PIPELINE_CACHE
from webui.workspace import Workspace


def generate_images(workspace: Workspace, request: GenerationRequest) -> Iterator[GenerationProgress | Path]:
    """Generate images: yields progress at each step, and the file of each finished image among the user's images.

    Raises: InputError if an adapter or a value cannot be used.
    """
    images, events = GeneratedImages.of(workspace), PIPELINE_CACHE.generate(request)
    try:
        for event in events:
            yield images.add(event.image, event.settings) if isinstance(event, GeneratedImage) else event
    finally:
        # Now rather than at garbage collection, so that the device is free.
        events.close()


@contextmanager
def merged(request: GenerationRequest, layout: Literal["diffusers", "kohya"]) -> Iterator[Path]:
    """The adapters of the request merged into one LoRA file, which exists until the context ends.

    Raises: InputError if they cannot be merged.
    """
    with tempfile.TemporaryDirectory() as folder:
        yield PIPELINE_CACHE.merge(request, Path(folder) / f"merged-{layout}.safetensors", layout)


@contextmanager
def file_of(workspace: Workspace, run_id: str, step: int, layout: Layout) -> Iterator[Path]:
    """The adapter of a run at `step` in `layout`, a file or a zip of a folder, which exists until the context ends.

    Raises: InputError if there is no such adapter or layout.
    """
    if layout not in LAYOUTS:
        raise InputError(f"The layout must be one of {', '.join(LAYOUTS)}, got {layout!r}.")
    adapter = find_adapter(workspace, reference_of(run_id, step))
    record = workspace.run(run_id)
    with tempfile.TemporaryDirectory() as folder:
        path = _on_disk(record, step, layout)
        if path is None:

            def save(pipeline: StableDiffusionXLPipeline, name: str) -> None:
                components: dict[str, Any] = adapted_components(pipeline, name)
                save_everywhere(pipeline, components, Path(folder), "adapter", name)

            PIPELINE_CACHE.export(adapter, save)
            path = _in(Path(folder), layout)
        if path is None:
            raise InputError(f"This adapter has no file {LAYOUTS[layout][0]!r}. Download {LAYOUTS['full'][0]!r}, which all have.")
        yield _packed(path, Path(folder) / f"{run_id}-step-{step}-{layout}")


def _on_disk(record: RunRecord, step: int, layout: Layout) -> Path | None:
    if step == last_step(record):
        return _in(record.path, layout)
    suggestion = read_cached(Suggestion, record.path)
    if suggestion is not None and step == suggestion.step and (record.path / SUGGESTED).is_dir():
        return _in(record.path / SUGGESTED, layout)
    exported = adapter_at(record, step) / layout
    return exported if exported.is_dir() else None


def _in(folder: Path, layout: Layout) -> Path | None:
    """The layout's file or folder in one that `save_everywhere` wrote."""
    if layout in ("compact", "full"):
        return folder / "adapter" / layout if (folder / "adapter" / layout).is_dir() else None
    return next(iter(sorted((folder / layout).glob("*.safetensors"))), None)


def _packed(source: Path, named: Path) -> Path:
    """A copy of a file, or a zip of a folder, under its download name."""
    if source.is_file():
        return Path(shutil.copyfile(source, named.with_name(f"{named.name}.safetensors")))
    target = named.with_name(f"{named.name}.zip")
    # Weights do not compress.
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as packed:
        for file in sorted(path for path in source.rglob("*") if path.is_file()):
            packed.write(file, Path(named.name) / file.relative_to(source))
    return target
