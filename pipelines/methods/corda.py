"""CorDA: h = W x + s (B A - B_0 A_0) x,  W X^T X = U S V^T,  s B_0 A_0 = U_r S_r V_r^T (X^T X)^-1, by PEFT
[Yang et al. 2024]."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.adapter_method import Probe, option
from pipelines.cached_factors import factors_from
from pipelines.methods.lora import Lora, LoraOptions
from pipelines.subtracted_start import SubtractedStart

if TYPE_CHECKING:
    import torch
    from peft.tuners.lora import LoraLayer

    from nora_vision.factors import Factors

PRINCIPAL, PRESERVED = "ipm", "kpm"


@dataclass
class CordaOptions(LoraOptions):
    """Options of CorDA."""

    corda_method: str = option(
        PRINCIPAL,
        "trained components: ipm, the leading ones (instruction-previewed), or kpm, the last ones (knowledge-preserved)",
        "CorDA method (ipm: leading components, kpm: last components)",
        choices=(PRINCIPAL, PRESERVED),
    )


class Corda(SubtractedStart, Lora):
    """LoRA along the components of W that matter for the activations X of the training data."""

    name = "corda"
    title = "CorDA"
    reference = "Yang et al. 2024, CorDA: Context-Oriented Decomposition Adaptation of Large Language Models"
    parameters = "rank * (m + n)"
    Options = CordaOptions

    def initial_factors(self, layers: Mapping[str, LoraLayer], probe: Probe, adapter_name: str) -> dict[str, Factors]:
        """B_0 (out, r) and A_0 (r, in) from the covariances of the inputs, which are cached.

        Raises: ValueError if the probe cannot run the model.
        """
        from pipelines.second_moments import second_moments

        def compute() -> dict[str, Factors]:
            moments = second_moments(layers, probe.forward)
            for name, layer in layers.items():
                set_eigens(layer, moments.pop(name), self.options)
            return super(Corda, self).initial_factors(layers, probe, adapter_name)

        weights = {name: layer.get_base_layer().weight for name, layer in layers.items()}
        return factors_from(probe.cache, self.name, self.options, weights, compute)

    def initialise(self, layer: LoraLayer, adapter_name: str) -> None:
        """PEFT's CorDA."""
        layer.corda_init(adapter_name, "corda")


def set_eigens(layer: LoraLayer, covariance: torch.Tensor, options: CordaOptions) -> None:
    """Set what PEFT's `corda_init` reads, from the covariance (in, in) of the inputs, as PEFT's `preprocess_corda` does."""
    from peft.tuners.lora.corda import collect_eigens_for_layer

    base = layer.get_base_layer()
    base.covariance_matrix = covariance
    base.eigens = collect_eigens_for_layer(base, None)
    del base.covariance_matrix
    part = slice(options.rank) if options.corda_method == PRINCIPAL else slice(-options.rank, None)
    base.eigens.S_WC = base.eigens.S_WC[part].clone()
    for name in ("U_WC", "V_WC"):
        setattr(base.eigens, name, getattr(base.eigens, name)[:, part].to(covariance.device).clone())


METHOD = Corda
