"""Generation requests to images, and adapters to the files that other programs load."""

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
from pipelines.subject.generate import Sampling
from training.runs.record import RunRecord
from training.subject.finishing import SUGGESTED
from training.subject.measured import adapter_at
from webui.adapters import SUGGESTION, adapter_called, last_step, reference_of
from webui.files import LAYOUTS, Layout
from webui.generated_images import GeneratedImages
from webui.generation_requests import GenerationRequest
from webui.views import RunView
from webui.work.pipeline_cache import MAX_IMAGES, STUDIO, GeneratedImage, GenerationJob, GenerationProgress, WeightedAdapter
from webui.workspace import Workspace


def order_for(workspace: Workspace, generation_request: GenerationRequest) -> GenerationJob:
    """The generation job of a request.

    Raises: InputError naming what is not there or cannot be used.
    """
    parts = tuple(
        WeightedAdapter(adapter_called(workspace, reference), strength) for reference, strength in generation_request.references
    )
    if not 1 <= generation_request.count <= MAX_IMAGES:
        raise InputError(f"The number of images must be from 1 to {MAX_IMAGES}, got {generation_request.count}.")
    resolution = None
    if generation_request.run_id is not None:
        resolution = RunView(workspace.run(generation_request.run_id)).options.get("data", {}).get("resolution")
    sampling = Sampling(generation_request.steps, generation_request.guidance, generation_request.negative_prompt, resolution)
    seeds = tuple(range(generation_request.seed, generation_request.seed + generation_request.count))
    return GenerationJob(generation_request.prompt, parts, seeds, sampling, generation_request.with_base)


def draw(workspace: Workspace, generation_request: GenerationRequest) -> Iterator[GenerationProgress | Path]:
    """Generate the requested images: progress at each step, and each image's file, kept among the user's images, as it is done.

    Raises: InputError naming what cannot be used.
    """
    images, events = GeneratedImages.of(workspace), STUDIO.draw(order_for(workspace, generation_request))
    try:
        for event in events:
            yield images.add(event.image, event.settings) if isinstance(event, GeneratedImage) else event
    finally:
        # At once, rather than when nobody remembers it any more.
        events.close()


@contextmanager
def baked(workspace: Workspace, generation_request: GenerationRequest, layout: Literal["diffusers", "kohya"]) -> Iterator[Path]:
    """The adapters of the request merged into one LoRA file, for as long as the context lasts.

    Raises: InputError if it cannot be one.
    """
    order = order_for(workspace, generation_request)
    with tempfile.TemporaryDirectory() as folder:
        run = generation_request.run_id or "adapters"
        yield STUDIO.bake(order, Path(folder) / f"{run}-mix-{layout}.safetensors", layout)


@contextmanager
def file_of(workspace: Workspace, run_id: str, step: int, layout: Layout) -> Iterator[Path]:
    """The adapter of a run at `step` in `layout`: a file, or a zip of a folder; for as long as the context lasts.

    Raises: InputError if it is not there.
    """
    if layout not in LAYOUTS:
        raise InputError(f"The layout must be one of {', '.join(LAYOUTS)}, got {layout!r}.")
    adapter = adapter_called(workspace, reference_of(run_id, step))
    record = workspace.run(run_id)
    with tempfile.TemporaryDirectory() as folder:
        path = _on_disk(record, step, layout)
        if path is None:

            def save(pipeline: StableDiffusionXLPipeline, name: str) -> None:
                components: dict[str, Any] = adapted_components(pipeline, name)
                save_everywhere(pipeline, components, Path(folder), "adapter", name)

            STUDIO.export(adapter, save)
            path = _in(Path(folder), layout)
        if path is None:
            raise InputError("This adapter has no compact form; its full form is small already. Download that.")
        yield _packed(path, Path(folder) / f"{run_id}-step-{step}-{layout}")


def _on_disk(record: RunRecord, step: int, layout: Layout) -> Path | None:
    if step == last_step(record):
        return _in(record.path, layout)
    if step == record.read_json(SUGGESTION).get("step") and (record.path / SUGGESTED).is_dir():
        return _in(record.path / SUGGESTED, layout)
    exported = adapter_at(record, step) / layout
    return exported if exported.is_dir() else None


def _in(folder: Path, layout: Layout) -> Path | None:
    """The layout's file or folder in one that `save_everywhere` wrote."""
    if layout in ("compact", "full"):
        return folder / "adapter" / layout if (folder / "adapter" / layout).is_dir() else None
    return next(iter(sorted((folder / layout).glob("*.safetensors"))), None)


def _packed(source: Path, named: Path) -> Path:
    """A copy of a file, or a zip of a folder, under the name that it is downloaded by."""
    if source.is_file():
        return Path(shutil.copyfile(source, named.with_name(f"{named.name}.safetensors")))
    target = named.with_name(f"{named.name}.zip")
    # Weights do not shrink.
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as packed:
        for file in sorted(path for path in source.rglob("*") if path.is_file()):
            packed.write(file, Path(named.name) / file.relative_to(source))
    return target
