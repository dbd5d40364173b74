"""Image features of the built-in CLIP that are kept by the images' content, and zero-shot predictions with them."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property

import torch

from pipelines.clip import BUILT_IN, Clip, load_clip
from pipelines.fewshot.data import LabelledImage, LabelledImageDataset
from pipelines.fewshot.features import image_features, prompt_features
from pipelines.fewshot.prompts import make_prompts
from pipelines.fewshot.sources import DatasetSource

MOST_FEATURES = 20_000


class FeatureCache:
    """The features of the images used last; for one thread at a time."""

    def __init__(self) -> None:
        self._features: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    @cached_property
    def clip(self) -> Clip:
        """The built-in CLIP, loaded once."""
        return load_clip(BUILT_IN)

    def features(self, sources: Sequence[DatasetSource]) -> torch.Tensor:
        """(n, d) image features, normalised. Raises: InputError if an image cannot be read."""
        digests = [hashlib.sha256(source.content()).digest() for source in sources]
        fresh = {digest: source for digest, source in zip(digests, sources, strict=True) if digest not in self._features}
        if fresh:
            images = [LabelledImage(source, 0, "") for source in fresh.values()]
            features, _ = image_features(self.clip, LabelledImageDataset(images, self.clip.preprocess))
            self._features.update(zip(fresh, features, strict=True))
        rows = torch.stack([self._features[digest] for digest in digests])
        while len(self._features) > MOST_FEATURES:
            self._features.popitem(last=False)
        return rows

    def zero_shot(self, sources: Sequence[DatasetSource], names: Sequence[str], template: str) -> list[int]:
        """The index in `names` of the most likely class of each image, from the names alone.

        Raises: InputError if an image cannot be read.
        """
        prompts = prompt_features(self.clip, make_prompts(names, template))
        return (self.features(sources) @ prompts.T).argmax(dim=1).tolist()
