"""Running the base model on the subject, for adapters that start from its activations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from pipelines.randomness import keyed_generator
from pipelines.subject.base_model import PromptEmbeddings
from pipelines.subject.batches import EncodedPictures, stratified_timesteps
from pipelines.subject.loss import DenoisingLoss

TIMESTEPS_PER_PICTURE = 8


def runs_on_subject(loss: DenoisingLoss, pictures: EncodedPictures, seed: int) -> dict[str, Callable[[], None]]:
    """For each component, a function that runs it on the subject.

    The UNet sees every picture at `TIMESTEPS_PER_PICTURE` noise levels, the text encoders its prompts.

    Args:
        loss: holds the components.
        seed: of the noise.
    """
    latents, prompts = pictures.means, pictures.prompts

    def run_unet() -> None:
        for place in range(len(latents)):
            generator = keyed_generator(seed, 3, place)
            count = TIMESTEPS_PER_PICTURE
            timesteps = stratified_timesteps(count, loss.num_timesteps, generator).to(latents.device)
            noise = torch.randn((count, *latents.shape[1:]), generator=generator).to(latents.device)
            shown = latents[place].expand(noise.shape)
            alike = PromptEmbeddings(
                *(values[place].expand(count, *values.shape[1:]) for values in (prompts.hidden, prompts.pooled))
            )
            loss.predict(shown, noise, timesteps, pictures.time_ids[place].expand(count, 6), alike)

    def run_text_encoder(place: int) -> None:
        loss.text_encoders[place](pictures.tokens[:, place])

    return {
        "unet": run_unet,
        "text_encoder": partial(run_text_encoder, 0),
        "text_encoder_2": partial(run_text_encoder, 1),
    }
