"""Image generation with base models and adapters that stay loaded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Literal

import diffusers
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from nora_vision import AdapterFileError, export_lora
from pipelines.adapter_method import tuner_layers
from pipelines.errors import InputError
from pipelines.subject.adapters import load_adapter, scale_warning, without_adapters
from pipelines.subject.generate import generate, preview, threads_for
from pipelines.subject.generation_request import (
    MAX_ADAPTERS,
    SAMPLERS,
    BlockScales,
    GeneratedImage,
    GenerationProgress,
    GenerationRequest,
    ScaledAdapter,
)
from pipelines.subject.model_source import ModelSource

MAX_MODELS = 2
# Parts of a generation, after each of which but the last there is a preview.
PARTS = 5
# Errors of diffusers and PEFT for a file in another format or for another model.
UNFIT = (ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError)


@dataclass
class _Model:
    """A loaded base model, the names of the adapters on it, by the file's path and modification time, and warnings by name."""

    pipeline: StableDiffusionXLPipeline
    names: OrderedDict[tuple[str, int], str] = field(default_factory=OrderedDict)
    warnings: dict[str, list[str]] = field(default_factory=dict)

    def warnings_about(self, name: str, adapter: ScaledAdapter) -> list[str]:
        """Sentences about an adapter at its scale."""
        scale = scale_warning(self.pipeline, name, adapter.scale)
        sentences = [*self.warnings[name], *([] if scale is None else [scale])]
        return [f"{adapter.name}: {each.replace(str(adapter.path), 'the file')}" for each in sentences]


class PipelineCache:
    """Generates with models that stay loaded; for one thread at a time.

    Images are generated one by one, so that a seed gives the same image whatever the number of images.
    """

    def __init__(self) -> None:
        self._models: OrderedDict[ModelSource, _Model] = OrderedDict()
        self._count = 0

    def generate(self, request: GenerationRequest, report: Callable[[GenerationProgress | GeneratedImage], None]) -> None:
        """Generate all images of `request`; reports the progress at each denoising step, and each finished image.

        An exception that `report` raises stops the generation.
        Raises: InputError naming the model or adapter that cannot be used.
        """
        images = [(seed, adapted) for seed in request.seeds for adapted in request.variants]
        total = request.steps * len(images)
        report(GenerationProgress("Loading the model", 0, total))
        model = self._ready(request)
        names = [self._name(model, each) for each in request.adapters]
        about = [model.warnings_about(name, each) for name, each in zip(names, request.adapters, strict=True)]
        report(GenerationProgress("Loading the model", 0, total, warnings=tuple(chain.from_iterable(about))))
        with _sampler(model.pipeline, request.sampler) as sampler:
            for index, (seed, adapted) in enumerate(images):
                begun = GenerationProgress(f"Image {index + 1} of {len(images)}", index * request.steps, total)
                image = _image(model, request, seed, adapted, begun, report)
                report(GeneratedImage(image, request.settings(seed, sampler, adapted)))

    def merge(self, request: GenerationRequest, path: Path, layout: Literal["diffusers", "kohya"]) -> Path:
        """Write the weighted sum of the adapters of `request` as one LoRA file in `layout` at `path` (.safetensors); exact.

        Raises: InputError if there is no adapter, or one of them has no low-rank form that can be added.
        """
        if not request.adapters:
            raise InputError("There is no adapter to merge. Choose one.")
        if any(each.blocks != BlockScales() for each in request.adapters):
            raise InputError("A merged file has one weight for each adapter. Set the weights of the blocks to 1.")
        model = self._ready(request)
        names = [self._name(model, each) for each in request.adapters]
        scales = dict(zip(names, (each.scale for each in request.adapters), strict=True))
        try:
            return export_lora(model.pipeline, path, names[0] if list(scales.values()) == [1] else scales, layout)
        except ValueError as error:
            raise InputError(f"These adapters cannot be merged into one file: {error}") from error

    def loaded(self, adapter: ScaledAdapter) -> tuple[StableDiffusionXLPipeline, str]:
        """A pipeline with `adapter`, and its name on it. Raises: InputError if it cannot be used."""
        model = self._ready(GenerationRequest(prompt=adapter.name, adapters=(adapter,)))
        return model.pipeline, self._name(model, adapter)

    def _ready(self, request: GenerationRequest) -> _Model:
        """The request's model with its adapters active at their scales."""
        model = self._loaded(request.source)
        with ExitStack() as on_failure:
            # A model on which loading an adapter failed half-way is not used again.
            on_failure.callback(self._models.pop, request.source, None)
            names = [self._name(model, each) for each in request.adapters]
            if names:
                model.pipeline.set_adapters(names, adapter_weights=[each.scale for each in request.adapters])
            for name, each in zip(names, request.adapters, strict=True):
                _scale_blocks(model.pipeline.unet, name, each)
            on_failure.pop_all()
        return model

    def _loaded(self, source: ModelSource) -> _Model:
        if source not in self._models:
            while len(self._models) >= MAX_MODELS:
                self._models.popitem(last=False)
            on_gpu = torch.cuda.is_available()
            dtype, device = (torch.float16, "cuda") if on_gpu else (torch.float32, "cpu")
            self._models[source] = _Model(source.load(dtype, device))
        self._models.move_to_end(source)
        return self._models[source]

    def _name(self, model: _Model, adapter: ScaledAdapter) -> str:
        """The name of `adapter` on the pipeline; loads it if it is missing or its file has changed."""
        key = (str(adapter.path), _newest_change(adapter))
        if key not in model.names:
            while len(model.names) >= MAX_ADAPTERS:
                _, oldest = model.names.popitem(last=False)
                model.pipeline.delete_adapters([oldest])
            self._count += 1
            name = f"adapter_{self._count}"
            model.warnings[name] = _load(model.pipeline, adapter, name)
            model.names[key] = name
        model.names.move_to_end(key)
        return model.names[key]


def _image(
    model: _Model,
    request: GenerationRequest,
    seed: int,
    adapted: bool,
    begun: GenerationProgress,
    report: Callable[[GenerationProgress], None],
) -> Image.Image:
    report(begun)
    every = max(1, request.steps // PARTS)

    def on_step(step: int, latents: torch.Tensor) -> None:
        image = preview(model.pipeline, latents) if step % every == 0 and step < request.steps else None
        report(replace(begun, done=begun.done + min(step, request.steps), preview=image))

    plain = without_adapters(model.pipeline) if model.names and not (adapted and request.adapters) else nullcontext()
    with plain, threads_for(model.pipeline):
        return next(generate(model.pipeline, [request.prompt], [seed], request.sampling, on_step=on_step))


def _newest_change(adapter: ScaledAdapter) -> int:
    files = [adapter.path] if adapter.path.is_file() else list(adapter.path.rglob("adapter_model.safetensors"))
    return max((file.stat().st_mtime_ns for file in files), default=0)


def _load(pipeline: StableDiffusionXLPipeline, adapter: ScaledAdapter, name: str) -> list[str]:
    """Load an adapter; returns sentences about it."""
    try:
        warnings = load_adapter(pipeline, adapter.path, name)
    except AdapterFileError as error:
        message = str(error).replace(str(adapter.path), adapter.name)
        raise InputError(f"{adapter.name} cannot be used: {message}") from error
    except InputError as error:
        raise InputError(str(error).replace(str(adapter.path), adapter.name)) from error
    except UNFIT as error:
        raise InputError(f"{adapter.name} does not fit this base model. Choose an adapter that was trained on it.") from error
    if not any(name in (getattr(component, "peft_config", None) or {}) for component in _components_of(pipeline)):
        raise InputError(f"{adapter.name} does not change this base model. Choose an adapter that was trained on it.")
    return warnings


def _scale_blocks(unet: torch.nn.Module, name: str, adapter: ScaledAdapter) -> None:
    """Scale an adapter in the blocks of the UNet. diffusers' weights per block leave layers outside of attention at 1."""
    for block, factor in adapter.blocks:
        if factor != 1:
            for layer_name, layer in tuner_layers(unet).items():
                if layer_name.startswith(f"{block}_block"):
                    layer.set_scale(name, adapter.scale * factor)


@contextmanager
def _sampler(pipeline: StableDiffusionXLPipeline, name: str | None) -> Iterator[str]:
    """Use one of `SAMPLERS`, or the model's own for None, within the context; gives its name."""
    before = pipeline.scheduler
    if name is not None:
        kind, changes = SAMPLERS[name]
        pipeline.scheduler = getattr(diffusers, kind).from_config(before.config, **changes)
    try:
        yield name or type(before).__name__.removesuffix("Scheduler")
    finally:
        pipeline.scheduler = before


def _components_of(pipeline: StableDiffusionXLPipeline) -> Sequence[torch.nn.Module]:
    return (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2)
