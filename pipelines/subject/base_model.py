"""SDXL base models: loading one, and its conditioning on prompts and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedTokenizerBase

from pipelines.built_in import model_path
from pipelines.errors import InputError
from pipelines.quantization import compute_dtype, quantize_linear_layers
from pipelines.subject.model_files import autoencoder_folder, configuration_folder, pipeline_folder
from pipelines.subject.prediction import prediction_of

# Tensor name prefixes of the UNet, both text encoders and the autoencoder in a single file, as in Stability's code.
SDXL_PREFIXES = ("model.diffusion_model.", "conditioner.embedders.0.", "conditioner.embedders.1.", "first_stage_model.")
QUANTIZED_COMPONENTS = ("unet", "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class PromptEmbeddings:
    """The prompt conditioning of SDXL's UNet for a batch.

    Args:
        hidden: (batch, tokens, width): the concatenated penultimate hidden states of both text encoders.
        pooled: (batch, width of the second encoder's projection).
    """

    hidden: torch.Tensor
    pooled: torch.Tensor

    def repeat(self, index: int, count: int) -> PromptEmbeddings:
        """The prompt at `index`, `count` times: hidden (count, tokens, width), pooled (count, width)."""
        return PromptEmbeddings(*(values[index].expand(count, *values.shape[1:]) for values in (self.hidden, self.pooled)))

    def to(self, device: torch.device) -> PromptEmbeddings:
        """The same embeddings on `device`."""
        return PromptEmbeddings(self.hidden.to(device), self.pooled.to(device))


def load_base_model(
    name_or_path: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    variant: str | None = None,
    revision: str | None = None,
    vae: str | None = None,
    single_file_config: str | None = None,
    quantize: str | None = None,
    prediction_type: str | None = None,
    rescale_betas_zero_snr: bool | None = None,
    unquantized: Path | None = None,
) -> StableDiffusionXLPipeline:
    """Load an SDXL pipeline, frozen and in evaluation mode, from a hub name, a folder or one file; safetensors only.

    Args:
        variant: as in `diffusers`, such as "fp16" for a folder of files named `*.fp16.safetensors`.
        revision: branch, tag or commit of a hub name.
        vae: hub name or folder of another autoencoder.
        single_file_config: for a single file, hub name or folder of a model with the same configuration; None for SDXL's.
        quantize: "nf4" to quantise the linear layers of the UNet and both text encoders to 4 bits  [QLoRA, Dettmers et al. 2023].
        prediction_type, rescale_betas_zero_snr: as in `Prediction`; None for the model's own settings.
        unquantized: a folder for the weights before quantisation, with a folder for each component.
    Raises: InputError naming the model if it cannot be loaded or is not SDXL, or an argument that does not fit it.
    """
    name_or_path = model_path(name_or_path)
    parts = {} if vae is None else {"vae": load_autoencoder(vae, dtype)}
    try:
        if Path(name_or_path).is_file():
            pipeline = _from_file(name_or_path, dtype, single_file_config, **parts)
        else:
            pipeline = _from_folder(name_or_path, dtype, variant, revision, **parts)
    except OSError as error:
        raise InputError(f"The model {name_or_path!r} could not be loaded: {error}") from error
    pipeline.scheduler = prediction_of(name_or_path, prediction_type, rescale_betas_zero_snr).apply(pipeline.scheduler)
    if quantize is not None:
        quantize_components(pipeline, quantize, compute_dtype(dtype, device), unquantized)
    return _frozen(pipeline.to(device))


def _frozen(pipeline: StableDiffusionXLPipeline) -> StableDiffusionXLPipeline:
    for component in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        component.requires_grad_(False).eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def quantize_components(
    pipeline: StableDiffusionXLPipeline, kind: str, compute_dtype: torch.dtype, unquantized: Path | None = None
) -> None:
    """Quantise the UNet and both text encoders, as `quantize_linear_layers` does; `quantization_errors` returns the errors."""
    errors = {}
    for name in QUANTIZED_COMPONENTS:
        folder = None if unquantized is None else unquantized / name
        errors[name] = quantize_linear_layers(getattr(pipeline, name), kind, compute_dtype, folder)
    pipeline.quantization_errors = errors


def quantization_errors(pipeline: StableDiffusionXLPipeline) -> dict[str, float]:
    """The relative error of quantisation by component; empty for a model in full precision."""
    return getattr(pipeline, "quantization_errors", {})


def _from_folder(
    name_or_path: str, dtype: torch.dtype, variant: str | None, revision: str | None, **parts: AutoencoderKL
) -> StableDiffusionXLPipeline:
    """The pipeline in a folder or on the hub; arguments as in `load_base_model`."""
    folder = pipeline_folder(name_or_path, revision, variant, **parts)
    return StableDiffusionXLPipeline.from_pretrained(folder, dtype=dtype, use_safetensors=True, variant=variant, **parts)


def _from_file(file: str, dtype: torch.dtype, config: str | None, **parts: AutoencoderKL) -> StableDiffusionXLPipeline:
    """The pipeline in a single file; `config` is the `single_file_config` of `load_base_model`."""
    _check_single_file(Path(file))
    folder = str(configuration_folder(Path(file), config))
    return StableDiffusionXLPipeline.from_single_file(file, torch_dtype=dtype, config=folder, **parts)


def load_autoencoder(name_or_path: str, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    """Load an autoencoder from a hub name or a folder; safetensors only.

    Raises: InputError naming it if it cannot be loaded.
    """
    try:
        return AutoencoderKL.from_pretrained(autoencoder_folder(name_or_path), torch_dtype=dtype, use_safetensors=True)
    except OSError as error:
        raise InputError(
            f"The autoencoder {name_or_path!r} could not be loaded: {error} Give the hub name or folder of an AutoencoderKL."
        ) from error


def _check_single_file(path: Path) -> None:
    """Check that `path` is a complete SDXL checkpoint, by the names of its tensors; nothing is unpickled."""
    if path.suffix != ".safetensors":
        raise InputError(
            f"{str(path)!r} must be a .safetensors file: others, such as .ckpt, can run programs when they are read. Convert it, "
            "or get the model as .safetensors."
        )
    try:
        with safe_open(path, "pt") as tensors:
            names = tuple(tensors.keys())
    except SafetensorError as error:
        raise InputError(f"{str(path)!r} is not a valid .safetensors file: {error}. Download it again.") from error
    missing = [prefix for prefix in SDXL_PREFIXES if not any(name.startswith(prefix) for name in names)]
    if missing:
        raise InputError(
            f"{str(path)!r} is not a complete SDXL checkpoint: it has no tensors of {', '.join(missing)}. Only SDXL models can "
            "be adapted, and a LoRA file is not a model."
        )


def model_resolution(pipeline: StableDiffusionXLPipeline) -> int:
    """The model's default resolution: the side of its images in pixels."""
    return pipeline.unet.config.sample_size * pipeline.vae_scale_factor


def text_encoders_of(pipeline: StableDiffusionXLPipeline) -> tuple[nn.Module, nn.Module]:
    """Both text encoders, in SDXL's order."""
    return pipeline.text_encoder, pipeline.text_encoder_2


def tokenize(tokenizers: Sequence[PreTrainedTokenizerBase], prompts: Sequence[str]) -> torch.Tensor:
    """The token ids of `prompts` for each tokenizer: (tokenizers, batch, tokens) int64."""
    ids = [
        tokenizer(
            list(prompts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        ).input_ids
        for tokenizer in tokenizers
    ]
    return torch.stack(ids)


def encode_tokens(text_encoders: Sequence[nn.Module], tokens: torch.Tensor) -> PromptEmbeddings:
    """Encode token ids (encoders, batch, tokens) as SDXL does: penultimate hidden states, and the second's pooled output."""
    outputs = [encoder(ids, output_hidden_states=True) for encoder, ids in zip(text_encoders, tokens, strict=True)]
    return PromptEmbeddings(torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[-1].text_embeds)


@torch.no_grad()
def encode_prompts(pipeline: StableDiffusionXLPipeline, prompts: Sequence[str]) -> PromptEmbeddings:
    """Encode prompts; empty prompts become zeros if the model was trained that way."""
    tokens = tokenize((pipeline.tokenizer, pipeline.tokenizer_2), prompts).to(pipeline.text_encoder.device)
    embeddings = encode_tokens(text_encoders_of(pipeline), tokens)
    if not pipeline.config.force_zeros_for_empty_prompt:
        return embeddings
    keep = torch.tensor([prompt != "" for prompt in prompts], device=tokens.device)
    return PromptEmbeddings(embeddings.hidden * keep[:, None, None], embeddings.pooled * keep[:, None])


@torch.no_grad()
def encode_images(pipeline: StableDiffusionXLPipeline, pixels: torch.Tensor, batch_size: int = 8) -> torch.Tensor:
    """The distribution of the latents of images (batch, 3, height, width) in [-1, 1].

    It is computed in float32, as SDXL's autoencoder overflows in half precision.

    Returns: (batch, 2, channels, height, width) float32: the mean and the standard deviation, scaled as the UNet expects them.
    """
    vae, stored = pipeline.vae, pipeline.vae.dtype
    if stored != torch.float32:
        vae.to(torch.float32)
    distributions = [vae.encode(part.to(vae.device)).latent_dist for part in pixels.split(batch_size)]
    if stored != torch.float32:
        vae.to(stored)
    mean = torch.cat([distribution.mean for distribution in distributions])
    deviation = torch.cat([distribution.std for distribution in distributions])
    scale = torch.full((mean.shape[1], 1, 1), vae.config.scaling_factor, device=mean.device)
    if getattr(vae.config, "latents_mean", None) is not None:
        mean = mean - mean.new_tensor(vae.config.latents_mean)[:, None, None]
        scale = scale / mean.new_tensor(vae.config.latents_std)[:, None, None]
    return torch.stack([mean * scale, deviation * scale], dim=1)
