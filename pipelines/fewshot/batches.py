"""Training batches of labelled images: batch k is a function of the seed and k alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from open_clip import get_model_preprocess_cfg
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms import Compose, RandomHorizontalFlip

from pipelines.buckets import BucketOrder
from pipelines.clip import Clip
from pipelines.fewshot.data import LabelledImage, read
from pipelines.randomness import RandomStream, keyed_generator

# Decoded images are kept up to this many bytes, each no larger than crops of it need.
KEPT_BYTES = 2**29
CHANNELS = 3


@dataclass(frozen=True)
class Augmentation:
    """How training images are altered, each time they are seen.

    Args:
        crop_scale: the share of an image's area that a random crop takes, at least and at most.
        random_flip: mirror every other image.
    """

    crop_scale: tuple[float, float] = (0.5, 1.0)
    random_flip: bool = False

    def transform(self, clip: Clip) -> Callable[[Image.Image], torch.Tensor]:
        """A PIL image to pixels (3, h, w) of a random crop, otherwise as `clip.preprocess`; draws from torch's generator."""
        settings = PreprocessCfg(**get_model_preprocess_cfg(clip.model))
        cropped = image_transform_v2(settings, is_train=True, aug_cfg={"scale": self.crop_scale})
        return Compose([RandomHorizontalFlip(), cropped]) if self.random_flip else cropped


class AlteredImages:
    """Images, altered at random, as a model takes them.

    Args:
        images: what is learned from.
        augmentation: what is done to them.
        clip: the model that takes them.
    """

    def __init__(self, images: Sequence[LabelledImage], augmentation: Augmentation, clip: Clip) -> None:
        self.images, self.transform = tuple(images), augmentation.transform(clip)
        size = PreprocessCfg(**get_model_preprocess_cfg(clip.model)).size
        # A crop of the least area still has as many pixels as the model takes.
        self.side = round((size if isinstance(size, int) else max(size)) / augmentation.crop_scale[0] ** 0.5)
        self._read = lru_cache(maxsize=max(1, KEPT_BYTES // (2 * CHANNELS * self.side**2)))(self._shrunk)

    def _shrunk(self, place: int) -> Image.Image:
        image = read(self.images[place])
        factor = self.side / min(image.size)
        if factor >= 1:
            return image
        width, height = (max(self.side, round(factor * length)) for length in image.size)
        return image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3)

    def drawn(self, places: Sequence[int], generator: torch.Generator) -> torch.Tensor:
        """The images at `places`, altered as `generator`'s seed decides: (n, 3, h, w)."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator.initial_seed())
            return torch.stack([self.transform(self._read(place)) for place in places])


class AlteredView(Dataset):
    """One altered view of every image, for encoding: (pixels (3, h, w), label).

    Args:
        images: that are altered.
        seed, view: decide how.
    """

    def __init__(self, images: AlteredImages, seed: int, view: int) -> None:
        self.altered, self.key = images, (seed, RandomStream.VIEWS, view)

    def __len__(self) -> int:
        return len(self.altered.images)

    def __getitem__(self, place: int) -> tuple[torch.Tensor, int]:
        pixels = self.altered.drawn([place], keyed_generator(*self.key, place))
        return pixels[0], self.altered.images[place].label


@dataclass(frozen=True)
class DrawnViews:
    """Features of images, computed once, for an image encoder that is frozen; each in one of its views.

    Args:
        views: (v, n, d), features of length 1 of v views of n images, such as `Examples.all_views` gives.
    """

    views: torch.Tensor

    def drawn(self, places: Sequence[int], generator: torch.Generator) -> torch.Tensor:
        """The features of the images at `places`, (n, d)."""
        return self.views[torch.randint(len(self.views), (len(places),), generator=generator), list(places)]


@dataclass(frozen=True)
class LabelledBatches:
    """Every image comes once in every round of all of them, in a new order each time.

    Args:
        images: what a batch is drawn from.
        labels: (n,) int64, of its images.
        batch_size: images in a batch, over all processes.
        seed: of the order and of what is drawn.
    """

    images: AlteredImages | DrawnViews
    labels: torch.Tensor
    batch_size: int
    seed: int

    @cached_property
    def _order(self) -> BucketOrder:
        return BucketOrder((tuple(range(len(self.labels))),), self.batch_size, self.seed)

    def __call__(self, index: int) -> dict[str, torch.Tensor]:
        """The `index`-th batch, as keyword arguments of `ClassificationLoss`."""
        places, generator = self._order.chosen(0, index), keyed_generator(self.seed, RandomStream.CROPS, index)
        return {"images": self.images.drawn(places, generator), "labels": self.labels[places]}
