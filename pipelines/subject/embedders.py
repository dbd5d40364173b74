"""Features of images and texts from a CLIP of open_clip, or a CLIP or DINOv2 of transformers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import nn
from torch.nn import functional
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from pipelines import mini_clip
from pipelines.clip import BUILT_IN, Clip, load_clip
from pipelines.errors import InputError
from pipelines.hub import HubError, HubModel, fetch, is_hub_name, look_up

# Prefix of a model and its weights in open_clip: "open_clip:ViT-B-16/openai".
OPEN_CLIP = "open_clip:"
TRANSFORMERS_WEIGHTS = re.compile(r"model(?:-\d{5}-of-\d{5})?\.safetensors")


class Embedder(Protocol):
    """Computes features of length 1 whose inner products are similarities."""

    @property
    def reads_text(self) -> bool:
        """Whether it embeds texts too."""

    def images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Features (images, width) float32 of length 1."""

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Features (texts, width) float32 of length 1, in the same space; only where `reads_text`."""


@dataclass(frozen=True)
class OpenClipEmbedder:
    """Features from a CLIP of open_clip."""

    clip: Clip

    @property
    def reads_text(self) -> bool:
        """True, as every CLIP embeds texts too."""
        return True

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Features (images, width) float32 of length 1."""
        return self.clip.encode_images(torch.stack([self.clip.preprocess(image.convert("RGB")) for image in images]))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Features (texts, width) float32 of length 1."""
        return self.clip.encode_texts(self.clip.tokenizer(list(texts)))


class TransformersEmbedder:
    """Features from a CLIP or DINOv2 of transformers; DINOv2 embeds no texts."""

    def __init__(self, name_or_path: str) -> None:
        """Load the model, safetensors only.

        Raises: OSError or ValueError if it cannot be loaded, or embeds no images; HubError if it cannot be fetched.
        """
        folder = _transformers_folder(name_or_path) if is_hub_name(name_or_path) else name_or_path
        self.model = AutoModel.from_pretrained(folder, use_safetensors=True, local_files_only=True).eval()
        self.processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True) if self.reads_text else None

    @property
    def reads_text(self) -> bool:
        """Whether it embeds texts too."""
        return hasattr(self.model, "get_text_features")

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Features (images, width) float32 of length 1."""
        inputs = self.processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
        features = self.model.get_image_features(**inputs) if self.reads_text else self.model(**inputs)
        return functional.normalize(_pooled(features), dim=1)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Features (texts, width) float32 of length 1."""
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        return functional.normalize(_pooled(self.model.get_text_features(**tokens)), dim=1)


def _transformers_folder(name: str) -> Path:
    """Download a transformers model from the hub, if the cache lacks it; returns its folder in the cache.

    Raises: InputError if the model cannot be fetched or has no .safetensors weights.
    """
    if Path(name).is_dir():
        return Path(name)
    model = HubModel(name, role="image_scorer", local="give --image_scorer a folder, or 'mini', the built-in CLIP")
    lookup = look_up(model, "config.json")
    weights = [file for file in lookup.files if TRANSFORMERS_WEIGHTS.fullmatch(file)]
    if not weights:
        raise lookup.unavailable or HubError(
            f"The image_scorer {name!r} has no model.safetensors: other weights, such as .bin, can run programs when they are "
            f"read. Give one that has them, such as 'facebook/dinov2-base', or {BUILT_IN!r}, the built-in CLIP."
        )
    texts = [file for file in lookup.files if "/" not in file and file.endswith((".json", ".txt", ".model", ".jinja"))]
    return fetch(model, [*texts, *weights], lookup)


def _pooled(features: torch.Tensor | nn.Module) -> torch.Tensor:
    """The features (batch, width): the output itself, or its `pooler_output` for DINOv2 and for CLIP in transformers 5."""
    return features if isinstance(features, torch.Tensor) else features.pooler_output


def load_embedder(name: str) -> Embedder:
    """Load the embedder `name` on the CPU: it takes a second for a run's few images, and GPU memory stays free for training.

    Args:
        name: "mini", the built-in CLIP; "open_clip:MODEL/WEIGHTS", weights being a tag or a .safetensors file; a folder with an
            open_clip_config.json; or a hub name or a folder of transformers.
    Raises: InputError if it cannot be loaded, with the allowed values.
    """
    try:
        if name.startswith(OPEN_CLIP):
            model, _, weights = name.removeprefix(OPEN_CLIP).partition("/")
            return OpenClipEmbedder(load_clip(model, weights or None))
        if name == BUILT_IN or _is_of_open_clip(Path(name)):
            return OpenClipEmbedder(load_clip(name))
        return TransformersEmbedder(name)
    except HubError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(
            f"image_scorer {name!r} could not be loaded as CLIP or DINOv2: {error} Give {BUILT_IN!r}, "
            f"'{OPEN_CLIP}MODEL/WEIGHTS', or a hub name or folder of transformers with .safetensors weights."
        ) from error


def _is_of_open_clip(folder: Path) -> bool:
    """Whether only open_clip can load a folder. A folder that transformers can load too often has only pickles for open_clip."""
    return (folder / mini_clip.CONFIG_FILE).is_file() and not (folder / "config.json").is_file()
