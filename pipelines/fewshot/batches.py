"""Training batches of labelled images: batch k is a function of the seed and k."""

from __future__ import annotations

import math
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

# Size of the cache of decoded images, each stored no larger than its crops need.
CACHE_BYTES = 2**29
CHANNELS = 3


@dataclass(frozen=True)
class Augmentation:
    """Random augmentation of training images.

    Args:
        crop_scale: smallest and largest share of the image's area in a random crop.
        random_flip: mirror images with probability 1/2.
    """

    crop_scale: tuple[float, float] = (0.5, 1.0)
    random_flip: bool = False

    def transform(self, clip: Clip) -> Callable[[Image.Image], torch.Tensor]:
        """A PIL image to pixels (3, h, w) of a random crop, otherwise as `clip.preprocess`; uses torch's global generator."""
        settings = PreprocessCfg(**get_model_preprocess_cfg(clip.model))
        cropped = image_transform_v2(settings, is_train=True, aug_cfg={"scale": self.crop_scale})
        return Compose([RandomHorizontalFlip(), cropped]) if self.random_flip else cropped


class AugmentedImages:
    """Images with random augmentation, as inputs of a model.

    Args:
        images: the training images.
        augmentation: applied to each image.
        clip: the model that defines resolution and normalisation.
    """

    def __init__(self, images: Sequence[LabelledImage], augmentation: Augmentation, clip: Clip) -> None:
        self.images, self.transform = tuple(images), augmentation.transform(clip)
        size = PreprocessCfg(**get_model_preprocess_cfg(clip.model)).size
        # The smallest crop still has the resolution of the model.
        self.side = round((size if isinstance(size, int) else max(size)) / augmentation.crop_scale[0] ** 0.5)
        self._read = lru_cache(maxsize=max(1, CACHE_BYTES // (2 * CHANNELS * self.side**2)))(self._shrunk)

    def _shrunk(self, index: int) -> Image.Image:
        image = read(self.images[index])
        factor = self.side / min(image.size)
        if factor >= 1:
            return image
        width, height = (max(self.side, round(factor * length)) for length in image.size)
        return image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3)

    def sample(self, indices: Sequence[int], generator: torch.Generator) -> torch.Tensor:
        """The images at `indices`, augmented with the seed of `generator`: (n, 3, h, w)."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator.initial_seed())
            return torch.stack([self.transform(self._read(index)) for index in indices])


class AugmentedView(Dataset):
    """One augmented view of every image: (pixels (3, h, w), label).

    Args:
        images: the images.
        seed, view: determine the augmentation.
    """

    def __init__(self, images: AugmentedImages, seed: int, view: int) -> None:
        self.augmented, self.key = images, (seed, RandomStream.VIEWS, view)

    def __len__(self) -> int:
        return len(self.augmented.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        pixels = self.augmented.sample([index], keyed_generator(*self.key, index))
        return pixels[0], self.augmented.images[index].label


@dataclass(frozen=True)
class SampledViews:
    """Features of a frozen image encoder, computed once for several views, of which a random one is used for each image.

    Args:
        views: (v, n, d), features of length 1 of v views of n images, such as `Examples.all_views` gives.
    """

    views: torch.Tensor

    def sample(self, indices: Sequence[int], generator: torch.Generator) -> torch.Tensor:
        """The features of the images at `indices`, (n, d)."""
        return self.views[torch.randint(len(self.views), (len(indices),), generator=generator), list(indices)]


@dataclass(frozen=True)
class LabelledBatches:
    """Batches in which every image occurs once per epoch, reshuffled each epoch.

    Args:
        images: the images, or their features.
        labels: (n,) int64.
        batch_size: images in a batch, over all processes.
        seed: of the order and the augmentation.
    """

    images: AugmentedImages | SampledViews
    labels: torch.Tensor
    batch_size: int
    seed: int

    @property
    def per_epoch(self) -> int:
        """The number of batches in which every image occurs at least once."""
        return math.ceil(len(self.labels) / self.batch_size)

    @cached_property
    def _order(self) -> BucketOrder:
        return BucketOrder((tuple(range(len(self.labels))),), self.batch_size, self.seed)

    def __call__(self, index: int) -> dict[str, torch.Tensor]:
        """The `index`-th batch as keyword arguments of `ClassificationLoss`: images or features (n, ...), labels (n,)."""
        indices, generator = self._order.chosen(0, index), keyed_generator(self.seed, RandomStream.CROPS, index)
        return {"images": self.images.sample(indices, generator), "labels": self.labels[indices]}
