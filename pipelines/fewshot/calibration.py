"""The base calibration of CLIP models: activation statistics on fixed images and prompts, without any data of a user."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn

from nora_vision.base_calibration import PROMPTS, base_statistics, natural_noise
from nora_vision.calibration import ActivationStatistics, BaseCalibration
from pipelines.clip import Clip
from pipelines.fewshot.target_layers import IMAGE, TEXT

IMAGES, BATCH = 32, 8


def clip_calibration(clip: Clip, encoders: Mapping[str, nn.Module]) -> dict[str, BaseCalibration]:
    """For each of the `encoders` of `clip`, "image" and "text", a function that calibrates its layers of given names.

    The image encoder gets noise with the amplitude spectrum of natural images, preprocessed images of which have a variance of
    about 1, too; the text encoder gets the prompts of SDXL's base calibration.
    """
    runs = {IMAGE: _encode_images, TEXT: _encode_prompts}
    return {name: partial(_statistics, clip, model, runs[name]) for name, model in encoders.items()}


def _statistics(clip: Clip, model: nn.Module, run: Callable[[Clip], None], layers: list[str]) -> ActivationStatistics:
    # The text encoder's embeddings lie outside the module with its layers.
    return base_statistics(model, layers, partial(run, clip), [clip.model])


def _encode_images(clip: Clip) -> None:
    size = clip.model.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(0)
    for _ in range(IMAGES // BATCH):
        clip.encode_images(natural_noise((BATCH, 3, height, width), generator))


def _encode_prompts(clip: Clip) -> None:
    for prompt in PROMPTS:
        clip.encode_texts(clip.tokenizer([prompt]))
