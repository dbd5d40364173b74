"""Running the base model on the subject, for adapters that are initialised from its activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from tqdm.auto import tqdm

from pipelines.randomness import RandomStream, keyed_generator
from pipelines.subject.batches import stratified_timesteps
from pipelines.subject.encoding import CachedLatents
from pipelines.subject.loss import DenoisingLoss

TIMESTEPS_PER_IMAGE = 8


def runs_on_subject(
    loss: DenoisingLoss,
    images: CachedLatents,
    seed: int,
    process: int = 0,
    processes: int = 1,
    batch_size: int = TIMESTEPS_PER_IMAGE,
) -> dict[str, Callable[[], None]]:
    """For each component, a function that runs it on the subject.

    The UNet gets every image at `TIMESTEPS_PER_IMAGE` noise levels, the text encoders its prompts. Noise and noise levels depend
    only on `seed` and the image.

    Args:
        loss: holds the components.
        seed: of the noise.
        process, processes: rank of this process and number of processes; each runs its share of the images, and statistics are
            summed over all.
        batch_size: maximum number of noise levels at once; at the training batch size, this needs less memory than a step.
    """
    indices, device = range(process, len(images), processes), loss.unet.device
    bar = partial(tqdm, leave=False, delay=5, disable=process > 0)

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        for index in indices:
            yield from _noise_levels(images, index, loss.num_timesteps, seed, batch_size)

    def run_unet() -> None:
        total = len(indices) * math.ceil(TIMESTEPS_PER_IMAGE / batch_size)
        for batch in bar(batches(), desc="calibrating", total=total):
            prompts = images.prompts.repeat(int(batch.pop("prompt")), len(batch["timesteps"])).to(device)
            loss.predict(**{name: values.to(device) for name, values in batch.items()}, prompts=prompts)

    def run_text_encoder(encoder: int) -> None:
        # One at a time, so that sums over several processes equal those of one process bit for bit.
        for index in bar(indices, desc=f"calibrating text encoder {encoder + 1}"):
            loss.text_encoders[encoder](images.tokens[images.prompt_of[index], encoder][None].to(device))

    return {"unet": run_unet, "text_encoder": partial(run_text_encoder, 0), "text_encoder_2": partial(run_text_encoder, 1)}


def _noise_levels(
    images: CachedLatents, index: int, num_timesteps: int, seed: int, batch_size: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of the image at `index` at up to `batch_size` noise levels, with the index of its prompt, ()."""
    generator = keyed_generator(seed, RandomStream.CALIBRATION, index)
    mean, time_ids = images.mean(index), images.time_ids(index)
    timesteps = stratified_timesteps(TIMESTEPS_PER_IMAGE, num_timesteps, generator)
    noise = torch.randn((TIMESTEPS_PER_IMAGE, *mean.shape), generator=generator)
    for levels, part in zip(timesteps.split(batch_size), noise.split(batch_size), strict=True):
        yield {
            "latents": mean.expand(part.shape),
            "noise": part,
            "timesteps": levels,
            "time_ids": time_ids.expand(len(part), 6),
            "prompt": images.prompt_of[index],
        }
