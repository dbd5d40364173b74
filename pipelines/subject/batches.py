"""Training batches of a subject; batch k is a function of the seed and k."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from pipelines.buckets import BucketOrder
from pipelines.randomness import RandomStream, keyed_generator
from pipelines.subject.encoding import CachedLatents


@dataclass(frozen=True)
class SubjectBatches:
    """Samples batches of images of one size, noise and timesteps, all on the CPU.

    With `class_images` (prior preservation), each image of the subject is followed by a class image, so that every process gets
    pairs. The mean of the weighted losses is then the mean over the subject's images plus `prior_loss_weight` times the mean over
    the class images.  [Ruiz et al. 2023, eq. 2]

    Args:
        images: of one subject or several.
        encode_in_loss: return tokens instead of prompt embeddings, for text encoders that are trained.
        batch_size: images of the subject in a batch, over all processes.
        num_timesteps: of the model's noise schedule.
        seed: of all sampling.
        class_images: images of the class, with some in every size of `images`; None for no prior preservation.
        prior_loss_weight: the weight of the loss on class images.
    """

    images: CachedLatents
    encode_in_loss: bool
    batch_size: int
    num_timesteps: int
    seed: int
    class_images: CachedLatents | None = None
    prior_loss_weight: float = 1.0

    @property
    def per_epoch(self) -> int:
        """The number of batches that are as many images as there are."""
        return math.ceil(len(self.images) / self.batch_size)

    @cached_property
    def _order(self) -> BucketOrder:
        return BucketOrder(self.images.buckets(), self.batch_size, self.seed)

    @cached_property
    def _class_order(self) -> BucketOrder:
        buckets = self.class_images.buckets(sorted(set(self.images.sizes)))
        return BucketOrder(buckets, self.batch_size, self.seed, RandomStream.CLASS_ORDER)

    def chosen(self, index: int) -> list[int]:
        """The indices of the subject's images in the `index`-th batch."""
        return self._order.chosen(*self._order.of_batch(index))

    def __call__(self, index: int) -> dict[str, torch.Tensor]:
        """The `index`-th batch, as keyword arguments of `DenoisingLoss`."""
        generator = keyed_generator(self.seed, RandomStream.BATCH, index)
        bucket, before = self._order.of_batch(index)
        batch = self._sampled(self.images, self._order.chosen(bucket, before), generator)
        if self.class_images is None:
            return batch
        others = self._sampled(self.class_images, self._class_order.chosen(bucket, before), generator)
        pairs = {name: torch.stack([values, others[name]], dim=1).flatten(0, 1) for name, values in batch.items()}
        # Doubled, as the mean is over twice as many losses.
        return pairs | {"weights": torch.tensor([2.0, 2.0 * self.prior_loss_weight]).repeat(self.batch_size)}

    def _sampled(self, images: CachedLatents, indices: Sequence[int], generator: torch.Generator) -> dict[str, torch.Tensor]:
        variants = torch.randint(images.variants, (len(indices),), generator=generator)
        variants_read = [images.read(index, variant) for index, variant in zip(indices, variants.tolist(), strict=True)]
        mean, deviation = torch.stack([moments for moments, _ in variants_read]).unbind(1)
        spread, noise = torch.randn((2, *mean.shape), generator=generator)
        batch = {
            "latents": mean + deviation * spread,
            "noise": noise,
            "timesteps": stratified_timesteps(len(indices), self.num_timesteps, generator),
            "time_ids": torch.stack([time_ids for _, time_ids in variants_read]),
        }
        prompts = images.prompt_of[list(indices)]
        if self.encode_in_loss:
            return batch | {"tokens": images.tokens[prompts]}
        return batch | {"hidden": images.prompts.hidden[prompts], "pooled": images.prompts.pooled[prompts]}


def stratified_timesteps(count: int, num_timesteps: int, generator: torch.Generator) -> torch.Tensor:
    """(count,) int64: one timestep from each of `count` equal parts of the schedule, in random order; each is uniform."""
    parts = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
    return (parts * num_timesteps / count).long().clamp(max=num_timesteps - 1)
