"""Changes of biases and of norms, which no PEFT tuner holds with a strength, as a layer around the layer that they change."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn import functional

from nora_vision.factors import Factors, low_rank_factors

# What PEFT asks of a layer that it wraps.
SIZES = frozenset(
    {"in_features", "out_features", "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"}
)


class OffsetLayer(nn.Module, BaseTunerLayer):
    """A layer and what adapters add to its bias and, for a norm, its weight:  h = norm(x) (w + s dw) + b + s db.

    diffusers switches it, sets its strength and deletes its adapters as it does LoRA's.
    """

    adapter_layer_names = ("offset_weight", "offset_bias")
    other_param_names = ("strength",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.offset_weight = nn.ParameterDict()
        self.offset_bias = nn.ParameterDict()
        self.strength: dict[str, float] = {}
        # Of LoRA's layers by adapter, which readers of weight changes look up.
        self.r: dict[str, int] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.get_base_layer(), name) if name in SIZES else super().__getattr__(name)

    def add(self, adapter_name: str, weight: torch.Tensor | None, bias: torch.Tensor | None) -> None:
        """Add an adapter at strength 1: what is added to the norm's weight (n,), to the bias (n,), or to both."""
        like = self.get_base_layer().weight
        dtype = like.dtype if like.is_floating_point() else torch.float32
        for offsets, value in ((self.offset_weight, weight), (self.offset_bias, bias)):
            if value is not None:
                offsets[adapter_name] = nn.Parameter(value.to(like.device, dtype), requires_grad=False)
        self.strength[adapter_name] = 1.0

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's strength; one that is not here is passed over, as in PEFT."""
        if adapter in self.strength:
            self.strength[adapter] = scale

    def scale_layer(self, scale: float) -> None:
        """Multiply the strength of the active adapters."""
        for name in self._active_here():
            self.strength[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the strength of the active adapters, or set it to 1."""
        for name in self._active_here():
            self.strength[name] = 1.0 if scale is None else self.strength[name] / scale

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse to be added to the base model's parameters: what calls this would not take it out again as it was.

        Raises: ValueError.
        """
        if self._active_here():
            raise ValueError("An adapter that changes norms or biases cannot be fused. Draw with it unfused.")

    def unmerge(self) -> None:
        """Nothing was merged."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The layer's output (the shape that the layer itself gives), with what the active adapters add."""
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        for name in self._active_here():
            result = result + self._offset(name, x, result)
        return result

    def _active_here(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.strength]

    def _offset(self, name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        layer, strength = self.get_base_layer(), self.strength[name]
        weight = strength * self.offset_weight[name] if name in self.offset_weight else None
        bias = strength * self.offset_bias[name] if name in self.offset_bias else None
        if weight is None:
            has_channels_first = isinstance(layer, (nn.GroupNorm, nn.Conv2d))
            return bias.reshape(-1, *(1,) * (result.ndim - 2)) if has_channels_first else bias
        if isinstance(layer, nn.GroupNorm):
            return functional.group_norm(x, layer.num_groups, weight, bias, layer.eps)
        return functional.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)


@low_rank_factors.register
def _(layer: OffsetLayer, adapter_name: str) -> Factors | None:
    """Raises: ValueError, as these changes are of no weight matrix."""
    if any(adapter_name in getattr(layer, part) for part in layer.adapter_layer_names):
        raise ValueError("has a change of a bias or a norm, which a LoRA file cannot hold. Leave this adapter out.")
    return None
