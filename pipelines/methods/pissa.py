"""PiSSA: h = W x + s (B A - B_0 A_0) x,  s B_0 A_0 the leading r singular triples of W, by PEFT  [Meng et al. 2024]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.adapter_method import option
from pipelines.methods.lora import Lora, LoraOptions
from pipelines.option_checks import at_least
from pipelines.subtracted_start import SubtractedStart

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


@dataclass
class PissaOptions(LoraOptions):
    """Options of PiSSA."""

    pissa_niter: int = option(
        0, "power iterations of a randomised singular value decomposition; 0 for the exact one", "PiSSA niter (0: exact SVD)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "pissa_niter")


class Pissa(SubtractedStart, Lora):
    """LoRA that trains the principal singular directions of each weight from their own values."""

    name = "pissa"
    title = "PiSSA"
    reference = "Meng et al. 2024, PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models"
    parameters = "rank * (m + n)"
    Options = PissaOptions

    def initialise(self, layer: LoraLayer, adapter_name: str, statistic: None) -> None:
        """PEFT's PiSSA."""
        iterations = self.options.pissa_niter
        layer.pissa_init(adapter_name, f"pissa_niter_{iterations}" if iterations else "pissa")


METHOD = Pissa
