"""Aspect-ratio buckets: the sizes that images are brought to, and the order of batches that hold one size each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import StableDiffusionXLPipeline

from pipelines.errors import InputError
from pipelines.randomness import RandomStream, keyed_generator

AUTOMATIC = "auto"
MOST_EXTREME_RATIO = 2.0
Size = tuple[int, int]


def size_multiple(pipeline: StableDiffusionXLPipeline) -> int:
    """What heights and widths in pixels must be multiples of, so that every level of VAE and UNet halves evenly."""
    return pipeline.vae_scale_factor * 2 ** (len(pipeline.unet.config.block_out_channels) - 1)


def automatic_buckets(resolution: int, multiple: int) -> tuple[Size, ...]:
    """Heights and widths that are multiples of `multiple` and together show at most as much as a square of `resolution`.

    The square itself, and for every other height the widest size; none is more than twice as long as wide.
    """
    area = resolution**2
    buckets = {(resolution, resolution)}
    for height in range(multiple, math.isqrt(area * int(MOST_EXTREME_RATIO)) + 1, multiple):
        width = area // height // multiple * multiple
        if width and max(height / width, width / height) <= MOST_EXTREME_RATIO and height != resolution:
            buckets.add((height, width))
    return tuple(sorted(buckets))


def parse_buckets(text: str, multiple: int) -> tuple[Size, ...]:
    """The sizes in `text`, as "height,width;height,width".

    Raises: InputError naming the part that is no size, or not of multiples of `multiple`.
    """
    parts = filter(None, (part.strip() for part in text.split(";")))
    buckets = dict.fromkeys(_parse_size(part, multiple) for part in parts)
    if not buckets:
        raise InputError(f"aspect_ratio_buckets must be {AUTOMATIC!r} or hold a size such as '1024,1024', got {text!r}.")
    return tuple(buckets)


def _parse_size(text: str, multiple: int) -> Size:
    numbers = [number.strip() for number in text.split(",")]
    if len(numbers) != 2 or not all(number.isascii() and number.isdigit() for number in numbers):
        raise InputError(
            f"aspect_ratio_buckets must be {AUTOMATIC!r}, or heights and widths such as '832,1216;1024,1024', got {text!r}."
        )
    size = (int(numbers[0]), int(numbers[1]))
    if any(side < multiple or side % multiple for side in size):
        raise InputError(f"aspect_ratio_buckets must hold multiples of {multiple} for this model, got {text!r}.")
    return size


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """The bucket whose shape is nearest to that of an image of height and width `size`; of equal ones the largest."""

    def distance(bucket: Size) -> tuple[float, int]:
        return abs(math.log(bucket[0] * size[1] / (bucket[1] * size[0]))), -bucket[0] * bucket[1]

    return min(buckets, key=distance)


@dataclass(frozen=True)
class BucketOrder:
    """Which images each batch holds, all of one bucket: a function of the seed and the batch's index alone.

    In a cycle of as many batches as there are images, in a new order each time, every bucket has as many batches as it
    has images. Within a bucket every image comes once in every round of all its images, in a new order each time.
    So each image comes equally often, whatever its bucket.

    Args:
        buckets: for each bucket the places of its images.
        batch_size: images in a batch.
        seed: of the orders.
        stream: the random stream of the order; another stream gives another order for the same seed.
    """

    buckets: tuple[tuple[int, ...], ...]
    batch_size: int
    seed: int
    stream: RandomStream = RandomStream.ORDER

    def of_batch(self, index: int) -> tuple[int, int]:
        """The bucket of the `index`-th batch, and how many batches before it were of that bucket."""
        counts = torch.tensor([len(members) for members in self.buckets])
        if len(counts) == 1:
            return 0, index
        epoch, position = divmod(index, int(counts.sum()))
        owners = torch.repeat_interleave(torch.arange(len(counts)), counts)
        order = owners[
            torch.randperm(len(owners), generator=keyed_generator(self.seed, RandomStream.BUCKETS, epoch, self.stream))
        ]
        bucket = int(order[position])
        return bucket, epoch * int(counts[bucket]) + int((order[:position] == bucket).sum())

    def chosen(self, bucket: int, before: int) -> list[int]:
        """The places of the images in a bucket's batch that `before` batches of that bucket precede."""
        members = self.buckets[bucket]
        wanted = range(before * self.batch_size, (before + 1) * self.batch_size)
        rounds = {
            epoch: torch.randperm(len(members), generator=keyed_generator(self.seed, self.stream, epoch, bucket)).tolist()
            for epoch in {position // len(members) for position in wanted}
        }
        return [members[rounds[position // len(members)][position % len(members)]] for position in wanted]
