"""The denoising loss of a subject's pictures."""

from __future__ import annotations

import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from diffusers.training_utils import compute_snr
from torch import nn

from pipelines.errors import InputError
from pipelines.subject.base_model import PromptEmbeddings, encode_tokens, text_encoders_of

PREDICTION_TYPES = ("epsilon", "v_prediction")


class DenoisingLoss(nn.Module):
    """Squared error of what the UNet predicts for noisy latents: the noise, or the velocity, as the model's scheduler says.

    With `snr_gamma` each picture is weighted by min(SNR, gamma) / SNR, or / (SNR + 1) for velocity  [Hang et al. 2023].
    """

    def __init__(self, pipeline: StableDiffusionXLPipeline, snr_gamma: float | None = None) -> None:
        super().__init__()
        self.unet = pipeline.unet
        self.text_encoders = nn.ModuleList(text_encoders_of(pipeline))
        self.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        self.prediction_type = self.scheduler.config.prediction_type
        self.snr_gamma = snr_gamma
        if self.prediction_type not in PREDICTION_TYPES:
            raise InputError(
                f"The model's prediction_type must be one of {PREDICTION_TYPES}, got {self.prediction_type!r}. Use another "
                "base model."
            )

    @property
    def num_timesteps(self) -> int:
        """How many noise levels there are."""
        return self.scheduler.config.num_train_timesteps

    def forward(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        time_ids: torch.Tensor,
        hidden: torch.Tensor | None = None,
        pooled: torch.Tensor | None = None,
        tokens: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The mean loss of a batch, a scalar.

        Args:
            latents: (batch, channels, height, width), scaled.
            noise: like `latents`.
            timesteps: (batch,) int64.
            time_ids: (batch, 6), as in `Example`.
            hidden, pooled: the prompts encoded, as in `PromptEmbeddings`, or
            tokens: (batch, encoders, tokens) int64, for the text encoders to encode here.
            weights: (batch,), what each picture's loss is multiplied by before the mean; one each unless given.
        """
        prompts = (
            PromptEmbeddings(hidden, pooled) if tokens is None else encode_tokens(self.text_encoders, tokens.transpose(0, 1))
        )
        losses = self.per_picture(latents, noise, timesteps, time_ids, prompts)
        if self.snr_gamma is not None:
            losses = losses * self._snr_weights(timesteps)
        return losses.mean() if weights is None else (losses * weights).mean()

    def per_picture(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        time_ids: torch.Tensor,
        prompts: PromptEmbeddings,
    ) -> torch.Tensor:
        """The mean squared error of each picture, unweighted: (batch,), float32; arguments as in `forward`."""
        target = noise if self.prediction_type == "epsilon" else self.scheduler.get_velocity(latents, noise, timesteps)
        predicted = self.predict(self.scheduler.add_noise(latents, noise, timesteps), timesteps, time_ids, prompts)
        return (predicted.float() - target.float()).square().flatten(1).mean(dim=1)

    def predict(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, time_ids: torch.Tensor, prompts: PromptEmbeddings
    ) -> torch.Tensor:
        """What the UNet predicts for `noisy` latents (batch, channels, height, width)."""
        dtype = self.unet.dtype
        conditions = {"text_embeds": prompts.pooled.to(dtype), "time_ids": time_ids}
        return self.unet(noisy.to(dtype), timesteps, prompts.hidden.to(dtype), added_cond_kwargs=conditions).sample

    def _snr_weights(self, timesteps: torch.Tensor) -> torch.Tensor:
        snr = compute_snr(self.scheduler, timesteps)
        return snr.clamp(max=self.snr_gamma) / (snr if self.prediction_type == "epsilon" else snr + 1)
