"""Changes of biases and norms, as a layer around the changed one, since no PEFT tuner can scale them."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn import functional

from nora_vision.factors import Factors, low_rank_factors

# Attributes that PEFT reads from a layer that it wraps.
SIZES = frozenset(
    {"in_features", "out_features", "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"}
)


class OffsetLayer(nn.Module, BaseTunerLayer):
    """A layer with adapters that add to its bias and, for a norm, to its weight:  h = norm(x) (w + s dw) + b + s db.

    diffusers enables, scales and deletes these adapters like those of LoRA.
    """

    adapter_layer_names = ("offset_weight", "offset_bias")
    other_param_names = ("scale",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.offset_weight = nn.ParameterDict()
        self.offset_bias = nn.ParameterDict()
        self.scale: dict[str, float] = {}
        # Code that reads the ranks of adapters expects this attribute.
        self.r: dict[str, int] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.get_base_layer(), name) if name in SIZES else super().__getattr__(name)

    def add(self, adapter_name: str, weight: torch.Tensor | None, bias: torch.Tensor | None) -> None:
        """Add an adapter at scale 1: the changes of the norm's weight (n,), of the bias (n,), or of both."""
        like = self.get_base_layer().weight
        dtype = like.dtype if like.is_floating_point() else torch.float32
        for offsets, value in ((self.offset_weight, weight), (self.offset_bias, bias)):
            if value is not None:
                offsets[adapter_name] = nn.Parameter(value.to(like.device, dtype), requires_grad=False)
        self.scale[adapter_name] = 1.0

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the scale of an adapter; as in PEFT, one that this layer lacks is ignored."""
        if adapter in self.scale:
            self.scale[adapter] = scale

    def scale_layer(self, scale: float) -> None:
        """Multiply the scales of the active adapters by `scale`."""
        for name in self._active_here():
            self.scale[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scales of the active adapters by `scale`; without it, set them to 1."""
        for name in self._active_here():
            self.scale[name] = 1.0 if scale is None else self.scale[name] / scale

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merging is not supported, as callers could not undo it exactly.

        Raises: ValueError if an adapter of this layer is active.
        """
        if self._active_here():
            raise ValueError("An adapter that changes norms or biases cannot be fused. Generate without fusing it.")

    def unmerge(self) -> None:
        """Do nothing, as nothing can be merged."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The output of the base layer, of its shape, with the changes of the active adapters."""
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        for name in self._active_here():
            result = result + self._offset(name, x, result)
        return result

    def _active_here(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.scale]

    def _offset(self, name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        layer, scale = self.get_base_layer(), self.scale[name]
        weight = scale * self.offset_weight[name] if name in self.offset_weight else None
        bias = scale * self.offset_bias[name] if name in self.offset_bias else None
        if weight is None:
            has_channels_first = isinstance(layer, (nn.GroupNorm, nn.Conv2d))
            return bias.reshape(-1, *(1,) * (result.ndim - 2)) if has_channels_first else bias
        if isinstance(layer, nn.GroupNorm):
            return functional.group_norm(x, layer.num_groups, weight, bias, layer.eps)
        return functional.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)


@low_rank_factors.register
def _(layer: OffsetLayer, adapter_name: str) -> Factors | None:
    """None for an adapter without changes here. Raises: ValueError otherwise, as these are not changes of a weight matrix."""
    if any(adapter_name in getattr(layer, part) for part in layer.adapter_layer_names):
        raise ValueError("has a change of a bias or a norm, which a LoRA file cannot hold. Leave this adapter out.")
    return None
