"""Running the base model on the subject, for adapters that start from its activations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from pipelines.randomness import Draw, keyed_generator
from pipelines.subject.base_model import PromptEmbeddings
from pipelines.subject.batches import stratified_timesteps
from pipelines.subject.encoding import EncodedPictures
from pipelines.subject.loss import DenoisingLoss

TIMESTEPS_PER_PICTURE = 8


def runs_on_subject(
    loss: DenoisingLoss, pictures: EncodedPictures, seed: int, process: int = 0, processes: int = 1
) -> dict[str, Callable[[], None]]:
    """For each component, a function that runs it on the subject.

    The UNet sees every picture at `TIMESTEPS_PER_PICTURE` noise levels, the text encoders its prompts.

    Args:
        loss: holds the components.
        seed: of the noise.
        process, processes: which of how many; statistics are summed over all of them, so that each runs its share of pictures.
    """
    own = range(process, len(pictures), processes)
    device, prompts = loss.unet.device, pictures.prompts

    def run_unet() -> None:
        for place in own:
            generator = keyed_generator(seed, Draw.CALIBRATION, place)
            count, mean = TIMESTEPS_PER_PICTURE, pictures.mean(place)
            timesteps = stratified_timesteps(count, loss.num_timesteps, generator)
            noise = torch.randn((count, *mean.shape), generator=generator)
            prompt = int(pictures.prompt_of[place])
            alike = PromptEmbeddings(
                *(values[prompt].expand(count, *values.shape[1:]).to(device) for values in (prompts.hidden, prompts.pooled))
            )
            shown = (mean.expand(noise.shape), noise, timesteps, pictures.time_ids(place).expand(count, 6))
            loss.predict(*(values.to(device) for values in shown), alike)

    def run_text_encoder(encoder: int) -> None:
        # One by one: sums over processes are then those of one process to the last bit.
        for place in own:
            loss.text_encoders[encoder](pictures.tokens[pictures.prompt_of[place], encoder][None].to(device))

    return {
        "unet": run_unet,
        "text_encoder": partial(run_text_encoder, 0),
        "text_encoder_2": partial(run_text_encoder, 1),
    }
