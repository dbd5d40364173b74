"""Training batches of a subject: batch k is a function of the seed and k alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import StableDiffusionXLPipeline

from pipelines.randomness import keyed_generator
from pipelines.subject.base_model import PromptEmbeddings, encode_pictures, encode_prompts, tokenize
from pipelines.subject.data import Example


@dataclass(frozen=True)
class EncodedPictures:
    """Pictures of a subject with their prompts, as the UNet takes them.

    Args:
        latents: (pictures, variants, 2, channels, height, width): scaled means and deviations of each picture and, where
            pictures are mirrored, of its mirror image.
        time_ids: (pictures, 6), as in `Example`.
        tokens: (pictures, encoders, tokens) int64.
        prompts: the same, encoded by the base model.
    """

    latents: torch.Tensor
    time_ids: torch.Tensor
    tokens: torch.Tensor
    prompts: PromptEmbeddings

    @property
    def means(self) -> torch.Tensor:
        """(pictures, channels, height, width): the mean latents, not mirrored."""
        return self.latents[:, 0, 0]


def encode_examples(
    pipeline: StableDiffusionXLPipeline, examples: Sequence[Example], prompts: Sequence[str], mirror: bool = False
) -> EncodedPictures:
    """Encode pictures and their prompts once, for a whole training."""
    variants = [torch.stack([example.pixels for example in examples])]
    if mirror:
        # The crop is central, so that a mirrored picture has the same time_ids.
        variants.append(variants[0].flip(-1))
    latents = torch.stack([encode_pictures(pipeline, pixels) for pixels in variants], dim=1)
    time_ids = torch.stack([example.time_ids for example in examples]).to(latents.device)
    tokens = tokenize((pipeline.tokenizer, pipeline.tokenizer_2), prompts).to(latents.device)
    return EncodedPictures(latents, time_ids, tokens.transpose(0, 1), encode_prompts(pipeline, prompts))


@dataclass(frozen=True)
class SubjectBatches:
    """Draws batches of pictures, noise and timesteps.

    Each picture comes once in every round of all pictures, in a new order each time; the timesteps of a batch are
    spread evenly over the noise levels.

    Args:
        pictures: what to draw from.
        encode_in_loss: hand out tokens rather than encoded prompts, for text encoders that are trained.
        batch_size: pictures in a batch, over all processes.
        num_timesteps: of the model's noise schedule.
        seed: of all that is drawn.
    """

    pictures: EncodedPictures
    encode_in_loss: bool
    batch_size: int
    num_timesteps: int
    seed: int

    def chosen(self, index: int) -> torch.Tensor:
        """Which pictures the `index`-th batch holds: (batch_size,) int64."""
        count = len(self.pictures.latents)
        places = torch.arange(index * self.batch_size, (index + 1) * self.batch_size)
        rounds = places // count
        orders = {turn: torch.randperm(count, generator=keyed_generator(self.seed, 0, turn)) for turn in rounds.unique().tolist()}
        return torch.stack([orders[turn][place] for turn, place in zip(rounds.tolist(), (places % count).tolist(), strict=True)])

    def __call__(self, index: int) -> dict[str, torch.Tensor]:
        """The `index`-th batch, as keyword arguments of `DenoisingLoss`."""
        generator = keyed_generator(self.seed, 1, index)
        pictures, chosen = self.pictures, self.chosen(index)
        variants = torch.randint(pictures.latents.shape[1], (self.batch_size,), generator=generator)
        mean, deviation = pictures.latents[chosen, variants].unbind(1)
        spread, noise = torch.randn((2, *mean.shape), generator=generator).to(mean.device)
        batch = {
            "latents": mean + deviation * spread,
            "noise": noise,
            "timesteps": stratified_timesteps(self.batch_size, self.num_timesteps, generator),
            "time_ids": pictures.time_ids[chosen],
        }
        if self.encode_in_loss:
            return batch | {"tokens": pictures.tokens[chosen]}
        return batch | {"hidden": pictures.prompts.hidden[chosen], "pooled": pictures.prompts.pooled[chosen]}


def stratified_timesteps(count: int, num_timesteps: int, generator: torch.Generator) -> torch.Tensor:
    """One timestep from each of `count` equal parts of the schedule, in random order: (count,) int64; each is uniform."""
    parts = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
    return (parts * num_timesteps / count).long().clamp(max=num_timesteps - 1)
