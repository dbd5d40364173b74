"""OLoRA: h = W x + s (B A - B_0 A_0) x,  B_0 and A_0 the first r columns of Q and rows of R, W = Q R, by PEFT
[Büyükakyüz 2024]."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.methods.lora import Lora, LoraOptions
from pipelines.subtracted_start import SubtractedStart

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


class Olora(SubtractedStart, Lora):
    """LoRA that starts from an orthonormal basis of the weight's columns."""

    name = "olora"
    title = "OLoRA"
    reference = "Büyükakyüz 2024, OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models"
    parameters = "rank * (m + n)"
    Options = LoraOptions

    def initialise(self, layer: LoraLayer, adapter_name: str, statistic: None) -> None:
        """PEFT's OLoRA."""
        layer.olora_init(adapter_name)


METHOD = Olora
