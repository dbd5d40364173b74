"""What frozen towers make of images and of class prompts, computed once and kept on disk; and raw pixels, the control."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from pipelines.cache import TensorCache, digest_of, key_of
from pipelines.clip import Clip, evaluating
from pipelines.fewshot.prompts import Prompts

FEATURES, IMAGE_TOWER = "features", "visual."
LIBRARIES = {name: importlib.metadata.version(name) for name in ("open_clip_torch", "timm")}
BATCH = 64


def image_features(
    clip: Clip,
    images: Dataset[tuple[torch.Tensor, int]],
    batch_size: int = BATCH,
    workers: int = 0,
    cache: TensorCache | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The unit features and the labels of `images`, in their order, in evaluation mode, single precision, and on the CPU.

    An image's file in the cache is named by its pixels and the tower's weights, so that splits, shots and seeds share it.
    What an adapter does to a tower its weights do not tell: with one attached, nothing is read or kept.

    Args:
        images: each its pixels (3, h, w), as the tower takes them, and its label.
        workers: processes that read and resize them.
    Returns: (n, d) float32, (n,) int64.
    """
    feature_cache = _Kept(cache, clip.model, images=True)
    features, labels = [], []
    batches = DataLoader(images, batch_size=batch_size, num_workers=workers)
    with evaluating(clip.model):
        for pixels, batch_labels in tqdm(batches, desc="encoding images", leave=False, delay=5):
            features.append(feature_cache.encoded(pixels, clip.encode_images))
            labels.append(batch_labels)
    return torch.cat(features), torch.cat(labels)


def prompt_features(clip: Clip, prompts: Prompts, batch_size: int = BATCH, cache: TensorCache | None = None) -> torch.Tensor:
    """The unit features of the classes that `prompts` are about, computed and kept as those of images.

    Returns: (classes, d) float32 on the CPU.
    """
    feature_cache = _Kept(cache, clip.model, images=False)
    tokens = clip.tokenizer(prompts.texts())
    with evaluating(clip.model):
        features = [feature_cache.encoded(part, clip.encode_texts) for part in tokens.split(batch_size)]
    return prompts.class_features(torch.cat(features))


def raw_pixels(image: Image.Image, side: int = 32) -> torch.Tensor:
    """The whole image at `side` x `side`, in [0, 1]: (3 side side,) float32."""
    small = image.convert("RGB").resize((side, side), Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(small, dtype=np.float32) / 255).permute(2, 0, 1).flatten()


class _Kept:
    """Features of single rows on disk; none, for a tower that an adapter changes."""

    def __init__(self, cache: TensorCache | None, model: nn.Module, images: bool) -> None:
        def belongs(name: str) -> bool:
            """Whether `name` is of the tower."""
            return name.startswith(IMAGE_TOWER) == images

        adapted = any(belongs(name) and isinstance(module, BaseTunerLayer) for name, module in model.named_modules())
        self.cache = None if adapted else cache
        self.tower = digest_of({name: value for name, value in model.state_dict().items() if belongs(name)}) if self.cache else ""
        self.device = next(model.parameters()).device

    def encoded(self, rows: torch.Tensor, encode: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """The features of `rows` (n, ...), of which only those that are not kept are encoded: (n, d) float32."""
        if self.cache is None:
            return self._fresh(rows, encode)
        keys = [key_of(libraries=LIBRARIES, tower=self.tower, row=digest_of({"row": row})) for row in rows]
        rows_read = [self.cache.read(key) for key in keys]
        missing = [index for index, one in enumerate(rows_read) if one is None]
        if missing:
            for index, feature in zip(missing, self._fresh(rows[missing], encode), strict=True):
                rows_read[index] = {FEATURES: feature}
                self.cache.write(keys[index], rows_read[index])
        return torch.stack([one[FEATURES] for one in rows_read])

    def _fresh(self, rows: torch.Tensor, encode: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return encode(rows.to(self.device)).float().cpu()
