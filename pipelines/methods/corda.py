"""CorDA: h = W x + s (B A - B_0 A_0) x,  W X^T X = U S V^T,  s B_0 A_0 = U_r S_r V_r^T (X^T X)^-1, by PEFT
[Yang et al. 2024]."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.adapter_method import Probe, option
from pipelines.methods.lora import Lora, LoraOptions
from pipelines.option_checks import one_of
from pipelines.subtracted_start import SubtractedStart

if TYPE_CHECKING:
    import torch
    from peft.tuners.lora import LoraLayer

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

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, (PRINCIPAL, PRESERVED), "corda_method")


class Corda(SubtractedStart, Lora):
    """LoRA along the components of W that matter for the activations X of the training data."""

    name = "corda"
    title = "CorDA"
    reference = "Yang et al. 2024, CorDA: Context-Oriented Decomposition Adaptation of Large Language Models"
    parameters = "rank * (m + n)"
    Options = CordaOptions

    def statistics(self, layers: Mapping[str, LoraLayer], probe: Probe) -> Iterator[tuple[str, torch.Tensor]]:
        """X^T X of the inputs of each layer, (in, in), divided by the mean of its diagonal.

        So A_0 and B_0 do not depend on the scale of the activations. PEFT divides each batch by its largest entry instead.
        Raises: ValueError if the probe cannot run the model, or all inputs of a layer are zero.
        """
        from pipelines.second_moments import second_moments

        for name, moments in second_moments(layers, probe.forward):
            size = moments.second.diagonal().mean()
            if size == 0:
                raise ValueError(
                    f"All inputs of {name!r} are zero, so CorDA cannot weight them. Remove it from the target modules."
                )
            yield name, moments.second / size

    def initialise(self, layer: LoraLayer, adapter_name: str, statistic: torch.Tensor) -> None:
        """PEFT's `corda_init`, after the part of `preprocess_corda` that follows the covariance."""
        from peft.tuners.lora.corda import CordaEigens, collect_eigens_for_layer

        base, rank = layer.get_base_layer(), layer.r[adapter_name]
        base.covariance_matrix = statistic
        eigens = collect_eigens_for_layer(base, None)
        part = slice(rank) if self.options.corda_method == PRINCIPAL else slice(-rank, None)
        U, V = (vectors[:, part].to(statistic.device) for vectors in (eigens.U_WC, eigens.V_WC))
        base.eigens = CordaEigens(eigens.S_WC[part].clone(), U, V)
        layer.corda_init(adapter_name, "corda")


METHOD = Corda
