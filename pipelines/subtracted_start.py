"""The base class of LoRAs whose first A and B are subtracted, so that they start at the base model without changing its weights.

    h = W x + s (B A - B_0 A_0) x

PEFT subtracts s B_0 A_0 from the base weight instead. Then the model without the adapter is no longer the base model, adapters
cannot be combined, and a LoRA file with A and B alone is wrong on the original weights. Here W stays as it is, bit for bit, and
the change is that of a plain LoRA of rank 2r, which is what files contain.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from pipelines.adapter_method import AdapterMethod, Probe, tuner_layers
from pipelines.errors import InputError
from pipelines.lora_conversion import as_lora
from pipelines.native_files import FULL, METHOD_KEY, write_native
from pipelines.peft_method import seeded

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

    from nora_vision.factors import Factors


class SubtractedStart(AdapterMethod):
    """A mixin before LoRA for given A_0 and B_0, by `initial_factors`, or by `initialise` with PEFT's own functions."""

    adapts_convolutions = False
    adapts_quantized_layers = False
    can_be_sharded = False
    samples_start = False

    def start(self, model: nn.Module, probe: Probe, adapter_name: str) -> None:
        """Compute A_0 and B_0 of every layer, and train A and B from there.

        Raises: InputError if a rank exceeds the size of a layer.
        """
        super().start(model, probe, adapter_name)
        layers = tuner_layers(model)
        for name, layer in layers.items():
            largest = min(layer.in_features, layer.out_features)
            if layer.r[adapter_name] > largest:
                raise InputError(f"rank must be in [1, {largest}] for {name!r}, got {layer.r[adapter_name]}. Lower rank.")
        for name, factors in self.initial_factors(layers, probe, adapter_name).items():
            subtract_start(layers[name], factors, adapter_name)

    def initial_factors(self, layers: Mapping[str, LoraLayer], probe: Probe, adapter_name: str) -> dict[str, Factors]:
        """B_0 (out, r) and A_0 (r, in) of every layer."""
        from nora_vision.factors import Factors

        factors = {}
        with seeded(probe.generator):
            for name, layer in layers.items():
                base = layer.get_base_layer()
                weight = base.weight.data
                # PEFT subtracts the start from this copy, for OLoRA in place.
                base.weight.data = weight.clone()
                self.initialise(layer, adapter_name)
                base.weight.data = weight
                A, B = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
                factors[name] = Factors(B.detach().float(), A.detach().float())
        return factors

    def initialise(self, layer: LoraLayer, adapter_name: str) -> None:
        """Set A and B of one layer, as PEFT does."""
        raise NotImplementedError

    @classmethod
    def save(cls, components: Mapping[str, nn.Module], folder: Path, adapter_name: str) -> None:
        """Write the plain LoRA of rank 2r with the same change, as PEFT's two files."""
        from nora_vision.calibration import base_name
        from nora_vision.factors import in_weight_shape, low_rank_factors

        for name, model in components.items():
            factors = {}
            for layer_name, layer in tuner_layers(model).items():
                of_layer = low_rank_factors(layer, adapter_name)
                if of_layer is not None:
                    factors[base_name(layer_name)] = in_weight_shape(layer.get_base_layer(), of_layer)
            config, tensors = as_lora(factors)
            write_native(folder / FULL / name, config, tensors, {METHOD_KEY: cls.name})


class _WithStart(nn.Module):
    """A trained matrix, and its frozen start as a buffer; a layer of LoRA in the place of lora_A or lora_B."""

    def __init__(self, start: torch.Tensor) -> None:
        super().__init__()
        self.trained = nn.Parameter(start.clone())
        self.register_buffer("start", start.clone())

    @property
    def weight(self) -> torch.Tensor:
        """The matrix that the layer multiplies by."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)"""
        return F.linear(x, self.weight)


class _Down(_WithStart):
    """[A; A - A_0], (2r, in)."""

    @property
    def weight(self) -> torch.Tensor:
        """(2r, in)"""
        return torch.cat([self.trained, self.trained - self.start])


class _Up(_WithStart):
    """[B - B_0, B_0], (out, 2r), so that the product with [A; A - A_0] is B A - B_0 A_0, and exactly zero at step 0."""

    @property
    def weight(self) -> torch.Tensor:
        """(out, 2r)"""
        return torch.cat([self.trained - self.start, self.start], dim=1)


def subtract_start(layer: LoraLayer, factors: Factors, adapter_name: str) -> None:
    """Train A and B of `layer` from `factors`, up (out, r) and down (r, in), less their product."""
    device = layer.lora_A[adapter_name].weight.device
    layer.lora_A[adapter_name] = _Down(factors.down.to(device))
    layer.lora_B[adapter_name] = _Up(factors.up.to(device))
