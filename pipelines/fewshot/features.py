"""Features of images and class prompts by frozen encoders, cached on disk; and raw pixels, for the control."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from pipelines.cache import TensorCache, digest_of, key_of
from pipelines.clip import Clip, evaluating
from pipelines.fewshot.projection import encode_embeddings
from pipelines.fewshot.prompts import Prompts

FEATURES, EMBEDDINGS, IMAGE_ENCODER = "features", "embeddings", "visual."
LIBRARIES = {name: importlib.metadata.version(name) for name in ("open_clip_torch", "timm")}
BATCH = 64


def image_features(
    clip: Clip,
    images: Dataset[tuple[torch.Tensor, int]],
    batch_size: int = BATCH,
    workers: int = 0,
    cache: TensorCache | None = None,
    before_projection: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of length 1 and labels of `images`, computed in evaluation mode and single precision, on the CPU.

    The key of an image in the cache is a hash of its pixels and the encoder's weights, so splits, shots and seeds share features.
    An encoder with an adapter is not cached, because its weights do not determine the scale of the adapter.

    Args:
        images: pixels (3, h, w), as the encoder takes them, and the label of each image.
        workers: number of processes that read and preprocess images.
        before_projection: return the encoder's embeddings (n, p) before its projection instead, of any length.
    Returns: features (n, d) float32, labels (n,) int64.
    """
    feature_cache = _FeatureCache(cache, clip.model, images=True, output=EMBEDDINGS if before_projection else FEATURES)
    encode = partial(encode_embeddings, clip) if before_projection else clip.encode_images
    features, labels = [], []
    batches = DataLoader(images, batch_size=batch_size, num_workers=workers)
    with evaluating(clip.model):
        for pixels, batch_labels in tqdm(batches, desc="encoding images", leave=False, delay=5):
            features.append(feature_cache.encoded(pixels, encode))
            labels.append(batch_labels)
    return torch.cat(features), torch.cat(labels)


def prompt_features(clip: Clip, prompts: Prompts, batch_size: int = BATCH, cache: TensorCache | None = None) -> torch.Tensor:
    """The class features of `prompts`, computed and cached like those of images.

    Returns: (classes, d) float32 of length 1, on the CPU.
    """
    feature_cache = _FeatureCache(cache, clip.model, images=False)
    tokens = clip.tokenizer(prompts.texts())
    with evaluating(clip.model):
        features = [feature_cache.encoded(part, clip.encode_texts) for part in tokens.split(batch_size)]
    return prompts.class_features(torch.cat(features))


def raw_pixels(image: Image.Image, side: int = 32) -> torch.Tensor:
    """The whole image resized to `side` x `side`, in [0, 1]: (3 * side * side,) float32."""
    small = image.convert("RGB").resize((side, side), Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(small, dtype=np.float32) / 255).permute(2, 0, 1).flatten()


class _FeatureCache:
    """Cached features of single images or prompts; disabled for an encoder with an adapter."""

    def __init__(self, cache: TensorCache | None, model: nn.Module, images: bool, output: str = FEATURES) -> None:
        def belongs(name: str) -> bool:
            """Whether the module or parameter `name` is part of the encoder."""
            return name.startswith(IMAGE_ENCODER) == images

        adapted = any(belongs(name) and isinstance(module, BaseTunerLayer) for name, module in model.named_modules())
        self.cache = None if adapted else cache
        self.encoder = (
            digest_of({name: value for name, value in model.state_dict().items() if belongs(name)}) if self.cache else ""
        )
        self.device = next(model.parameters()).device
        # Features have no further part, as in earlier versions.
        self.parts = {} if output == FEATURES else {"output": output}

    def encoded(self, rows: torch.Tensor, encode: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Features (n, d) float32 of `rows` (n, ...); only rows that are not in the cache are encoded."""
        if self.cache is None:
            return self._encode(rows, encode)
        keys = [key_of(libraries=LIBRARIES, tower=self.encoder, row=digest_of({"row": row}), **self.parts) for row in rows]
        entries = [self.cache.read(key) for key in keys]
        missing = [index for index, entry in enumerate(entries) if entry is None]
        if missing:
            for index, feature in zip(missing, self._encode(rows[missing], encode), strict=True):
                entries[index] = {FEATURES: feature}
                self.cache.write(keys[index], entries[index])
        return torch.stack([entry[FEATURES] for entry in entries])

    def _encode(self, rows: torch.Tensor, encode: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return encode(rows.to(self.device)).float().cpu()
