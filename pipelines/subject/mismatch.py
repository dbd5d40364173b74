"""Whether a base model predicts what it is said to predict, by one batch of the images to be trained on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import StableDiffusionXLPipeline

from pipelines.errors import InputError
from pipelines.randomness import Draw, keyed_generator
from pipelines.subject.base_model import PromptEmbeddings
from pipelines.subject.encoding import EncodedPictures
from pipelines.subject.loss import DenoisingLoss
from pipelines.subject.noising import DiscreteNoising, mean_square
from pipelines.subject.prediction import EPSILON, V_PREDICTION

# Shares of signal at which noise and velocity differ plainly, and a trained model predicts either well.
SIGNAL_SHARES = (0.5, 0.3, 0.15)
MOST_IMAGES = 2
# A model trained on the other target leaves less than this share of its variance; one with random weights leaves all of both.
EXPLAINED = 0.6
# And less than this part of what it leaves of the target that it is said to predict.
CLEARLY_LESS = 0.5


@dataclass(frozen=True)
class TargetLosses:
    """The mean squared error of a UNet's outputs against both targets, each as a share of the target's own mean square.

    A UNet that knows nothing of a target has about 1 or more, one trained on it far less.
    """

    epsilon: float
    v_prediction: float

    def better_than(self, prediction_type: str) -> str | None:
        """The other target, where it fits clearly better than `prediction_type`; None where it does not."""
        other = V_PREDICTION if prediction_type == EPSILON else EPSILON
        said, found = getattr(self, prediction_type), getattr(self, other)
        return other if found < EXPLAINED and found < CLEARLY_LESS * said else None


@torch.no_grad()
def target_losses(loss: DenoisingLoss, images: EncodedPictures, seed: int = 0) -> TargetLosses:
    """The base model's losses on the first images, one pass for each noise level, with noise from `seed`.

    Args:
        loss: of a model of discrete noise levels; its UNet has no adapter, or one that changes nothing.
    """
    scheduler, device = loss.noising.scheduler, loss.unet.device
    signal = scheduler.alphas_cumprod
    levels = torch.stack([(signal - share).abs().argmin() for share in SIGNAL_SHARES])
    errors = dict.fromkeys((EPSILON, V_PREDICTION), 0.0)
    squares = dict(errors)
    for place in range(min(MOST_IMAGES, len(images))):
        latents, prompt = images.mean(place)[None].to(device), int(images.prompt_of[place])
        hidden, pooled = (values[prompt][None].to(device) for values in (images.prompts.hidden, images.prompts.pooled))
        for number, level in enumerate(levels):
            noise = torch.randn(latents.shape, generator=keyed_generator(seed, Draw.PREDICTION_TYPE, place, number)).to(device)
            timesteps, time_ids = level[None].to(device), images.time_ids(place)[None].to(device)
            answer = loss.predict(latents, noise, timesteps, time_ids, PromptEmbeddings(hidden, pooled)).float()
            targets = {EPSILON: noise, V_PREDICTION: scheduler.get_velocity(latents, noise, timesteps)}
            for name, target in targets.items():
                errors[name] += mean_square(answer - target.float()).item()
                squares[name] += mean_square(target.float()).item()
    return TargetLosses(**{name: errors[name] / squares[name] for name in errors})


def check_prediction_type(pipeline: StableDiffusionXLPipeline, images: EncodedPictures, seed: int = 0) -> None:
    """Refuse a base model that predicts noise where v is said to be predicted, or the other way round.

    Models of EDM's noise levels and those that predict the image itself are taken as they are.

    Args:
        pipeline: the base model, without an adapter.
        images: to be trained on.
    Raises: InputError with both losses and the option that mends it.
    """
    loss = DenoisingLoss(pipeline)
    said = pipeline.scheduler.config.prediction_type
    if not isinstance(loss.noising, DiscreteNoising) or said not in (EPSILON, V_PREDICTION):
        return
    losses = target_losses(loss, images, seed)
    other = losses.better_than(said)
    if other is None:
        return
    snr = (
        " --rescale_betas_zero_snr False" if other == EPSILON and pipeline.scheduler.config.get("rescale_betas_zero_snr") else ""
    )
    raise InputError(
        f"The base model predicts {other}, not {said}: on one batch of your images it leaves {getattr(losses, other):.2f} of the "
        f"{other} target's variance and {getattr(losses, said):.2f} of the {said} target's. Give --prediction_type {other}{snr}."
    )
