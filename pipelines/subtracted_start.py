"""The base class of LoRAs whose first A and B are subtracted, so that they start at the base model without changing its weights.

    h = W x + s (B A - B_0 A_0) x

PEFT subtracts s B_0 A_0 from the base weight instead. Then the model without the adapter is no longer the base model, adapters
cannot be combined, and a LoRA file with A and B alone is wrong on the original weights. Here W stays as it is, bit for bit, and
the change is that of a plain LoRA of rank 2r, which is what files contain.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.adapter_method import AdapterMethod, MethodTraining, Probe, tuner_layers
from pipelines.errors import InputError
from pipelines.gradients import cached_factors, origin_of
from pipelines.lazy_modules import nn, no_grad, parametrizations, parametrize, torch
from pipelines.lora_conversion import as_lora
from pipelines.native_files import FULL, METHOD_KEY, write_native
from pipelines.peft_method import seeded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peft.tuners.lora import LoraLayer

    from nora_vision.factors import Factors


class SubtractedStart(AdapterMethod):
    """A mixin before LoRA. A subclass overrides `initialise` and, if the start depends on data, `statistics`."""

    samples_start = False

    def initialise(self, layer: LoraLayer, adapter_name: str, statistic: torch.Tensor | None) -> None:
        """Set A_0 and B_0 of a layer of PEFT on a copy of the weight, as PEFT's own functions do; they may change that copy.

        Args:
            layer: a linear layer whose weight is a float32 matrix (out, in), of which `unfolded` made it for a convolution.
            statistic: what `statistics` yielded for it.
        """
        raise NotImplementedError

    def statistics(self, layers: Mapping[str, LoraLayer], probe: Probe) -> Iterator[tuple[str, torch.Tensor | None]]:
        """The name of each layer, and what its start depends on besides its weight."""
        yield from dict.fromkeys(layers).items()

    def usable_rank(self, rank: int, rows: int, columns: int) -> int:
        """The rows of A_0 that a weight (rows, columns) determines, at most `rank`."""
        return rank

    def start(self, model: nn.Module, probe: Probe, adapter_name: str) -> None:
        """Train A and B from A_0 and B_0, which are cached. Rows that a weight does not determine are initialised as in LoRA.

        Raises: InputError naming a layer if the rank exceeds its size, or it is a convolution with groups.
        """
        super().start(model, probe, adapter_name)
        layers = tuner_layers(model)
        for name, layer in layers.items():
            check_layer(layer, name, adapter_name)
        weights = {name: layer.get_base_layer().weight for name, layer in layers.items()}
        cache = probe.cache.with_name(f"{probe.cache.stem}-{self.name}.safetensors")
        origin = origin_of(weights, [dataclasses.asdict(self.options)])
        factors = cached_factors(cache, origin, lambda: self._initial_factors(layers, probe, adapter_name))
        for name, layer in layers.items():
            subtract_start(layer, factors[name], adapter_name)

    def _initial_factors(self, layers: Mapping[str, LoraLayer], probe: Probe, adapter_name: str) -> Iterator[tuple[str, Factors]]:
        """B_0 (out, k) and A_0 (k, in) of every layer; a copy of one weight is in memory at a time."""
        from nora_vision.factors import Factors

        for name, statistic in self.statistics(layers, probe):
            layer = layers[name]
            rank = self.usable_rank(layer.r[adapter_name], *matrix_shape(layer))
            if rank == 0:
                raise InputError(
                    f"{self.title} cannot adapt {name!r}, whose weight is a vector. Remove it from the target modules."
                )
            with seeded(probe.generator):
                copied = unfolded(layer, rank, layer.scaling[adapter_name], adapter_name)
                self.initialise(copied, adapter_name, statistic)
            yield name, Factors(*(part[adapter_name].weight.detach().float().cpu() for part in (copied.lora_B, copied.lora_A)))

    def training(self, models: Sequence[nn.Module], total_steps: int) -> MethodTraining:
        """No hooks.

        Raises: ValueError if `start` was not called, so that plain LoRA would be trained.
        """
        for name, layer in (pair for model in models for pair in tuner_layers(model).items()):
            if not all(map(parametrize.is_parametrized, layer.lora_A.values())):
                raise ValueError(f"{self.title} has not been started at {name!r}. Call start before training.")
        return super().training(models, total_steps)

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


def matrix_shape(layer: LoraLayer) -> tuple[int, int]:
    """(out, in) of the layer's weight as a matrix, (out, in * kh * kw) of a convolution."""
    return layer.out_features, layer.in_features * math.prod(getattr(layer.get_base_layer(), "kernel_size", ()))


def check_layer(layer: LoraLayer, name: str, adapter_name: str) -> None:
    """Check that the weight of the layer called `name` is a matrix with as many singular values as the adapter's rank.

    Raises: InputError naming the layer.
    """
    check_groups(layer, name)
    largest = min(matrix_shape(layer))
    if layer.r[adapter_name] > largest:
        raise InputError(f"rank must be in [1, {largest}] for {name!r}, got {layer.r[adapter_name]}. Lower rank.")


def check_groups(layer: LoraLayer, name: str) -> None:
    """Raises: InputError naming the layer if it is a convolution with groups, whose weight is no matrix."""
    groups = getattr(layer.get_base_layer(), "groups", 1)
    if groups != 1:
        raise InputError(f"{name!r} must be a convolution without groups, got {groups}. Remove it from the target modules.")


def unfolded(layer: LoraLayer, rank: int, scaling: float, adapter_name: str) -> LoraLayer:
    """PEFT's LoRA, not initialised, on a float32 copy of the weight of `layer` as a matrix, dequantised."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear
    from peft.utils.integrations import dequantize_module_weight

    rows, columns = matrix_shape(layer)
    weight = dequantize_module_weight(layer.get_base_layer()).detach().flatten(1)
    copied = nn.Linear(columns, rows, bias=False, device="meta")
    copied.weight = nn.Parameter(weight.to(torch.float32, copy=True), requires_grad=False)
    config = LoraConfig(r=rank, lora_alpha=scaling * rank, init_lora_weights=False)
    return Linear(copied, adapter_name, config, r=rank, lora_alpha=scaling * rank)


@no_grad
def subtract_start(layer: LoraLayer, factors: Factors, adapter_name: str) -> None:
    """Train A and B of `layer` from `factors`, up (out, k) and down (k, in), less their product; k is at most r."""
    A, B = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    count = len(factors.down)
    A.weight.flatten(1)[:count] = factors.down.to(A.weight)
    B.weight.flatten(1)[:, :count] = factors.up.to(B.weight)
    for module, with_start in ((A, parametrizations.RowsLessStart), (B, parametrizations.ColumnsLessStart)):
        parametrize.register_parametrization(module, "weight", with_start(module.weight), unsafe=True)
