"""The denoising loss of a subject's images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from torch import nn

from pipelines.randomness import RandomStream, keyed_generator
from pipelines.subject.base_model import PromptEmbeddings, encode_tokens, text_encoders_of
from pipelines.subject.noising import noising_for


class DenoisingLoss(nn.Module):
    """Squared error of the UNet's prediction for noisy latents: noise, velocity or image, by the scheduler's prediction type.

    Args:
        snr_gamma: each image is weighted by min(SNR, gamma) / SNR, or / (SNR + 1) for velocity  [Hang et al. 2023].
        edm_style: use the error of the denoised latents instead  [Karras et al. 2022]; always used for models trained as EDM.
    Raises: InputError for an unknown prediction type, or for `snr_gamma` with EDM's loss.
    """

    def __init__(self, pipeline: StableDiffusionXLPipeline, snr_gamma: float | None = None, edm_style: bool = False) -> None:
        super().__init__()
        self.unet = pipeline.unet
        # Stored, as `unet.dtype` iterates over all parameters, which takes longer than the loss itself.
        self.unet_dtype = pipeline.unet.dtype
        self.text_encoders = nn.ModuleList(text_encoders_of(pipeline))
        self.noising = noising_for(pipeline.scheduler, edm_style, snr_gamma)
        self.snr_gamma = snr_gamma

    @property
    def num_timesteps(self) -> int:
        """The number of noise levels."""
        return self.noising.num_timesteps

    def forward(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        time_ids: torch.Tensor,
        hidden: torch.Tensor | None = None,
        pooled: torch.Tensor | None = None,
        tokens: torch.Tensor | None = None,
        fixed_tokens: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The mean loss of a batch, a scalar.

        Args:
            latents: (batch, channels, height, width), scaled.
            noise: like `latents`.
            timesteps: (batch,) int64.
            time_ids: (batch, 6), as in `Example`.
            hidden, pooled: the prompt embeddings, as in `PromptEmbeddings`, or
            tokens: (batch, encoders, tokens) int64, which are encoded here, or
            fixed_tokens: like `tokens`, but encoded without gradients.
            weights: (batch,), factors on the losses before the mean; None for 1.
        """
        if tokens is not None:
            prompts = encode_tokens(self.text_encoders, tokens.transpose(0, 1))
        elif fixed_tokens is not None:
            with torch.no_grad():
                prompts = encode_tokens(self.text_encoders, fixed_tokens.transpose(0, 1))
        else:
            prompts = PromptEmbeddings(hidden, pooled)
        losses = self.per_image(latents, noise, timesteps, time_ids, prompts)
        if self.snr_gamma is not None:
            losses = losses * self.noising.snr_weights(timesteps, self.snr_gamma)
        return losses.mean() if weights is None else (losses * weights).mean()

    def per_image(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        time_ids: torch.Tensor,
        prompts: PromptEmbeddings,
    ) -> torch.Tensor:
        """The mean squared error of each image, without `snr_gamma`: (batch,), float32; arguments as in `forward`."""
        prediction = self.predict(latents, noise, timesteps, time_ids, prompts)
        return self.noising.errors(prediction, latents, noise, timesteps)

    def predict(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        time_ids: torch.Tensor,
        prompts: PromptEmbeddings,
    ) -> torch.Tensor:
        """The UNet's prediction for `latents` with `noise`, of the shape of `latents`; arguments as in `forward`."""
        noisy, levels = self.noising.inputs(latents, noise, timesteps)
        dtype = self.unet_dtype
        conditions = {"text_embeds": prompts.pooled.to(dtype), "time_ids": time_ids}
        return self.unet(noisy.to(dtype), levels, prompts.hidden.to(dtype), added_cond_kwargs=conditions).sample


@dataclass(frozen=True)
class TrainingBatches:
    """Training batches with offset noise, and with frozen text encoders after a number of batches.

    Args:
        batches: `batches(index)` gives the arguments of `DenoisingLoss` for the `index`-th batch.
        seed: of the offsets.
        noise_offset: standard deviation of an offset that is added to the noise of each channel, so that very dark and very
            bright images can be learned; 0 for none.
        text_encoder_batches: the number of batches after which the text encoders are not trained; None for no limit.
    """

    batches: Callable[[int], dict[str, Any]]
    seed: int
    noise_offset: float = 0.0
    text_encoder_batches: int | None = None

    def __call__(self, index: int) -> dict[str, Any]:
        """The `index`-th batch, a function of the seed and the index."""
        batch = dict(self.batches(index))
        if self.noise_offset:
            noise = batch["noise"]
            offsets = torch.randn(
                (*noise.shape[:2], 1, 1), generator=keyed_generator(self.seed, RandomStream.NOISE_OFFSET, index)
            )
            batch["noise"] = noise + self.noise_offset * offsets.to(noise)
        if self.text_encoder_batches is not None and index >= self.text_encoder_batches and "tokens" in batch:
            batch["fixed_tokens"] = batch.pop("tokens")
        return batch
