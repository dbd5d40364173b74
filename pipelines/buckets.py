"""Aspect-ratio buckets: the sizes that images are resized and cropped to, and the order of batches of one size each."""

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
    """Heights and widths in pixels must be multiples of this, so that every level of VAE and UNet halves them evenly."""
    return pipeline.vae_scale_factor * 2 ** (len(pipeline.unet.config.block_out_channels) - 1)


def automatic_buckets(resolution: int, multiple: int) -> tuple[Size, ...]:
    """(height, width) buckets of at most `resolution`^2 pixels, with sides that are multiples of `multiple`.

    These are the square and, for every other height, the largest width. One side is at most twice the other.
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

    Raises: InputError if `text` holds no size, or a side that is not a multiple of `multiple`.
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
    """The bucket whose aspect ratio is nearest to that of `size`, (height, width); among equally near ones the largest."""

    def distance(bucket: Size) -> tuple[float, int]:
        return abs(math.log(bucket[0] * size[1] / (bucket[1] * size[0]))), -bucket[0] * bucket[1]

    return min(buckets, key=distance)


@dataclass(frozen=True)
class BucketOrder:
    """The images of each batch, all from one bucket, as a function of the seed and the batch's index.

    An epoch has as many batches as there are images, and each bucket has as many of them as it has images, in shuffled order.
    Within a bucket, the images are shuffled, and all are used once before any is used again. So all images are used equally
    often, whatever their bucket.

    Args:
        buckets: the indices of the images in each bucket.
        batch_size: images in a batch.
        seed: of the shuffling.
        stream: the random stream of the shuffling; another stream gives another order for the same seed.
    """

    buckets: tuple[tuple[int, ...], ...]
    batch_size: int
    seed: int
    stream: RandomStream = RandomStream.ORDER

    def of_batch(self, index: int) -> tuple[int, int]:
        """The bucket of the `index`-th batch, and the number of earlier batches from that bucket."""
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
        """The indices of the images in a bucket's batch, after `before` earlier batches from that bucket."""
        members = self.buckets[bucket]
        wanted = range(before * self.batch_size, (before + 1) * self.batch_size)
        orders = {
            epoch: torch.randperm(len(members), generator=keyed_generator(self.seed, self.stream, epoch, bucket)).tolist()
            for epoch in {position // len(members) for position in wanted}
        }
        return [members[orders[position // len(members)][position % len(members)]] for position in wanted]
