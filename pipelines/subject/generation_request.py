"""A request for images, as the page and the API make it and the pipeline runs it. Imports no model library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from pipelines.built_in import portable_name
from pipelines.errors import InputError
from pipelines.subject.model_source import NAME, ModelSource

MAX_ADAPTERS, MAX_SIDE, SIDE_STEP = 6, 2048, 8
# diffusers' schedulers for SDXL by their usual names: the class, and what differs from the base model's settings.
SAMPLERS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "DPM++ 2M SDE Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++"}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "DDIM": ("DDIMScheduler", {}),
}
# What a value must be, by the beginning of pydantic's name for the error.
ALLOWED = {"int": "a whole number", "float": "a number", "finite": "a number", "string": "text", "tuple": "a width and a height"}


@dataclass(frozen=True)
class Sampling:
    """Settings of the diffusion sampling.

    Args:
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance scale; 1 disables guidance.
        negative_prompt: what the images should not show.
        resolution: side of the images in pixels, or their width and height, multiples of 8; None for the model's default.
        guidance_rescale: rescaling of guided predictions, in [0, 1]; 0.7 is usual for models with zero terminal SNR
            [Lin et al. 2023].
    """

    num_inference_steps: int = 25
    guidance_scale: float = 4.0
    negative_prompt: str = ""
    resolution: int | tuple[int, int] | None = None
    guidance_rescale: float = 0.0

    def __post_init__(self) -> None:
        if self.num_inference_steps < 1:
            raise InputError(f"num_inference_steps must be at least 1, got {self.num_inference_steps}.")
        if not self.guidance_scale >= 0:
            raise InputError(f"guidance_scale must be at least 0, got {self.guidance_scale}.")
        if any(side is not None and (side < SIDE_STEP or side % SIDE_STEP) for side in self.size):
            raise InputError(f"resolution must be a positive multiple of {SIDE_STEP}, got {self.resolution}.")
        if not 0 <= self.guidance_rescale <= 1:
            raise InputError(f"guidance_rescale must be in [0, 1], got {self.guidance_rescale}.")

    @property
    def size(self) -> tuple[int | None, int | None]:
        """Width and height; None for the model's default."""
        return self.resolution if isinstance(self.resolution, tuple) else (self.resolution, self.resolution)


class Checked(BaseModel):
    """Values that are checked on construction and then frozen.

    Raises: InputError naming the value, what is allowed, what was given, and the remedy.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InputError(self._sentence(error.errors()[0])) from error

    @classmethod
    def _sentence(cls, error: ErrorDetails) -> str:
        if not error["loc"]:
            return str(error["ctx"]["error"])
        kind, given, field = error["type"], error["input"], cls.model_fields[str(error["loc"][0])]
        if kind == "string_too_long":
            return f"{field.title} must have at most {error['ctx']['max_length']} characters, got {len(given)}. Shorten it."
        if kind in ("greater_than_equal", "less_than_equal"):
            lowest, highest = (getattr(part, end) for part, end in zip(field.metadata, ("ge", "le"), strict=True))
            return f"{field.title} must be in [{lowest}, {highest}], got {given}. Choose a value in this range."
        received = "nothing" if given is None else repr(given)[:60]
        allowed = next((words for start, words in ALLOWED.items() if kind.startswith(start)), error["msg"])
        return f"{field.title} must be {allowed}, got {received}. Enter one."


class BlockScales(Checked):
    """Factors on an adapter's scale in the down, mid and up blocks of the UNet."""

    down: Annotated[float, Field(title="Weight of the down blocks", ge=-2, le=2)] = 1.0
    mid: Annotated[float, Field(title="Weight of the mid block", ge=-2, le=2)] = 1.0
    up: Annotated[float, Field(title="Weight of the up blocks", ge=-2, le=2)] = 1.0


class ScaledAdapter(Checked):
    """An adapter and its scale.

    Args:
        reference: its id on the page.
        name: its title, which may contain user input.
        path: the argument of `pipelines.subject.adapters.load_adapter`.
        model: the group `model` of its run's options; None for an uploaded file.
        scale, blocks: the scale in all layers, and the factors on it in the blocks of the UNet.
    """

    reference: str
    name: str
    path: Path
    model: dict[str, Any] | None = None
    scale: Annotated[float, Field(title="Adapter weight", ge=-2, le=2)] = 1.0
    blocks: BlockScales = BlockScales()


class GenerationRequest(Checked):
    """Images to generate, checked.

    Args:
        prompt, negative_prompt: as in diffusers.
        adapters: the adapters to combine; none for the base model alone.
        count, seed: the number of images, and the seed of the first; each further image adds 1.
        size: width and height in pixels; None for the base model's default.
        sampler: one of `SAMPLERS`; None for the base model's own.
        steps, guidance_scale: denoising steps, and the scale of classifier-free guidance.
        with_base: also generate each seed with the base model alone.
    Raises: InputError naming the value, what is allowed and the remedy.
    """

    prompt: Annotated[str, Field(title="Prompt", max_length=2000)]
    negative_prompt: Annotated[str, Field(title="Negative prompt", max_length=2000)] = ""
    adapters: tuple[ScaledAdapter, ...] = ()
    count: Annotated[int, Field(title="Images", ge=1, le=16)] = 1
    seed: Annotated[int, Field(title="Seed", ge=0, le=2**32 - 1)] = 0
    size: Annotated[tuple[int, int] | None, Field(title="Image size")] = None
    sampler: Annotated[str | None, Field(title="Sampler")] = None
    steps: Annotated[int, Field(title="Steps", ge=1, le=150)] = 25
    guidance_scale: Annotated[float, Field(title="Guidance scale", ge=0, le=30)] = 4.0
    with_base: bool = False

    @model_validator(mode="after")
    def _check(self) -> GenerationRequest:
        if not self.prompt.strip():
            raise InputError("The prompt is empty. Describe the image.")
        if self.sampler is not None and self.sampler not in SAMPLERS:
            raise InputError(f"Sampler must be one of {', '.join(SAMPLERS)}, got {self.sampler!r}. Choose one of them.")
        if self.size is not None and not all(64 <= side <= MAX_SIDE and side % SIDE_STEP == 0 for side in self.size):
            got = " x ".join(map(str, self.size))
            raise InputError(f"Width and height must be multiples of {SIDE_STEP} in [64, {MAX_SIDE}], got {got}. Round them.")
        self._check_adapters()
        return self

    def _check_adapters(self) -> None:
        if len(self.adapters) > MAX_ADAPTERS:
            raise InputError(f"At most {MAX_ADAPTERS} adapters can be combined, got {len(self.adapters)}. Remove some.")
        references = [each.reference for each in self.adapters]
        twice = next((each for each in self.adapters if references.count(each.reference) > 1), None)
        if twice is not None:
            raise InputError(f"{twice.name} is chosen twice. Choose it once and raise its weight.")
        trained = [each for each in self.adapters if each.model is not None]
        for other in trained[1:]:
            if ModelSource.from_options(other.model) != ModelSource.from_options(trained[0].model):
                names = [f"{each.name} (of {portable_name(each.model[NAME])})" for each in (trained[0], other)]
                raise InputError(f"{' and '.join(names)} are for different base models. Combine adapters for one base model.")

    @property
    def seeds(self) -> range:
        """The seed of each image."""
        return range(self.seed, self.seed + self.count)

    @property
    def variants(self) -> tuple[bool, ...]:
        """Whether the adapters are used, for each of the images of one seed."""
        return (True, False) if self.with_base and self.adapters else (True,)

    @property
    def source(self) -> ModelSource:
        """The base model that the adapters name; the built-in one if none names any."""
        return ModelSource.from_options(next((each.model for each in self.adapters if each.model is not None), {}))

    @property
    def sampling(self) -> Sampling:
        """The settings of the diffusion sampling."""
        return Sampling(self.steps, self.guidance_scale, self.negative_prompt, self.size)

    def settings(self, seed: int, sampler: str, with_adapters: bool) -> dict[str, Any]:
        """The settings that an image's PNG file carries.

        Args:
            sampler: the name of the sampler that was used.
        """
        adapters = [each.model_dump(include={"name", "reference", "scale", "blocks"}) for each in self.adapters]
        used = {"sampler": sampler, "model": portable_name(self.source.pretrained_model_name_or_path)}
        chosen = {"prompt": self.prompt, "seed": seed, **asdict(self.sampling), **used}
        return {**chosen, "adapters": adapters if with_adapters else []}


@dataclass(frozen=True)
class GenerationProgress:
    """`done` of `total` denoising steps, and a short description of the current stage.

    Args:
        preview: the image so far, small; None if there is no new one.
        warnings: sentences about the adapters, which may contain user input.
    """

    words: str
    done: int
    total: int
    preview: Image.Image | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class GeneratedImage:
    """A finished image and its settings."""

    image: Image.Image
    settings: dict[str, Any]
