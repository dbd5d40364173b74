"""Generate images from prompts, with or without adapters, as PNG files that carry their settings.

python -m pipelines.subject.generate --adapter runs/RUN --prompt "a photo of sks toy in the snow" --output_dir images
"""

from __future__ import annotations

import functools
import logging
import math
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from pipelines.deprecated_flags import current_arguments
from pipelines.errors import InputError
from pipelines.help_format import HelpFormatter
from pipelines.images import as_grid, save_image
from pipelines.lazy_modules import no_grad, torch
from pipelines.output_paths import OUTPUT_SUFFIXES, check_output_file, check_output_folder
from pipelines.prompt_syntax import command_line_warnings
from pipelines.subject.generation_request import Sampling
from pipelines.subject.model_source import FIELDS, ModelSource, source_of
from pipelines.text_files import read_text

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

logger = logging.getLogger(__name__)
# In parameters of the UNet: the built-in model has 7 million, SDXL 2,600 million.
SMALL_MODEL = 100_000_000
# In parameters of the autoencoder: SDXL's has 84 million.
SMALL_VAE = 5_000_000
# Red, green and blue of each of the four latent channels.
LATENT_RGB = (
    (0.3651, 0.4232, 0.4341),
    (-0.2533, -0.0042, 0.1068),
    (0.1076, 0.1111, -0.0362),
    (-0.3165, -0.2492, -0.2188),
)
LATENT_RGB_OFFSET = (0.1084, -0.0175, -0.0011)
SHEET_PROMPTS = (
    "a large red star in the snow",
    "a large blue circle on the grass",
    "a yellow crescent at night",
    "a large green heart on the beach",
    "a purple ring in the forest",
    "a large white cross on a brick wall",
    "an orange triangle in the water",
    "a large pink diamond on a wooden floor",
    "a large blue striped square in the snow",
    "a red dotted circle on the grass",
    "a large green checkered diamond",
    "a large orange striped star at night",
    "a large white dotted heart in the forest",
    "a yellow checkered square on the beach",
    "a large purple striped ring on a wooden floor",
    "a large black dotted triangle in the snow",
)


@contextmanager
def threads_for(pipeline: StableDiffusionXLPipeline) -> Iterator[None]:
    """Generate on the CPU with a number of threads that suits the model: a single one for small models.

    The built-in model's layers finish before a second thread has started. In a server, where threads compete, waiting for
    them would take most of the time.
    """
    before = torch.get_num_threads()
    is_small = sum(weight.numel() for weight in pipeline.unet.parameters()) < SMALL_MODEL
    torch.set_num_threads(1 if is_small else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def generate(
    pipeline: StableDiffusionXLPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling,
    batch_size: int = 8,
    on_step: Callable[[int, torch.Tensor], None] | None = None,
) -> Iterator[Image.Image]:
    """Generate one image for each prompt and its seed; the noise depends on the seed alone.

    Args:
        batch_size: images at once.
        on_step: called after each denoising step of a batch with the number of completed steps and the latents
            (batch_size, channels, height, width) that it predicts for the images; an exception that it raises stops the
            generation.
    """
    pipeline.set_progress_bar_config(disable=True)
    width, height = sampling.size
    predicted: deque[torch.Tensor] = deque(maxlen=1)

    def step_ended(_: StableDiffusionXLPipeline, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step(step + 1, predicted[-1])
        return tensors

    for first in range(0, len(prompts), batch_size):
        batch = list(prompts[first : first + batch_size])
        with nullcontext() if on_step is None else _recorded_predictions(pipeline.scheduler, predicted):
            images = pipeline(
                batch,
                # With None, SDXL zeroes the negative embeddings; an empty text would be encoded.
                negative_prompt=[sampling.negative_prompt] * len(batch) if sampling.negative_prompt else None,
                num_inference_steps=sampling.num_inference_steps,
                guidance_scale=sampling.guidance_scale,
                guidance_rescale=sampling.guidance_rescale,
                height=height,
                width=width,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[first : first + batch_size]],
                callback_on_step_end=None if on_step is None else step_ended,
            ).images
        yield from images


@contextmanager
def _recorded_predictions(scheduler: SchedulerMixin, predicted: deque[torch.Tensor]) -> Iterator[None]:
    """Append the clean latents that each step of the scheduler predicts to `predicted`, of any shape, within the context."""
    take_step = scheduler.step

    # The pipeline passes its generator to a scheduler whose step has such a parameter.
    @functools.wraps(take_step)
    def step(prediction: torch.Tensor, timestep: torch.Tensor, latents: torch.Tensor, *args: Any, **named: Any) -> Any:
        # The UNet's input, also for schedulers whose latents grow with the noise level sigma = sqrt((1 - a) / a).
        noisy = scheduler.scale_model_input(latents, timestep)
        result = take_step(prediction, timestep, latents, *args, **named)
        if hasattr(scheduler, "sigmas"):
            signal = 1 / (1 + float(scheduler.sigmas[scheduler.step_index - 1]) ** 2)
        else:
            signal = float(scheduler.alphas_cumprod[int(timestep)])
        predicted.append(clean_latents(noisy, prediction, signal, scheduler.config.prediction_type))
        return result

    scheduler.step = step
    try:
        yield
    finally:
        del scheduler.step


def clean_latents(noisy: torch.Tensor, prediction: torch.Tensor, signal: float, kind: str) -> torch.Tensor:
    """The latents x without noise, from z = sqrt(a) x + sqrt(1 - a) e and a prediction.

    x = (z - sqrt(1 - a) e) / sqrt(a) = sqrt(a) z - sqrt(1 - a) v,  with  v = sqrt(a) e - sqrt(1 - a) x  [Salimans & Ho 2022]

    Args:
        noisy: z, of any shape.
        prediction: e, v or x, of the same shape.
        signal: a, in [0, 1].
        kind: "epsilon", "v_prediction" or "sample".
    """
    of_signal, of_noise = math.sqrt(signal), math.sqrt(1 - signal)
    if kind == "epsilon":
        return (noisy - of_noise * prediction) / of_signal
    return of_signal * noisy - of_noise * prediction if kind == "v_prediction" else prediction


@no_grad
def preview(pipeline: StableDiffusionXLPipeline, latents: torch.Tensor) -> Image.Image:
    """A small image of the first of `latents` (batch_size, 4, height, width) without noise.

    A small autoencoder decodes them; otherwise each latent is a pixel, by a linear fit of SDXL's autoencoder [ComfyUI].
    """
    latents, vae = latents[:1], pipeline.vae
    if sum(weight.numel() for weight in vae.parameters()) < SMALL_VAE:
        return pipeline.image_processor.postprocess(vae.decode(latents / vae.config.scaling_factor).sample)[0]
    factors, offset = (torch.tensor(values, device=latents.device) for values in (LATENT_RGB, LATENT_RGB_OFFSET))
    pixels = torch.einsum("chw,cp->hwp", latents[0].float(), factors) + offset
    return Image.fromarray((255 * (pixels / 2 + 0.5).clamp(0, 1)).byte().cpu().numpy())


def contact_sheet(
    pipeline: StableDiffusionXLPipeline,
    prompts: tuple[str, ...],
    columns: int = 4,
    steps: int = 25,
    guidance_scale: float = 4.0,
    seed: int = 0,
) -> Image.Image:
    """One image a prompt in a grid of `columns`, the n-th from a generator seeded with `seed` + n."""
    seeds = range(seed, seed + len(prompts))
    return as_grid(list(generate(pipeline, prompts, seeds, Sampling(steps, guidance_scale), len(prompts))), columns)


@dataclass
class GenerationOptions:
    """Options of `python -m pipelines.subject.generate`."""

    prompt: list[str] | None = field(
        default=None, metadata={"help": "One or more prompts. Default: sixteen prompts for the built-in model."}
    )
    prompts_file: str | None = field(default=None, metadata={"help": "A text file with one prompt a line, instead of --prompt."})
    negative_prompt: str = field(default="", metadata={"help": "What the images should not show."})
    adapter: list[str] = field(
        default_factory=list,
        metadata={"help": "Run directories, native adapter folders, PEFT or diffusers folders, or LoRA .safetensors files."},
    )
    scale: list[float] = field(
        default_factory=lambda: [1.0], metadata={"help": "Scale of each adapter; 0 disables it. One value applies to all."}
    )
    pretrained_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "SDXL base model: a hub name, a folder or a .safetensors file. Default: the base model of the adapter's run, "
            "else the built-in one."
        },
    )
    pretrained_vae_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub name or folder of another autoencoder. Default: that of the adapter's run."}
    )
    revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a base model on the hub. Default: the run's."}
    )
    variant: str | None = field(
        default=None, metadata={"help": "Variant of the model's files, such as fp16. Default: the run's."}
    )
    single_file_config: str | None = field(
        default=None,
        metadata={"help": "For a base model in one file: a model with the same configuration. Default: the run's."},
    )
    prediction_type: Literal["epsilon", "v_prediction"] | None = field(
        default=None,
        metadata={"help": "What the base model predicts. Default: the run's setting, else the model's configuration."},
    )
    rescale_betas_zero_snr: bool | None = field(
        default=None,
        metadata={
            "nargs": "?",
            "const": True,
            "help": "Whether the base model was trained with zero terminal SNR. Default: the run's setting, else the model's "
            "configuration.",
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of the first image; increases by 1 for each further image."})
    num_images_per_prompt: int = field(default=1, metadata={"help": "Images for each prompt."})
    num_inference_steps: int = field(default=25, metadata={"help": "Denoising steps."})
    guidance_scale: float = field(default=4.0, metadata={"help": "Classifier-free guidance scale; 1 disables guidance."})
    guidance_rescale: float = field(
        default=0.0,
        metadata={"help": "Guidance rescale in [0, 1]; 0.7 is usual for models with zero terminal SNR."},
    )
    resolution: int | None = field(default=None, metadata={"help": "Side of the images in pixels. Default: the model's."})
    output_dir: str = field(default="images", metadata={"help": "Folder for the images."})
    grid: str | None = field(default=None, metadata={"help": "Also write a grid of all images to this file."})
    columns: int = field(default=4, metadata={"help": "Columns of the grid."})

    def __post_init__(self) -> None:
        if self.prompt is not None and self.prompts_file is not None:
            raise InputError("Give --prompt or --prompts_file, not both.")
        if len(self.scale) not in (1, len(self.adapter)):
            raise InputError(f"scale must be one value or one for each of {len(self.adapter)} adapters, got {len(self.scale)}.")
        for name in ("num_images_per_prompt", "columns"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.seed < 0:
            raise InputError(f"seed must be at least 0, got {self.seed}.")

    def prompts(self) -> list[str]:
        """The prompts, each repeated `num_images_per_prompt` times.

        Raises: InputError if the file of prompts is missing, unreadable or empty.
        """
        prompts = list(self.prompt or SHEET_PROMPTS)
        if self.prompts_file is not None:
            if not Path(self.prompts_file).is_file():
                raise InputError(f"The prompts_file {self.prompts_file!r} does not exist. Check the path.")
            prompts = [line.strip() for line in read_text(self.prompts_file).splitlines() if line.strip()]
            if not prompts:
                raise InputError(f"The prompts_file {self.prompts_file!r} holds no prompt. Write one prompt per line.")
        return [prompt for prompt in prompts for _ in range(self.num_images_per_prompt)]

    def source(self) -> ModelSource:
        """The base model: the one given, else that of the first adapter's run, else the built-in one.

        Raises: InputError for a run of another task, or one whose options cannot be read.
        """
        return source_of(self.adapter, {name: getattr(self, name) for name in FIELDS})

    def check_outputs(self) -> None:
        """Check that the output folder and the grid file can be written.

        Raises: InputError if one of them cannot.
        """
        check_output_folder(self.output_dir, "--output_dir")
        if self.grid is not None:
            check_output_file(self.grid, "--grid", OUTPUT_SUFFIXES)


def load_adapters(pipeline: StableDiffusionXLPipeline, paths: Sequence[str], scales: Sequence[float]) -> None:
    """Load the adapters at `paths` into the pipeline and activate them at their scales."""
    # Imported here, as --help needs neither PEFT nor diffusers, which take seconds to import.
    from pipelines.subject.adapters import load_adapter, scale_warning

    names = [f"adapter_{index}" for index in range(len(paths))]
    for path, name, scale in zip(paths, names, scales, strict=True):
        for warning in load_adapter(pipeline, path, name):
            logger.warning(warning)
        if (warning := scale_warning(pipeline, name, scale)) is not None:
            logger.warning(f"{path} is at --scale {scale:g}. {warning}")
    if names:
        pipeline.set_adapters(names, adapter_weights=list(scales))


def main(options: GenerationOptions) -> list[Path]:
    """Generate and save the images; returns their files."""
    prompts, source = options.prompts(), options.source()
    sampling = Sampling(
        options.num_inference_steps,
        options.guidance_scale,
        options.negative_prompt,
        options.resolution,
        options.guidance_rescale,
    )
    options.check_outputs()
    for sentence in command_line_warnings([*prompts, options.negative_prompt]):
        logger.warning(sentence)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = source.load(torch.float16 if device == "cuda" else torch.float32, device)
    scales = options.scale * len(options.adapter) if len(options.scale) == 1 else options.scale
    load_adapters(pipeline, options.adapter, scales)
    seeds = range(options.seed, options.seed + len(prompts))
    generated = tqdm(generate(pipeline, prompts, seeds, sampling), total=len(prompts), desc="generating")
    common = {
        **asdict(sampling),
        "sampler": type(pipeline.scheduler).__name__.removesuffix("Scheduler"),
        "model": source.pretrained_model_name_or_path,
        "adapters": [{"path": path, "scale": scale} for path, scale in zip(options.adapter, scales, strict=True)],
    }
    images, files = [], []
    with threads_for(pipeline):
        for image, prompt, seed in zip(generated, prompts, seeds, strict=True):
            files.append(Path(options.output_dir) / f"{seed:05d}.png")
            save_image(image, files[-1], {"prompt": prompt, "seed": seed, **common})
            images.append(image)
    if options.grid is not None:
        Path(options.grid).parent.mkdir(parents=True, exist_ok=True)
        as_grid(images, options.columns).save(options.grid)
    return files


if __name__ == "__main__":
    parser = HfArgumentParser(GenerationOptions, description=__doc__, allow_abbrev=False, formatter_class=HelpFormatter)
    try:
        options = parser.parse_args_into_dataclasses(current_arguments(sys.argv[1:], parser), look_for_args_file=False)[0]
    except InputError as error:
        parser.error(str(error))
    # Imported after --help and wrong flags are handled, as it takes seconds.
    from nora_vision import AdapterFileError

    try:
        main(options)
    except (InputError, AdapterFileError) as error:
        parser.error(str(error))
