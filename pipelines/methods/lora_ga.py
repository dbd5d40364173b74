"""LoRA-GA: h = W x + s (B A - B_0 A_0) x,  A_0 and B_0 from the leading 2r singular triples of the gradient, by PEFT
[Wang et al. 2024]."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.adapter_method import Probe, adapters_off, option
from pipelines.gradients import check_no_groups, mean_gradients
from pipelines.methods.lora import Lora, LoraOptions
from pipelines.option_checks import above_zero, at_least, one_of
from pipelines.subtracted_start import SubtractedStart

if TYPE_CHECKING:
    import torch
    from peft.tuners.lora import LoraLayer

DIRECTIONS, SCALES = ("ArB2r", "A2rBr", "ArBr", "random"), ("stable", "weight_svd", "gd_scale", "unit")


@dataclass
class LoraGaOptions(LoraOptions):
    """Options of LoRA-GA."""

    gradient_batches: int = option(8, "batches for the mean gradient of the initialisation", "LoRA-GA gradient batches")
    lora_ga_direction: str = option(
        "ArB2r",
        "which singular vectors of the gradient A and B start from: ArB2r, A2rBr, ArBr or random",
        "LoRA-GA direction",
        choices=DIRECTIONS,
    )
    lora_ga_scale: str = option(
        "stable", "scaling of the start: stable, weight_svd, gd_scale or unit", "LoRA-GA scale", choices=SCALES
    )
    stable_gamma: float = option(16.0, "gamma of the stable scaling", "LoRA-GA gamma of the stable scaling")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "gradient_batches")
        above_zero(self, "stable_gamma")
        one_of(self, DIRECTIONS, "lora_ga_direction")
        one_of(self, SCALES, "lora_ga_scale")


class LoraGa(SubtractedStart, Lora):
    """LoRA whose first step follows the gradient of full fine-tuning.

    PEFT trains plain LoRA silently if its pass over the data is left out; here that pass is part of the initialisation.
    """

    name = "lora_ga"
    title = "LoRA-GA"
    reference = "Wang et al. 2024, LoRA-GA: Low-Rank Adaptation with Gradient Approximation"
    parameters = "rank * (m + n)"
    Options = LoraGaOptions
    # Quantised weights are integers, which have no gradient.
    adapts_quantized_layers = False

    @property
    def without_effect(self) -> frozenset[str]:
        """The gamma of the stable scaling, with another scaling."""
        return frozenset() if self.options.lora_ga_scale == "stable" else frozenset({"stable_gamma"})

    def usable_rank(self, rank: int, rows: int, columns: int) -> int:
        """Half of the gradient's singular vectors are for A_0 and half for B_0."""
        return min(rank, min(rows, columns) // 2)

    def statistics(self, layers: Mapping[str, LoraLayer], probe: Probe) -> Iterator[tuple[str, torch.Tensor]]:
        """The mean gradient at the base model with respect to each weight, (out, in) or (out, in * kh * kw).

        Raises: InputError for a weight without a gradient; ValueError if the probe has no losses, or a gradient is not finite.
        """
        base_layers = {name: layer.get_base_layer() for name, layer in layers.items()}
        check_no_groups(base_layers, self.title)
        with adapters_off(layers.values()):
            yield from mean_gradients(base_layers, probe.losses, self.options.gradient_batches)

    def initialise(self, layer: LoraLayer, adapter_name: str, statistic: torch.Tensor) -> None:
        """PEFT's `lora_ga_init`, which reads the gradient from the base layer."""
        from peft.tuners.lora.config import LoraGAConfig

        options = self.options
        layer.get_base_layer()._peft_loraga_grad = statistic
        config = LoraGAConfig(direction=options.lora_ga_direction, scale=options.lora_ga_scale, stable_gamma=options.stable_gamma)
        layer.lora_ga_init(adapter_name, config)


METHOD = LoraGa
