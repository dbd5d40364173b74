"""Running the base model on the subject, for adapters that start from its activations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from pipelines.randomness import keyed_generator
from pipelines.subject.base_model import PromptEmbeddings
from pipelines.subject.batches import stratified_timesteps
from pipelines.subject.encoding import EncodedPictures
from pipelines.subject.loss import DenoisingLoss

TIMESTEPS_PER_PICTURE = 8


def runs_on_subject(loss: DenoisingLoss, pictures: EncodedPictures, seed: int) -> dict[str, Callable[[], None]]:
    """For each component, a function that runs it on the subject.

    The UNet sees every picture at `TIMESTEPS_PER_PICTURE` noise levels, the text encoders its prompts.

    Args:
        loss: holds the components.
        seed: of the noise.
    """
    device, prompts = loss.unet.device, pictures.prompts

    def run_unet() -> None:
        for place in range(len(pictures)):
            generator = keyed_generator(seed, 3, place)
            count, mean = TIMESTEPS_PER_PICTURE, pictures.mean(place)
            timesteps = stratified_timesteps(count, loss.num_timesteps, generator)
            noise = torch.randn((count, *mean.shape), generator=generator)
            prompt = int(pictures.prompt_of[place])
            alike = PromptEmbeddings(
                *(values[prompt].expand(count, *values.shape[1:]).to(device) for values in (prompts.hidden, prompts.pooled))
            )
            shown = (mean.expand(noise.shape), noise, timesteps, pictures.time_ids(place).expand(count, 6))
            loss.predict(*(values.to(device) for values in shown), alike)

    def run_text_encoder(place: int) -> None:
        loss.text_encoders[place](pictures.tokens[pictures.prompt_of, place].to(device))

    return {
        "unet": run_unet,
        "text_encoder": partial(run_text_encoder, 0),
        "text_encoder_2": partial(run_text_encoder, 1),
    }
