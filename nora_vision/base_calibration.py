"""Base calibration: activation statistics of a base model on fixed inputs, which every machine with the model can compute again.

The results are kept in the user's cache of Hugging Face (`HF_HOME`), by the hash of the base weights.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import cached_assets_path
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .calibration import ActivationStatistics, BaseCalibration, base_modules, calibrate_layers, unwrapped
from .components import COMPONENTS
from .files import AdapterFileError, tensor_bytes

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

logger = logging.getLogger(__name__)
# Increase this when the fixed inputs change. Adapters that were trained with others then no longer find their scales.
VERSION = 1
PROMPTS = (
    "a photo of a dog on the grass",
    "a portrait of a woman, oil painting",
    "a red car in a street at night",
    "a bowl of fruit on a wooden table",
    "a mountain lake at sunrise",
    "a cartoon robot, flat colours",
    "an old house in the snow",
    "a sign with the word hello",
)
# The noise schedule that SDXL was trained with, whatever scheduler the pipeline has.
FIRST_BETA, LAST_BETA, TIMESTEPS = 0.00085, 0.012, 1000
# SDXL is also trained at 512 pixels, which costs a quarter of 1024.
LARGEST_SIDE = 64


def base_statistics(
    model: nn.Module, layers: list[str], run_model: Callable[[], Any], parts: Sequence[nn.Module]
) -> ActivationStatistics:
    """The statistics of `layers` while `run_model()` runs `model`, from the cache if they were computed before.

    Adapters are disabled, and the models are in evaluation mode and without autocast.

    Args:
        layers: names of layers of `model`.
        parts: all models whose weights determine the result, `model` among them.
    Raises: ValueError if an adapter is merged, or a layer is not called.
    """
    digests = [weights_digest(part) for part in parts]
    key = hashlib.sha256(json.dumps([VERSION, sorted(layers), digests]).encode()).hexdigest()
    path = cached_assets_path("nora_vision", "base_calibration", "statistics") / f"{key}.safetensors"
    if path.is_file():
        try:
            return ActivationStatistics.load(path)
        except AdapterFileError as error:
            logger.warning(f"The cached base calibration is computed again: {error}")
    with _base_models(parts):
        statistics = calibrate_layers(model, layers, run_model)
    statistics.save(path)
    return statistics


def sdxl_calibration(pipe: StableDiffusionXLPipeline) -> dict[str, BaseCalibration]:
    """For each component of an SDXL pipeline, a function that calibrates its layers of given names.

    The text encoders encode `PROMPTS`. The UNet gets one noise level for each prompt, at equal distances. Its latents mix

        x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e,    a_t = prod_{s <= t} (1 - beta_s)

    white noise e and an x_0 of unit variance with the amplitude spectrum 1 / f of natural images [Field 1987], from a fixed seed.
    No output of the UNet enters its inputs, so rounding differences do not add up.

    Raises, when such a function is called: ValueError if the pipeline has no text encoders.
    """
    runs = {"unet": _run_unet, "text_encoder": _encode_prompts, "text_encoder_2": _encode_prompts}
    present = [name for name in COMPONENTS if getattr(pipe, name, None) is not None]
    return {name: partial(_calibrate_sdxl, pipe, name, runs[name]) for name in present}


def _calibrate_sdxl(
    pipe: StableDiffusionXLPipeline, name: str, run: Callable[[StableDiffusionXLPipeline], None], layers: list[str]
) -> ActivationStatistics:
    parts = [pipe.text_encoder, pipe.text_encoder_2] + ([pipe.unet] if name == "unet" else [])
    if any(part is None for part in (*parts, pipe.tokenizer, pipe.tokenizer_2)):
        raise ValueError(
            "The base calibration needs both text encoders and tokenizers of SDXL, but the pipeline lacks some. Load the adapter "
            "before they are removed."
        )
    return base_statistics(getattr(pipe, name), layers, partial(run, pipe), parts)


def _encode_prompts(pipe: StableDiffusionXLPipeline) -> None:
    for prompt in PROMPTS:
        _conditioning(pipe, prompt)


def _conditioning(pipe: StableDiffusionXLPipeline, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden states (1, tokens, width) and the pooled output (1, width) of `prompt`."""
    device = pipe.text_encoder.device
    hidden, _, pooled, _ = pipe.encode_prompt(prompt, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False)
    return hidden, pooled


def _run_unet(pipe: StableDiffusionXLPipeline) -> None:
    unet, generator = pipe.unet, torch.Generator().manual_seed(0)
    alphas_cumprod = torch.cumprod(
        1 - torch.linspace(FIRST_BETA**0.5, LAST_BETA**0.5, TIMESTEPS, dtype=torch.float64) ** 2, dim=0
    )
    side = min(unet.config.sample_size, LARGEST_SIDE)
    pixels = side * pipe.vae_scale_factor
    placed = {"device": unet.device, "dtype": unet.dtype}
    for index, prompt in enumerate(PROMPTS):
        timestep = round((index + 0.5) * TIMESTEPS / len(PROMPTS))
        clean = natural_noise((1, unet.config.in_channels, side, side), generator)
        noise = torch.randn(clean.shape, generator=generator)
        latents = alphas_cumprod[timestep].sqrt() * clean + (1 - alphas_cumprod[timestep]).sqrt() * noise
        hidden, pooled = _conditioning(pipe, prompt)
        sizes = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]])
        conditions = {"text_embeds": pooled.to(**placed), "time_ids": sizes.to(**placed)}
        unet(latents.to(**placed), timestep, hidden.to(**placed), added_cond_kwargs=conditions)


def natural_noise(shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Random images `shape` (..., height, width), float32, with the amplitude spectrum 1 / f, mean 0 and variance 1 each."""
    white = torch.randn(*shape, generator=generator)
    height, width = shape[-2:]
    frequency = (torch.fft.fftfreq(height)[:, None] ** 2 + torch.fft.fftfreq(width) ** 2).sqrt()
    frequency[0, 0] = 1 / max(height, width)
    images = torch.fft.ifft2(torch.fft.fft2(white) / frequency).real
    return (images - images.mean(dim=(-2, -1), keepdim=True)) / images.std(dim=(-2, -1), keepdim=True)


def weights_digest(model: nn.Module) -> str:
    """The hash of the weights of `model` without adapters, with their names, dtypes and shapes."""
    digest = hashlib.blake2b(digest_size=32)
    model = unwrapped(model)
    for name, module in (("", model), *base_modules(model)):
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            digest.update(f"{name}.{key} {tensor.dtype} {tuple(tensor.shape)};".encode())
            digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


@contextmanager
def _base_models(models: Sequence[nn.Module]) -> Iterator[None]:
    """Run `models` without their adapters, in evaluation mode and without autocast; everything is restored afterwards."""
    modules = {module for model in models for module in model.modules()}
    adapted = {module for module in modules if isinstance(module, BaseTunerLayer)}
    if any(layer.merged for layer in adapted):
        raise ValueError("The base calibration needs the base weights, but an adapter is fused into them. Unfuse it first.")
    device = next(models[-1].parameters()).device.type
    with (
        _set(adapted, "_disable_adapters", True),
        _set(modules, "training", False),
        torch.no_grad(),
        torch.autocast(device, enabled=False),
    ):
        yield


@contextmanager
def _set(modules: Collection[nn.Module], attribute: str, value: bool) -> Iterator[None]:
    before = {module: getattr(module, attribute) for module in modules}
    for module in modules:
        setattr(module, attribute, value)
    try:
        yield
    finally:
        for module, earlier in before.items():
            setattr(module, attribute, earlier)
