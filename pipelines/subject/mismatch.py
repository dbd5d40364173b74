"""A check that a base model predicts what its scheduler declares, on one batch of the training images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import StableDiffusionXLPipeline

from pipelines.errors import InputError
from pipelines.randomness import RandomStream, keyed_generator
from pipelines.subject.encoding import CachedLatents
from pipelines.subject.loss import DenoisingLoss
from pipelines.subject.noising import DiscreteNoising, mean_square
from pipelines.subject.prediction import EPSILON, V_PREDICTION

# Shares of signal in the input, alphas_cumprod. With almost no signal, a model that predicts epsilon nearly returns its input;
# v-prediction shows at inputs with about as much signal as noise.
EPSILON_SHARES, V_SHARES = (0.05,), (0.5, 0.3)
MOST_IMAGES = 2
# At the first share, a trained epsilon model has a loss of at most 0.25, and any v model one of at least
# (1 - sqrt(0.05))^2 = 0.6, as shares of the target's mean square.
IS_EPSILON, IS_NOT_EPSILON = 0.4, 0.5
# Untrained weights have losses of 1 or more for both targets.
IS_V = 0.75


@dataclass(frozen=True)
class TargetLosses:
    """Mean squared errors of a UNet's outputs against both targets, as shares of the targets' own mean squares.

    Args:
        epsilon: at inputs of almost only noise.
        v_prediction: at inputs with about as much signal as noise.
    """

    epsilon: float
    v_prediction: float

    def contradicts(self, prediction_type: str) -> bool:
        """Whether the UNet clearly predicts the other target."""
        if prediction_type == V_PREDICTION:
            return self.epsilon < IS_EPSILON
        return self.epsilon > IS_NOT_EPSILON and self.v_prediction < IS_V


@torch.no_grad()
def target_losses(loss: DenoisingLoss, images: CachedLatents, seed: int = 0) -> TargetLosses:
    """The base model's losses on the first images, one pass for each noise level, with noise from `seed`.

    Args:
        loss: of a model with discrete noise levels and no adapter, or one that changes nothing.
    """
    shares = {EPSILON: EPSILON_SHARES, V_PREDICTION: V_SHARES}
    return TargetLosses(**{name: _share_of_error(loss, images, seed, name, levels) for name, levels in shares.items()})


def _share_of_error(loss: DenoisingLoss, images: CachedLatents, seed: int, target: str, shares: Sequence[float]) -> float:
    """The mean squared error against `target` at the noise levels of these shares of signal, over the target's mean square."""
    scheduler, device = loss.noising.scheduler, loss.unet.device
    error = square = 0.0
    for index in range(min(MOST_IMAGES, len(images))):
        latents = images.mean(index)[None].to(device)
        prompts = images.prompts.repeat(int(images.prompt_of[index]), 1).to(device)
        time_ids = images.time_ids(index)[None].to(device)
        noise = torch.randn(latents.shape, generator=keyed_generator(seed, RandomStream.PREDICTION_TYPE, index)).to(device)
        for share in shares:
            timesteps = (scheduler.alphas_cumprod - share).abs().argmin()[None].to(device)
            prediction = loss.predict(latents, noise, timesteps, time_ids, prompts).float()
            expected = noise if target == EPSILON else scheduler.get_velocity(latents, noise, timesteps)
            error += mean_square(prediction - expected.float()).item()
            square += mean_square(expected.float()).item()
    return error / square


def check_prediction_type(pipeline: StableDiffusionXLPipeline, images: CachedLatents, seed: int = 0) -> None:
    """Check on `images` that the base model predicts what its scheduler declares, noise or v.

    Models with EDM noise levels and models that predict the image are not checked.

    Args:
        pipeline: the base model, without an adapter.
        images: the training images.
    Raises: InputError with both losses and the option that corrects it.
    """
    loss = DenoisingLoss(pipeline)
    declared = pipeline.scheduler.config.prediction_type
    if not isinstance(loss.noising, DiscreteNoising) or declared not in (EPSILON, V_PREDICTION):
        return
    losses = target_losses(loss, images, seed)
    if not losses.contradicts(declared):
        return
    other = V_PREDICTION if declared == EPSILON else EPSILON
    rescaled = pipeline.scheduler.config.get("rescale_betas_zero_snr")
    snr = " --rescale_betas_zero_snr False" if other == EPSILON and rescaled else ""
    raise InputError(
        f"The base model predicts {other}, not {declared}: on one batch of your images, its loss relative to the target's mean "
        f"square is {losses.epsilon:.2f} for epsilon and {losses.v_prediction:.2f} for v_prediction. A model that predicts "
        f"epsilon is below {IS_EPSILON} for epsilon; one that predicts v is below {IS_V} for v_prediction only. "
        f"Give --prediction_type {other}{snr}."
    )
