"""LoRA-GA: h = W x + s (B A - B_0 A_0) x,  A_0 and B_0 from the leading 2r singular triples of the gradient, by PEFT
[Wang et al. 2024]."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.adapter_method import Probe, adapters_off, option
from pipelines.cached_factors import factors_from
from pipelines.methods.lora import Lora, LoraOptions
from pipelines.methods.lora_one import mean_gradients
from pipelines.option_checks import above_zero, at_least
from pipelines.subtracted_start import SubtractedStart

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

    from nora_vision.factors import Factors

DIRECTIONS, SCALES = ("ArB2r", "A2rBr", "ArBr", "random"), ("stable", "weight_svd", "gd_scale", "unit")


@dataclass
class LoraGaOptions(LoraOptions):
    """Options of LoRA-GA."""

    gradient_batches: int = option(8, "batches for the mean gradient of the initialisation", "LoRA-GA gradient batches")
    lora_ga_direction: str = option(
        "ArB2r", "which singular vectors of the gradient A and B start from", "LoRA-GA direction", choices=DIRECTIONS
    )
    lora_ga_scale: str = option("stable", "scaling of the start", "LoRA-GA scale", choices=SCALES)
    stable_gamma: float = option(16.0, "gamma of the stable scaling", "LoRA-GA stable_gamma")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "gradient_batches")
        above_zero(self, "stable_gamma")


class LoraGa(SubtractedStart, Lora):
    """LoRA whose first step follows the gradient of full fine-tuning.

    PEFT trains plain LoRA silently if its pass over the data is left out; here that pass is part of the initialisation.
    """

    name = "lora_ga"
    title = "LoRA-GA"
    reference = "Wang et al. 2024, LoRA-GA: Low-Rank Adaptation with Gradient Approximation"
    parameters = "rank * (m + n)"
    Options = LoraGaOptions

    def initial_factors(self, layers: Mapping[str, LoraLayer], probe: Probe, adapter_name: str) -> dict[str, Factors]:
        """B_0 (out, r) and A_0 (r, in) from the gradients of the base model, which are cached.

        Raises: ValueError if the probe has no losses, or a gradient is not finite.
        """

        def compute() -> dict[str, Factors]:
            with adapters_off(layers.values()):
                gradients = mean_gradients(weights, probe.losses, self.options.gradient_batches)
            for name, layer in layers.items():
                layer.get_base_layer()._peft_loraga_grad = gradients.pop(name)
            return super(LoraGa, self).initial_factors(layers, probe, adapter_name)

        weights = {name: layer.get_base_layer().weight for name, layer in layers.items()}
        return factors_from(probe.cache, self.name, self.options, weights, compute)

    def initialise(self, layer: LoraLayer, adapter_name: str) -> None:
        """PEFT's LoRA-GA, which reads the gradient from the base layer."""
        from peft.tuners.lora.config import LoraGAConfig

        options = self.options
        config = LoraGAConfig(direction=options.lora_ga_direction, scale=options.lora_ga_scale, stable_gamma=options.stable_gamma)
        layer.lora_ga_init(adapter_name, config)


METHOD = LoraGa
