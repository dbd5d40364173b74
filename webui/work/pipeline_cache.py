"""Image generation: keeps base models and adapters loaded, reports each denoising step, and can be cancelled between steps."""

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
MAX_IMAGES, MAX_STEPS, MAX_GUIDANCE, MAX_SCALE, MAX_PROMPT, MAX_SEED = 16, 150, 30.0, 2.0, 2000, 2**32 - 1
MODEL_NAME = "pretrained_model_name_or_path"
# Errors of diffusers and PEFT for a file in another format or for another model.
UNFIT = (ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError)


@dataclass(frozen=True)
class WeightedAdapter:
    """An adapter and its scale."""

    adapter: AdapterEntry
    scale: float = 1.0


@dataclass(frozen=True)
class GenerationJob:
    """Images to generate, checked.

    Args:
        prompt: the prompt of all images.
        adapters: the adapters to combine; none for the base model alone.
        seeds: one for each image.
        sampling: steps, guidance scale, negative prompt and resolution.
        with_base: also generate each seed with the base model alone.
    Raises: InputError for a value out of range, or adapters that cannot be combined.
    """

    prompt: str
    adapters: tuple[WeightedAdapter, ...] = ()
    seeds: tuple[int, ...] = (0,)
    sampling: Sampling = field(default_factory=Sampling)
    with_base: bool = False

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise InputError("The prompt is empty. Describe the image.")
        for name, text in (("prompt", self.prompt), ("negative prompt", self.sampling.negative_prompt)):
            if len(text) > MAX_PROMPT:
                raise InputError(f"The {name} must have at most {MAX_PROMPT} characters, got {len(text)}. Shorten it.")
        if not 1 <= len(self.seeds) <= MAX_IMAGES:
            raise InputError(f"The number of images must be in [1, {MAX_IMAGES}], got {len(self.seeds)}.")
        for seed in self.seeds:
            if not 0 <= seed <= MAX_SEED:
                raise InputError(f"The seed must be in [0, {MAX_SEED}], got {seed}.")
        if self.sampling.num_inference_steps > MAX_STEPS or not self.sampling.guidance_scale <= MAX_GUIDANCE:
            raise InputError(
                f"Use at most {MAX_STEPS} steps and a guidance scale of at most {MAX_GUIDANCE:g}, got "
                f"{self.sampling.num_inference_steps} and {self.sampling.guidance_scale:g}. Lower them."
            )
        self._check_adapters()

    def _check_adapters(self) -> None:
        if len(self.adapters) > MAX_ADAPTERS:
            raise InputError(f"At most {MAX_ADAPTERS} adapters can be combined, got {len(self.adapters)}. Remove some.")
        for each in self.adapters:
            if not (math.isfinite(each.scale) and abs(each.scale) <= MAX_SCALE):
                raise InputError(f"The weight of {each.adapter.name} must be in [-2, 2], got {each.scale:g}.")
        self._check_combination()

    def _check_combination(self) -> None:
        references = [each.adapter.reference for each in self.adapters]
        twice = next((each for each in self.adapters if references.count(each.adapter.reference) > 1), None)
        if twice is not None:
            raise InputError(f"{twice.adapter.name} is chosen twice. Choose it once and raise its weight.")
        models = [each.adapter for each in self.adapters if each.adapter.model is not None]
        for other in models[1:]:
            if ModelSource.from_options(other.model) != ModelSource.from_options(models[0].model):
                names = [f"{each.name} (of {portable_name(each.model[MODEL_NAME])})" for each in (models[0], other)]
                raise InputError(f"{' and '.join(names)} are for different base models. Combine adapters for one base model.")

    @property
    def source(self) -> ModelSource:
        """The unmodified base model that the adapters name; the built-in one if none names any."""
        model = next((each.adapter.model for each in self.adapters if each.adapter.model is not None), {})
        return ModelSource.from_options(model)

    def settings(self, seed: int, sampler: str, with_adapters: bool) -> dict[str, Any]:
        """The settings that an image's PNG file carries."""
        used = [{"name": each.adapter.name, "reference": each.adapter.reference, "scale": each.scale} for each in self.adapters]
        model = portable_name(self.source.pretrained_model_name_or_path)
        common = {**asdict(self.sampling), "sampler": sampler, "model": model, "adapters": used if with_adapters else []}
        return {"prompt": self.prompt, "seed": seed, **common}


@dataclass(frozen=True)
class GenerationProgress:
    """`done` of `total` denoising steps, and a short description of the current stage."""

    words: str
    done: int
    total: int


@dataclass(frozen=True)
class GeneratedImage:
    """A finished image and its settings."""

    image: Image.Image
    settings: dict[str, Any]


class GenerationCancelled(Exception):
    """Raised between two denoising steps to cancel; never leaves this module."""


@dataclass
class _Model:
    """A loaded base model and the names of the adapters on it, by the file's path and modification time at loading."""

    pipeline: StableDiffusionXLPipeline
    names: OrderedDict[tuple[str, int], str] = field(default_factory=OrderedDict)


class PipelineCache:
    """Runs one job at a time with models that stay loaded.

    Images are generated one by one, so that a seed gives the same image whatever the number of images.
    """

    def __init__(self) -> None:
        self._models: OrderedDict[ModelSource, _Model] = OrderedDict()
        # Not reentrant: a generator may be advanced and closed in different threads.
        self._device = threading.Lock()
        self._count = 0

    def generate(self, job: GenerationJob) -> Iterator[GenerationProgress | GeneratedImage]:
        """Generate all images of `job`: yields progress at each step, and each finished image.

        Closing the iterator cancels the job within one denoising step.
        Raises: InputError naming the model or adapter that cannot be used.
        """
        variants = [True, False] if job.with_base and job.adapters else [True]
        steps = job.sampling.num_inference_steps
        total = steps * len(job.seeds) * len(variants)
        yield GenerationProgress("Waiting for the device" if self._device.locked() else "Loading the model", 0, total)
        with self._device:
            model = self._ready(job)
            sampler = type(model.pipeline.scheduler).__name__.removesuffix("Scheduler")
            for index, (seed, adapted) in enumerate((seed, adapted) for seed in job.seeds for adapted in variants):
                words = f"Image {index + 1} of {len(job.seeds) * len(variants)}"
                yield GenerationProgress(words, index * steps, total)
                image = yield from self._image(model, job, seed, adapted, (words, index * steps, total))
                yield GeneratedImage(image, job.settings(seed, sampler, adapted))

    def merge(self, job: GenerationJob, path: Path, layout: Literal["diffusers", "kohya"]) -> Path:
        """Write the weighted sum of the adapters of `job` as one LoRA file in `layout` at `path` (.safetensors); exact.

        Raises: InputError if there is no adapter, or one of them has no low-rank form that can be added.
        """
        if not job.adapters:
            raise InputError("There is no adapter to merge. Choose one.")
        with self._device:
            model = self._ready(job)
            names = [self._name(model, each.adapter) for each in job.adapters]
            scales = dict(zip(names, (each.scale for each in job.adapters), strict=True))
            try:
                return export_lora(model.pipeline, path, names[0] if list(scales.values()) == [1] else scales, layout)
            except ValueError as error:
                raise InputError(f"These adapters cannot be merged into one file: {error}") from error

    def export(self, adapter: AdapterEntry, use: Callable[[StableDiffusionXLPipeline, str], Result]) -> Result:
        """Call `use` with a pipeline and the name of `adapter` on it; returns its result."""
        with self._device:
            model = self._ready(GenerationJob(adapter.name, (WeightedAdapter(adapter),)))
            return use(model.pipeline, self._name(model, adapter))

    def release(self) -> None:
        """Drop all models, so that training can use their memory."""
        with self._device:
            self._models.clear()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _image(
        self, model: _Model, job: GenerationJob, seed: int, adapted: bool, at: tuple[str, int, int]
    ) -> Generator[GenerationProgress, None, Image.Image]:
        words, before, total = at

        def generate_one(on_step: Callable[[int], None]) -> Image.Image:
            plain = without_adapters(model.pipeline) if model.names and not (adapted and job.adapters) else nullcontext()
            with plain, threads_for(model.pipeline):
                return next(generate(model.pipeline, [job.prompt], [seed], job.sampling, on_step=on_step))

        with _in_steps(generate_one) as (steps, result):
            for step in steps:
                yield GenerationProgress(words, before + min(step, job.sampling.num_inference_steps), total)
            return result()

    def _ready(self, job: GenerationJob) -> _Model:
        """The job's model with its adapters active at their scales."""
        model = self._loaded(job.source)
        with ExitStack() as on_failure:
            # A model on which loading an adapter failed half-way is not used again.
            on_failure.callback(self._models.pop, job.source, None)
            names = [self._name(model, each.adapter) for each in job.adapters]
            if names:
                model.pipeline.set_adapters(names, adapter_weights=[float(each.scale) for each in job.adapters])
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
        """The name of `adapter` on the pipeline; loads it if it is missing or its file has changed."""
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
        message = str(error).replace(str(adapter.path), adapter.name)
        raise InputError(f"{adapter.name} cannot be used: {message}") from error
    except InputError as error:
        raise InputError(str(error).replace(str(adapter.path), adapter.name)) from error
    except UNFIT as error:
        raise InputError(f"{adapter.name} does not fit this base model. Choose an adapter that was trained on it.") from error
    if not any(name in (getattr(component, "peft_config", None) or {}) for component in _components_of(pipeline)):
        raise InputError(f"{adapter.name} does not change this base model. Choose an adapter that was trained on it.")


def _components_of(pipeline: StableDiffusionXLPipeline) -> Sequence[torch.nn.Module]:
    return (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2)


@contextmanager
def _in_steps(
    work: Callable[[Callable[[int], None]], Result],
) -> Iterator[tuple[Iterator[int], Callable[[], Result]]]:
    """Run `work` in a thread; gives an iterator over the steps that it reports, and a function that returns its result.

    Leaving the context early cancels the work at its next step and waits for it.
    """
    steps: SimpleQueue[int | None] = SimpleQueue()
    stop = threading.Event()

    def on_step(step: int) -> None:
        if stop.is_set():
            raise GenerationCancelled
        steps.put(step)

    with ThreadPoolExecutor(1, thread_name_prefix="generation") as pool:
        future = pool.submit(work, on_step)
        future.add_done_callback(lambda _: steps.put(None))
        try:
            yield iter(steps.get, None), future.result
        finally:
            stop.set()


PIPELINE_CACHE = PipelineCache()
