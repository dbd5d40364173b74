"""Training batches of labelled pictures: batch k is a function of the seed and k alone."""

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
from pipelines.fewshot.data import LabelledPicture, read
from pipelines.randomness import Draw, keyed_generator

# Decoded pictures are kept up to this many bytes, each no larger than crops of it need.
KEPT_BYTES = 2**29
CHANNELS = 3


@dataclass(frozen=True)
class Augmentation:
    """How training pictures are altered, each time they are seen.

    Args:
        crop_scale: the share of a picture's area that a random crop takes, at least and at most.
        random_flip: mirror every other picture.
    """

    crop_scale: tuple[float, float] = (0.5, 1.0)
    random_flip: bool = False

    def transform(self, clip: Clip) -> Callable[[Image.Image], torch.Tensor]:
        """A PIL picture to pixels (3, h, w) of a random crop, otherwise as `clip.preprocess`; draws from torch's generator."""
        settings = PreprocessCfg(**get_model_preprocess_cfg(clip.model))
        cropped = image_transform_v2(settings, is_train=True, aug_cfg={"scale": self.crop_scale})
        return Compose([RandomHorizontalFlip(), cropped]) if self.random_flip else cropped


class AlteredPictures:
    """Pictures, altered at random, as a model takes them.

    Args:
        pictures: what is learned from.
        augmentation: what is done to them.
        clip: the model that takes them.
    """

    def __init__(self, pictures: Sequence[LabelledPicture], augmentation: Augmentation, clip: Clip) -> None:
        self.pictures, self.transform = tuple(pictures), augmentation.transform(clip)
        size = PreprocessCfg(**get_model_preprocess_cfg(clip.model)).size
        # A crop of the least area still has as many pixels as the model takes.
        self.side = round((size if isinstance(size, int) else max(size)) / augmentation.crop_scale[0] ** 0.5)
        self._read = lru_cache(maxsize=max(1, KEPT_BYTES // (2 * CHANNELS * self.side**2)))(self._shrunk)

    def _shrunk(self, place: int) -> Image.Image:
        picture = read(self.pictures[place])
        factor = self.side / min(picture.size)
        if factor >= 1:
            return picture
        width, height = (max(self.side, round(factor * length)) for length in picture.size)
        return picture.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3)

    def drawn(self, places: Sequence[int], generator: torch.Generator) -> torch.Tensor:
        """The pictures at `places`, altered as `generator`'s seed decides: (n, 3, h, w)."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator.initial_seed())
            return torch.stack([self.transform(self._read(place)) for place in places])


class AlteredView(Dataset):
    """One altered view of every picture, for encoding: (pixels (3, h, w), label).

    Args:
        pictures: that are altered.
        seed, view: decide how.
    """

    def __init__(self, pictures: AlteredPictures, seed: int, view: int) -> None:
        self.altered, self.key = pictures, (seed, Draw.VIEWS, view)

    def __len__(self) -> int:
        return len(self.altered.pictures)

    def __getitem__(self, place: int) -> tuple[torch.Tensor, int]:
        pixels = self.altered.drawn([place], keyed_generator(*self.key, place))
        return pixels[0], self.altered.pictures[place].label


@dataclass(frozen=True)
class DrawnViews:
    """Features of pictures, computed once, for an image encoder that is frozen; each in one of its views.

    Args:
        views: (v, n, d), features of length 1 of v views of n pictures, such as `Examples.all_views` gives.
    """

    views: torch.Tensor

    def drawn(self, places: Sequence[int], generator: torch.Generator) -> torch.Tensor:
        """The features of the pictures at `places`, (n, d)."""
        return self.views[torch.randint(len(self.views), (len(places),), generator=generator), list(places)]


@dataclass(frozen=True)
class LabelledBatches:
    """Every picture comes once in every round of all of them, in a new order each time.

    Args:
        pictures: what a batch is drawn from.
        labels: (n,) int64, of its pictures.
        batch_size: pictures in a batch, over all processes.
        seed: of the order and of what is drawn.
    """

    pictures: AlteredPictures | DrawnViews
    labels: torch.Tensor
    batch_size: int
    seed: int

    @cached_property
    def _order(self) -> BucketOrder:
        return BucketOrder((tuple(range(len(self.labels))),), self.batch_size, self.seed)

    def __call__(self, index: int) -> dict[str, torch.Tensor]:
        """The `index`-th batch, as keyword arguments of `ClassificationLoss`."""
        places, generator = self._order.chosen(0, index), keyed_generator(self.seed, Draw.CROPS, index)
        return {"pictures": self.pictures.drawn(places, generator), "labels": self.labels[places]}
