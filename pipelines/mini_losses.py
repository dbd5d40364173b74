"""Pretraining of the built-in SDXL: its latent space, and the losses of its autoencoder and its UNet."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTokenizer

from pipelines import mini_sdxl


@dataclass(frozen=True)
class PatchBasis:
    """The latent space: principal components of the images' 4 x 4 patches, with reduced variance of the strong ones.

        z_k = v_k . (patch - mean) / (g sqrt(std_k))

    As it has a closed form, the autoencoder and the UNet can be trained at the same time. Components of decreasing variance
    let the UNet learn coarse structures first.

    Args:
        analysis: (LATENT_CHANNELS, 3, 4, 4), a convolution from pixels in [-1, 1] to latents of overall standard deviation 1.
        offset: (LATENT_CHANNELS,), the negative latents of the mean patch.
    """

    analysis: torch.Tensor
    offset: torch.Tensor

    @classmethod
    def fit(cls, pixels: torch.Tensor) -> PatchBasis:
        """The basis of `pixels` (count, 3, height, width) in [-1, 1]."""
        factor, channels = mini_sdxl.VAE_FACTOR, mini_sdxl.LATENT_CHANNELS
        patches = F.pixel_unshuffle(pixels, factor).movedim(1, -1).flatten(0, -2).double()
        mean = patches.mean(dim=0)
        variances, directions = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
        variances, directions = variances.flip(0)[:channels], directions.flip(1)[:, :channels].T
        gain = variances.sqrt().mean().sqrt()
        rows = (directions / (gain * variances[:, None] ** 0.25)).float()
        return cls(rows.view(channels, 3, factor, factor), -(rows @ mean.float()))

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """The latents (count, LATENT_CHANNELS, height / 4, width / 4) of `pixels` (count, 3, height, width)."""
        return F.conv2d(pixels, self.analysis, self.offset, stride=mini_sdxl.VAE_FACTOR)


class AutoencoderLoss(nn.Module):
    """The loss of an autoencoder whose encoder learns a `PatchBasis` and whose decoder reconstructs images from it.

    The reconstruction loss compares pixels and their differences, so that edges stay sharp. Noise on the latents makes the
    decoder robust to errors of the UNet.
    """

    def __init__(self, vae: AutoencoderKL, basis: PatchBasis, latent_noise: float = 0.05) -> None:
        super().__init__()
        self.vae, self.basis, self.latent_noise = vae, basis, latent_noise

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """The loss of `pixels` (batch, 3, height, width) in [-1, 1], a scalar."""
        target = self.basis.encode(pixels)
        posterior = self.vae.encode(pixels).latent_dist
        # The posterior's standard deviation learns to be that of the noise that the decoder is trained with.
        spread = (posterior.logvar - 2 * math.log(self.latent_noise)).square().mean()
        decoded = self.vae.decode(target + self.latent_noise * torch.randn_like(target)).sample
        restored = F.l1_loss(decoded, pixels) + F.mse_loss(decoded, pixels)
        for axis in (-1, -2):
            restored = restored + 0.5 * F.l1_loss(decoded.diff(dim=axis), pixels.diff(dim=axis))
        return F.mse_loss(posterior.mean, target) + 1e-3 * spread + restored


class PretrainingDenoisingLoss(nn.Module):
    """Squared error of the predicted velocity, weighted by (min(SNR, gamma) + 1) / (SNR + 1)  [min-SNR, Hang et al. 2023]."""

    def __init__(self, tokenizer: CLIPTokenizer, gamma: float = 5.0) -> None:
        super().__init__()
        self.unet = mini_sdxl.new_unet()
        self.text_encoder, self.text_encoder_2 = mini_sdxl.new_text_encoders(tokenizer)
        self.scheduler = DDPMScheduler.from_config(mini_sdxl.new_scheduler().config)
        self.gamma = gamma

    def forward(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        tokens: torch.Tensor,
        keep_caption: torch.Tensor,
    ) -> torch.Tensor:
        """The mean loss of a batch, a scalar.

        Args:
            latents: (batch, 4, height, width), scaled.
            noise: like `latents`.
            timesteps: (batch,) int64.
            tokens: (batch, MAX_TOKENS) int64.
            keep_caption: (batch,) float, 0 where the caption is dropped so that guidance has an unconditional model.
        """
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        target = self.scheduler.get_velocity(latents, noise, timesteps)
        hidden = self.text_encoder(tokens, output_hidden_states=True).hidden_states[-2]
        second = self.text_encoder_2(tokens, output_hidden_states=True)
        embeds = torch.cat([hidden, second.hidden_states[-2]], dim=-1) * keep_caption[:, None, None]
        size = float(mini_sdxl.RESOLUTION)
        conditions = {
            "text_embeds": second.text_embeds * keep_caption[:, None],
            "time_ids": latents.new_tensor([size, size, 0, 0, size, size]).expand(len(latents), 6),
        }
        predicted = self.unet(noisy, timesteps, embeds, added_cond_kwargs=conditions).sample
        snr = compute_snr(self.scheduler, timesteps)
        weight = (snr.clamp(max=self.gamma) + 1) / (snr + 1)
        return (weight * (predicted - target).square().mean(dim=(1, 2, 3))).mean()
