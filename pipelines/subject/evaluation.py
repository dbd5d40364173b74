"""Held-out evaluation: the denoising loss of pictures that were not trained on, with everything fixed but the model."""

from __future__ import annotations

import torch

from pipelines.randomness import keyed_generator
from pipelines.subject.base_model import PromptEmbeddings, encode_tokens
from pipelines.subject.batches import EncodedPictures
from pipelines.subject.loss import DenoisingLoss


@torch.no_grad()
def mean_denoising_loss(
    loss: DenoisingLoss, pictures: EncodedPictures, draws: int = 64, seed: int = 0, batch_size: int = 16
) -> float:
    """The mean of the unweighted loss of each picture over `draws` timesteps, evenly spread, each with its own fixed noise.

    Prompts are encoded by the text encoders as they are now. Models are compared on the same noise and timesteps as long
    as pictures, `draws` and `seed` are the same.
    """
    latents, time_ids = pictures.means, pictures.time_ids
    generator = keyed_generator(seed)
    timesteps = ((torch.arange(draws) + 0.5) * loss.num_timesteps / draws).long()
    noise = torch.randn((draws, *latents.shape[1:]), generator=generator)
    was_training = loss.training
    loss.eval()
    prompts = encode_tokens(loss.text_encoders, pictures.tokens.transpose(0, 1))
    total = 0.0
    for picture in range(len(latents)):
        for part in torch.arange(draws).split(batch_size):
            count = len(part)
            alike = PromptEmbeddings(
                *(values[picture].expand(count, *values.shape[1:]) for values in (prompts.hidden, prompts.pooled))
            )
            arguments = (
                latents[picture].expand(count, *latents.shape[1:]),
                noise[part],
                timesteps[part],
                time_ids[picture].expand(count, 6),
            )
            total += loss.per_picture(*(argument.to(latents.device) for argument in arguments), alike).sum().item()
    loss.train(was_training)
    return total / (draws * len(latents))
