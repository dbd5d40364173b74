"""Noise schedules of training: the noisy latents, the UNet's inputs, and the error of its prediction."""

from __future__ import annotations

from typing import Protocol

import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, EulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.training_utils import compute_snr

from pipelines.errors import InputError
from pipelines.subject.prediction import check_terminal_snr

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class Noising(Protocol):
    """A family of noise levels, numbered 0 to `num_timesteps` - 1 from little noise to much.

    Everywhere `latents`, `noise` and the UNet's `prediction` are (batch, channels, height, width) and `timesteps` (batch,) int64.
    """

    num_timesteps: int

    def inputs(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The inputs of the UNet: noisy latents like `latents`, and the noise levels as it expects them, (batch,)."""

    def errors(
        self, prediction: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """The mean squared error of each image's prediction: (batch,) float32."""

    def snr_weights(self, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
        """The min-SNR weights of the errors: (batch,)."""


def noising_for(scheduler: SchedulerMixin, edm_style: bool = False, snr_gamma: float | None = None) -> Noising:
    """The noise levels that the model of `scheduler` was trained on; with `edm_style`, the same with EDM's loss.

    Raises: InputError for an unknown prediction type, for epsilon with zero terminal SNR, and for min-SNR with EDM's loss, which
        has its own weights.
    """
    prediction_type = scheduler.config.prediction_type
    if prediction_type not in PREDICTION_TYPES:
        raise InputError(
            f"The model's prediction_type must be one of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}. Use another "
            "base model."
        )
    check_terminal_snr(scheduler)
    is_edm = "EDM" in type(scheduler).__name__
    if (is_edm or edm_style) and snr_gamma is not None:
        raise InputError("snr_gamma cannot be used with EDM-style training, whose loss has its own weights. Remove snr_gamma.")
    if is_edm:
        return EdmNoising(EDMEulerScheduler.from_config(scheduler.config))
    if edm_style:
        return EdmStyleNoising(EulerDiscreteScheduler.from_config(scheduler.config), prediction_type)
    return DiscreteNoising(DDPMScheduler.from_config(scheduler.config))


class DiscreteNoising:
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) n; the UNet predicts n, the velocity sqrt(a_t) n - sqrt(1 - a_t) x_0, or x_0."""

    def __init__(self, scheduler: DDPMScheduler) -> None:
        self.scheduler = scheduler
        self.num_timesteps: int = scheduler.config.num_train_timesteps

    def inputs(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x_t like `latents`, and t (batch,)."""
        return self.scheduler.add_noise(latents, noise, timesteps), timesteps

    def errors(
        self, prediction: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """(batch,) float32: the mean squared error against the target of the model's prediction type."""
        targets = {
            "epsilon": lambda: noise,
            "v_prediction": lambda: self.scheduler.get_velocity(latents, noise, timesteps),
            "sample": lambda: latents,
        }
        return mean_square(prediction.float() - targets[self.scheduler.config.prediction_type]().float())

    def snr_weights(self, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
        """(batch,): min(SNR, gamma) as a weight on the error of x_0, converted for the predicted target  [Hang et al. 2023]."""
        snr = compute_snr(self.scheduler, timesteps)
        divisors = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}
        return snr.clamp(max=gamma) / divisors[self.scheduler.config.prediction_type]


class _SigmaNoising:
    """x = x_0 + sigma n; the error is that of x_0  [EDM, Karras et al. 2022, section 5]."""

    def __init__(self, scheduler: EulerDiscreteScheduler | EDMEulerScheduler) -> None:
        self.scheduler = scheduler
        self.num_timesteps: int = scheduler.config.num_train_timesteps
        # The scheduler's sigmas are in descending order and end with 0.
        self.sigmas = scheduler.sigmas[:-1].flip(0)[-self.num_timesteps :].float()

    def sigma(self, timesteps: torch.Tensor) -> torch.Tensor:
        """The noise levels of `timesteps`, (batch, 1, 1, 1)."""
        return self.sigmas.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)

    def snr_weights(self, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
        """Not defined for EDM. Raises: NotImplementedError."""
        raise NotImplementedError("EDM's loss has its own weights.")


class EdmStyleNoising(_SigmaNoising):
    """A model with discrete noise levels, trained on the error of x_0 weighted by 1 / sigma^2, as in diffusers' scripts."""

    def __init__(self, scheduler: EulerDiscreteScheduler, prediction_type: str) -> None:
        super().__init__(scheduler)
        self.prediction_type = prediction_type

    def inputs(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x / sqrt(sigma^2 + 1) like `latents`, which is x_t, and t (batch,)."""
        sigma = self.sigma(timesteps)
        return (latents + sigma * noise) / (sigma**2 + 1).sqrt(), timesteps

    def errors(
        self, prediction: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """(batch,) float32: the mean squared error of the denoised latents against x_0, weighted by 1 / sigma^2."""
        sigma, prediction = self.sigma(timesteps), prediction.float()
        noisy = latents + sigma * noise
        denoised = {
            "epsilon": lambda: noisy - sigma * prediction,
            "v_prediction": lambda: noisy / (sigma**2 + 1) - prediction * sigma / (sigma**2 + 1).sqrt(),
            "sample": lambda: prediction,
        }
        return mean_square((denoised[self.prediction_type]() - latents) / sigma)


class EdmNoising(_SigmaNoising):
    """A model that was trained as EDM, with EDM's scaling of inputs, outputs and noise levels."""

    def inputs(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """c_in x like `latents`, and c_noise (batch,)."""
        sigma = self.sigma(timesteps)
        noisy = self.scheduler.precondition_inputs(latents + sigma * noise, sigma)
        return noisy, self.scheduler.precondition_noise(sigma).flatten()

    def errors(
        self, prediction: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """(batch,) float32: the mean squared error of c_skip x + c_out F against x_0.

        EDM's weights are left out, as they are large at low noise.
        """
        sigma = self.sigma(timesteps)
        denoised = self.scheduler.precondition_outputs(latents + sigma * noise, prediction.float(), sigma)
        return mean_square(denoised - latents)


def mean_square(differences: torch.Tensor) -> torch.Tensor:
    """(batch,): the mean of the squares of (batch, ...)."""
    return differences.square().flatten(1).mean(dim=1)
