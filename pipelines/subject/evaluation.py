"""Held-out evaluation: the denoising loss of images that were not trained on, with fixed noise and timesteps."""

from __future__ import annotations

import torch

from pipelines.randomness import keyed_generator
from pipelines.subject.base_model import encode_tokens
from pipelines.subject.encoding import CachedLatents
from pipelines.subject.loss import DenoisingLoss

# The share of height and width about the middle of an image where the subject is expected.
MIDDLE = 0.5


def middle_of(values: torch.Tensor) -> torch.Tensor:
    """The middle of (..., height, width): `MIDDLE` of the height and of the width."""
    height, width = values.shape[-2:]
    rows, columns = (slice(round(side * (1 - MIDDLE) / 2), round(side * (1 + MIDDLE) / 2)) for side in (height, width))
    return values[..., rows, columns]


@torch.no_grad()
def mean_denoising_loss(
    loss: DenoisingLoss,
    images: CachedLatents,
    num_timesteps: int = 64,
    seed: int = 0,
    batch_size: int = 16,
    limit: int | None = None,
) -> float:
    """The mean unweighted denoising loss of `images`, with fixed noise and timesteps.

    Only the middle of an image counts, where the subject is: no adapter can predict the background of an image that it has
    not seen, and the better it learns the other backgrounds, the more the unseen one would dominate the loss.
    Prompts are encoded with the current text encoders. With the same images, `num_timesteps` and `seed`, all models are
    compared on the same noise.

    Args:
        num_timesteps: timesteps for each image, evenly spaced, each with its own noise.
        limit: how many images to measure, the first ones; None for all.
    """
    timesteps = ((torch.arange(num_timesteps) + 0.5) * loss.num_timesteps / num_timesteps).long()
    device, was_training = loss.unet.device, loss.training
    loss.eval()
    prompts = encode_tokens(loss.text_encoders, images.tokens.transpose(0, 1).to(device))
    total, measured = 0.0, range(len(images))[:limit]
    for index in measured:
        latents, prompt = images.mean(index), int(images.prompt_of[index])
        noise = torch.randn((num_timesteps, *latents.shape), generator=keyed_generator(seed))
        for part in torch.arange(num_timesteps).split(batch_size):
            pixels = (latents.expand(noise[part].shape).to(device), noise[part].to(device))
            levels, time_ids = timesteps[part].to(device), images.time_ids(index).expand(len(part), 6).to(device)
            prediction = loss.predict(*pixels, levels, time_ids, prompts.repeat(prompt, len(part)))
            total += loss.noising.errors(*(middle_of(values) for values in (prediction, *pixels)), levels).sum().item()
    loss.train(was_training)
    return total / (num_timesteps * len(measured))
