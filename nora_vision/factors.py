"""The exact low-rank factors of one layer's weight change, which all exports use.

Layers other than NoRA's and PEFT's LoRA are supported by a registered function: `low_rank_factors.register(LayerClass)`.
"""

from __future__ import annotations

from functools import singledispatch
from typing import NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .inner import gated
from .layer import NoraLayer, nora_layers
from .weight_change import best_low_rank, weight_change


class Factors(NamedTuple):
    """A weight change `up` (out, k) times `down` (k, in), and for DoRA the norms (out,) of the rows of the changed weight.

    `relative_error` is the norm of what the product leaves out of the change, relative to the norm of the change.
    """

    up: torch.Tensor
    down: torch.Tensor
    magnitude: torch.Tensor | None = None
    relative_error: float = 0.0


@singledispatch
def low_rank_factors(layer: nn.Module, adapter_name: str) -> Factors | None:
    """The factors of the layer's weight change at scale 1, in float32; None if the layer does not have the adapter.

    For layers without a registered function these are the best factors of the merged weight minus the base weight.

    Raises: ValueError if the adapter cannot be merged into the weight.
    """
    if not has_adapter(layer, adapter_name):
        return None
    up, down, error = best_low_rank(weight_change(layer, adapter_name))
    return Factors(up, down, relative_error=error)


def has_adapter(layer: nn.Module, adapter_name: str) -> bool:
    """Whether `layer` is adapted by the adapter."""
    return isinstance(layer, BaseTunerLayer) and any(
        adapter_name in getattr(layer, part, ()) for part in layer.adapter_layer_names
    )


def is_weight_change(model: nn.Module, adapter_name: str) -> bool:
    """Whether the adapter changes the weights of `model`, so that it can be merged and exported."""
    return all(layer.supports_lora_conversion(adapter_name) for layer in nora_layers(model).values())


@low_rank_factors.register
def _(layer: NoraLayer, adapter_name: str) -> Factors | None:
    """s B M A = (s B up) (down A) for M = up down, serially B' A'."""
    if adapter_name not in layer.r:
        return None
    if not layer.supports_lora_conversion(adapter_name):
        raise ValueError(gated("is adapted by"))
    return Factors(*layer._low_rank_factors(adapter_name, layer.alpha[adapter_name] / layer.inner_r[adapter_name]))


@low_rank_factors.register
def _(layer: LoraLayer, adapter_name: str) -> Factors | None:
    """s B A = (s B) A."""
    if adapter_name not in layer.lora_A:
        return None
    is_dora = layer.use_dora[adapter_name]
    if (adapter_name in layer.lora_variant and not is_dora) or layer.lora_bias[adapter_name]:
        raise ValueError("has a variant of LoRA, such as a trained bias. Only plain LoRA and DoRA are exported.")
    rank = layer.r[adapter_name]
    scaling = layer.lora_alpha[adapter_name] / (rank**0.5 if layer.use_rslora[adapter_name] else rank)
    up, down = layer.lora_B[adapter_name].weight.detach(), layer.lora_A[adapter_name].weight.detach()
    magnitude = layer.lora_magnitude_vector[adapter_name].weight.detach().float().flatten() if is_dora else None
    return Factors(scaling * up.float().flatten(1), down.float().flatten(1), magnitude)


def in_weight_shape(base_layer: nn.Module, factors: Factors) -> Factors:
    """The factors in the shapes of LoRA's layers: for a Conv2d up (out, k, 1, 1), down (k, in, kh, kw)."""
    if not isinstance(base_layer, nn.Conv2d):
        return factors
    down = factors.down.reshape(len(factors.down), *base_layer.weight.shape[1:])
    return factors._replace(up=factors.up[:, :, None, None], down=down)
