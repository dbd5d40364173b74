"""The linear projection at the end of a CLIP model's image encoder, and the embeddings that it projects."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from pipelines.clip import Clip
from pipelines.errors import InputError


@dataclass(frozen=True)
class ImageProjection:
    """features = direction of  weight @ embedding + bias.

    Args:
        weight: (d, p).
        bias: (d,), zero for encoders without one.
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def features(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Features (..., d) of length 1 of embeddings (..., p)."""
        return F.normalize(F.linear(embeddings, self.weight, self.bias), dim=-1)


def _linear_of(clip: Clip) -> nn.Linear | None:
    """The projection of an encoder of timm; None for other encoders."""
    layer = getattr(getattr(clip.model.visual, "head", None), "proj", None)
    return layer if isinstance(layer, nn.Linear) else None


def image_projection(clip: Clip) -> ImageProjection:
    """The projection of the image encoder, in float32 on the CPU.

    Raises: InputError if the encoder does not end in a linear projection.
    """
    linear, matrix = _linear_of(clip), getattr(clip.model.visual, "proj", None)
    if linear is not None:
        weight, bias = linear.weight, linear.bias
    elif isinstance(matrix, nn.Parameter):
        weight, bias = matrix.T, None
    else:
        raise InputError(f"The image encoder of {clip.name} does not end in a linear projection. Use another method or model.")
    weight = weight.detach().float().cpu()
    return ImageProjection(weight.contiguous(), weight.new_zeros(len(weight)) if bias is None else bias.detach().float().cpu())


def encode_embeddings(clip: Clip, pixels: torch.Tensor) -> torch.Tensor:
    """The embeddings (n, p) float32 of preprocessed `pixels` (n, 3, h, w), before the projection.

    Raises: InputError as `image_projection`.
    """
    image_projection(clip)
    linear, visual = _linear_of(clip), clip.model.visual
    if linear is None:
        matrix, visual.proj = visual.proj, None
        try:
            return clip.model.encode_image(pixels.to(clip.device, clip.dtype)).float()
        finally:
            visual.proj = matrix
    inputs: list[torch.Tensor] = []
    handle = linear.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    try:
        clip.encode_images(pixels)
    finally:
        handle.remove()
    return inputs[0].float()
