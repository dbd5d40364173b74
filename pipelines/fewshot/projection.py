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
        return project(embeddings, self.weight, self.bias)


def project(embeddings: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Features (..., d) of length 1 of embeddings (..., p), with weight (d, p) and bias (d,)."""
    return F.normalize(F.linear(embeddings, weight, bias), dim=-1)


def _projection_of(clip: Clip) -> nn.Linear | nn.Parameter:
    """The layer at the end of an encoder of timm, or the matrix (p, d) at that of another encoder.

    Raises: InputError if the encoder does not end in a linear projection.
    """
    visual = clip.model.visual
    layer, matrix = getattr(getattr(visual, "head", None), "proj", None), getattr(visual, "proj", None)
    if isinstance(layer, nn.Linear):
        return layer
    if isinstance(matrix, nn.Parameter):
        return matrix
    raise InputError(f"The image encoder of {clip.name} does not end in a linear projection. Use another method or model.")


def image_projection(clip: Clip) -> ImageProjection:
    """The projection of the image encoder, in float32 on the CPU.

    Raises: InputError if the encoder does not end in a linear projection.
    """
    projection = _projection_of(clip)
    weight, bias = (projection.weight, projection.bias) if isinstance(projection, nn.Linear) else (projection.T, None)
    weight = weight.detach().float().cpu()
    return ImageProjection(weight.contiguous(), weight.new_zeros(len(weight)) if bias is None else bias.detach().float().cpu())


def encode_embeddings(clip: Clip, pixels: torch.Tensor) -> torch.Tensor:
    """The embeddings (n, p) float32 of preprocessed `pixels` (n, 3, h, w), before the projection.

    Raises: InputError as `image_projection`.
    """
    projection, visual = _projection_of(clip), clip.model.visual
    if isinstance(projection, nn.Parameter):
        visual.proj = None
        try:
            return clip.model.encode_image(pixels.to(clip.device, clip.dtype)).float()
        finally:
            visual.proj = projection
    inputs: list[torch.Tensor] = []
    handle = projection.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    try:
        clip.encode_images(pixels)
    finally:
        handle.remove()
    return inputs[0].float()
