"""Generates images: keeps base models and adapters loaded, reports each step, and stops within one when cancelled."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal, TypeVar

import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from nora_vision import AdapterFileError, export_lora
from pipelines.errors import InputError
from pipelines.subject.adapters import load_adapter, without_adapters
from pipelines.subject.generate import Sampling, generate, threads_for
from pipelines.subject.model_source import ModelSource
from training.subject.model_card import portable_name
from webui.adapters import AdapterEntry

Result = TypeVar("Result")
MAX_MODELS, MAX_ADAPTERS = 2, 6
MAX_IMAGES, MAX_STEPS, MAX_GUIDANCE, MAX_STRENGTH, MAX_PROMPT, MAX_SEED = 16, 150, 30.0, 2.0, 2000, 2**32 - 1
MODEL_NAME = "pretrained_model_name_or_path"
# All that diffusers and PEFT raise for a file that is none of theirs, or of another model.
UNFIT = (ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError)


@dataclass(frozen=True)
class WeightedAdapter:
    """An adapter in a mix, and how strong it is there."""

    adapter: AdapterEntry
    strength: float = 1.0


@dataclass(frozen=True)
class GenerationJob:
    """What to generate.

    Args:
        prompt: what the images show.
        parts: adapters, mixed; none for the base model alone.
        seeds: one for each image.
        with_base: also draw what the base model makes of each seed.
    Raises: InputError naming what cannot be used.
    """

    prompt: str
    parts: tuple[WeightedAdapter, ...] = ()
    seeds: tuple[int, ...] = (0,)
    sampling: Sampling = field(default_factory=Sampling)
    with_base: bool = False

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise InputError("The prompt is empty. Write what the image is to show.")
        for name, text in (("prompt", self.prompt), ("negative prompt", self.sampling.negative_prompt)):
            if len(text) > MAX_PROMPT:
                raise InputError(f"The {name} must have at most {MAX_PROMPT} characters, got {len(text)}. Shorten it.")
        if not 1 <= len(self.seeds) <= MAX_IMAGES:
            raise InputError(f"The number of images must be from 1 to {MAX_IMAGES}, got {len(self.seeds)}.")
        for seed in self.seeds:
            if not 0 <= seed <= MAX_SEED:
                raise InputError(f"The seed must be from 0 to {MAX_SEED}, got {seed}.")
        if self.sampling.num_inference_steps > MAX_STEPS or not self.sampling.guidance_scale <= MAX_GUIDANCE:
            raise InputError(f"At most {MAX_STEPS} steps and a guidance of at most {MAX_GUIDANCE:g} are drawn. Lower them.")
        self._check_parts()

    def _check_parts(self) -> None:
        if len(self.parts) > MAX_ADAPTERS:
            raise InputError(f"At most {MAX_ADAPTERS} adapters can be mixed, got {len(self.parts)}. Leave some out.")
        for part in self.parts:
            if not (math.isfinite(part.strength) and abs(part.strength) <= MAX_STRENGTH):
                raise InputError(f"The adapter weight of {part.adapter.name} must be from -2 to 2, got {part.strength:g}.")
        self._check_mixture()

    def _check_mixture(self) -> None:
        references = [part.adapter.reference for part in self.parts]
        twice = next((part for part in self.parts if references.count(part.adapter.reference) > 1), None)
        if twice is not None:
            raise InputError(f"{twice.adapter.name} is chosen twice. Choose it once, with a higher weight.")
        models = [part.adapter for part in self.parts if part.adapter.model is not None]
        for other in models[1:]:
            if ModelSource.from_options(other.model) != ModelSource.from_options(models[0].model):
                names = [f"{each.name} (of {portable_name(each.model[MODEL_NAME])})" for each in (models[0], other)]
                raise InputError(f"{' and '.join(names)} are adapters of different base models. Mix those of one model.")

    @property
    def source(self) -> ModelSource:
        """The base model, whole, as others have it who load the file; the built-in one where no adapter says."""
        model = next((part.adapter.model for part in self.parts if part.adapter.model is not None), {})
        return ModelSource.from_options(model)

    def settings(self, seed: int, sampler: str, with_adapters: bool) -> dict[str, Any]:
        """What an image's file says of how it was made."""
        used = [
            {"name": part.adapter.name, "reference": part.adapter.reference, "strength": part.strength} for part in self.parts
        ]
        model = portable_name(self.source.pretrained_model_name_or_path)
        common = {**asdict(self.sampling), "sampler": sampler, "model": model, "adapters": used if with_adapters else []}
        return {"prompt": self.prompt, "seed": seed, **common}


@dataclass(frozen=True)
class GenerationProgress:
    """How far the drawing is: `done` of `total` denoising steps, and in words what is being done."""

    words: str
    done: int
    total: int


@dataclass(frozen=True)
class GeneratedImage:
    """A finished image and its settings."""

    image: Image.Image
    settings: dict[str, Any]


class GenerationCancelled(Exception):
    """The generation was cancelled; never raised to callers of the pipeline cache."""


@dataclass
class _Model:
    """A loaded base model, and the adapters on it: their name there by what their files were when they were loaded."""

    pipeline: StableDiffusionXLPipeline
    names: OrderedDict[tuple[str, int], str] = field(default_factory=OrderedDict)


class PipelineCache:
    """Draws one order at a time with models that stay loaded.

    Images are drawn one by one, so that a seed gives the same image however many are drawn with it.
    """

    def __init__(self) -> None:
        self._models: OrderedDict[ModelSource, _Model] = OrderedDict()
        # Not a reentrant one: a generator's steps, and its end, may run in different threads.
        self._device = threading.Lock()
        self._count = 0

    def draw(self, order: GenerationJob) -> Iterator[GenerationProgress | GeneratedImage]:
        """Draw all images of `order`: progress at each step, and each image as it is done.

        Closing the iterator ends the drawing within a denoising step.
        Raises: InputError naming the model or adapter that cannot be used.
        """
        variants = [True, False] if order.with_base and order.parts else [True]
        steps = order.sampling.num_inference_steps
        total = steps * len(order.seeds) * len(variants)
        yield GenerationProgress("Waiting for the device" if self._device.locked() else "Loading the model", 0, total)
        with self._device:
            model = self._ready(order)
            sampler = type(model.pipeline.scheduler).__name__.removesuffix("Scheduler")
            for index, (seed, adapted) in enumerate((seed, adapted) for seed in order.seeds for adapted in variants):
                words = f"Image {index + 1} of {len(order.seeds) * len(variants)}"
                yield GenerationProgress(words, index * steps, total)
                image = yield from self._image(model, order, seed, adapted, (words, index * steps, total))
                yield GeneratedImage(image, order.settings(seed, sampler, adapted))

    def bake(self, order: GenerationJob, path: Path, layout: Literal["diffusers", "kohya"]) -> Path:
        """Write the mix of `order` as one LoRA file of layout `layout` at `path`, a .safetensors file; exact.

        Raises: InputError if there is nothing to write, or a part of it cannot be added to others.
        """
        if not order.parts:
            raise InputError("There is no adapter to merge. Choose one.")
        with self._device:
            model = self._ready(order)
            names = [self._name(model, part.adapter) for part in order.parts]
            strengths = dict(zip(names, (part.strength for part in order.parts), strict=True))
            try:
                return export_lora(model.pipeline, path, names[0] if list(strengths.values()) == [1] else strengths, layout)
            except ValueError as error:
                raise InputError(f"These adapters cannot be merged into one file: {error}") from error

    def export(self, adapter: AdapterEntry, use: Callable[[StableDiffusionXLPipeline, str], Result]) -> Result:
        """What `use` makes of a pipeline and the name of `adapter` on it."""
        with self._device:
            model = self._ready(GenerationJob(adapter.name, (WeightedAdapter(adapter),)))
            return use(model.pipeline, self._name(model, adapter))

    def release(self) -> None:
        """Forget all models, so that their memory is free for a training."""
        with self._device:
            self._models.clear()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _image(
        self, model: _Model, order: GenerationJob, seed: int, adapted: bool, at: tuple[str, int, int]
    ) -> Generator[GenerationProgress, None, Image.Image]:
        words, before, total = at

        def draw(on_step: Callable[[int], None]) -> Image.Image:
            plain = without_adapters(model.pipeline) if model.names and not (adapted and order.parts) else nullcontext()
            with plain, threads_for(model.pipeline):
                return next(generate(model.pipeline, [order.prompt], [seed], order.sampling, on_step=on_step))

        with _in_steps(draw) as (steps, result):
            for step in steps:
                yield GenerationProgress(words, before + min(step, order.sampling.num_inference_steps), total)
            return result()

    def _ready(self, order: GenerationJob) -> _Model:
        """The order's model with its adapters on, at their strengths."""
        model = self._loaded(order.source)
        with ExitStack() as on_failure:
            # What half an adapter may have left there is not drawn with.
            on_failure.callback(self._models.pop, order.source, None)
            names = [self._name(model, part.adapter) for part in order.parts]
            if names:
                model.pipeline.set_adapters(names, adapter_weights=[float(part.strength) for part in order.parts])
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

    def _name(self, model: _Model, adapter: AdapterEntry) -> str:
        """The name on the pipeline of `adapter`, which is loaded if it is not there, or has changed since."""
        key = (str(adapter.path), _newest_change(adapter))
        if key not in model.names:
            while len(model.names) >= MAX_ADAPTERS:
                _, oldest = model.names.popitem(last=False)
                model.pipeline.delete_adapters([oldest])
            self._count += 1
            name = f"adapter_{self._count}"
            _load(model.pipeline, adapter, name)
            model.names[key] = name
        model.names.move_to_end(key)
        return model.names[key]


def _newest_change(adapter: AdapterEntry) -> int:
    files = [adapter.path] if adapter.path.is_file() else list(adapter.path.rglob("adapter_model.safetensors"))
    return max((file.stat().st_mtime_ns for file in files), default=0)


def _load(pipeline: StableDiffusionXLPipeline, adapter: AdapterEntry, name: str) -> None:
    try:
        load_adapter(pipeline, adapter.path, name)
    except AdapterFileError as error:
        said = str(error).replace(str(adapter.path), adapter.name)
        raise InputError(f"{adapter.name} cannot be used: {said}") from error
    except InputError as error:
        raise InputError(str(error).replace(str(adapter.path), adapter.name)) from error
    except UNFIT as error:
        raise InputError(f"{adapter.name} does not fit this base model. Choose an adapter that was trained on it.") from error
    if not any(name in (getattr(part, "peft_config", None) or {}) for part in _parts_of(pipeline)):
        raise InputError(f"{adapter.name} changes nothing of this base model. Choose an adapter that was trained on it.")


def _parts_of(pipeline: StableDiffusionXLPipeline) -> Sequence[torch.nn.Module]:
    return (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2)


@contextmanager
def _in_steps(
    work: Callable[[Callable[[int], None]], Result],
) -> Iterator[tuple[Iterator[int], Callable[[], Result]]]:
    """Run `work` in a thread: the steps that it tells, as they come, and then its result.

    Leaving the context before that makes the work stop at its next step, and waits for it.
    """
    steps: SimpleQueue[int | None] = SimpleQueue()
    stop = threading.Event()

    def on_step(step: int) -> None:
        if stop.is_set():
            raise GenerationCancelled
        steps.put(step)

    with ThreadPoolExecutor(1, thread_name_prefix="drawing") as pool:
        future = pool.submit(work, on_step)
        future.add_done_callback(lambda _: steps.put(None))
        try:
            yield iter(steps.get, None), future.result
        finally:
            stop.set()


STUDIO = PipelineCache()
