"""MiLoRA: h = W x + s (B A - B_0 A_0) x,  s B_0 A_0 the last r singular triples of W  [Wang et al. 2024]."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.lazy_modules import torch
from pipelines.methods.lora import Lora, LoraOptions
from pipelines.subtracted_start import SubtractedStart

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


class Milora(SubtractedStart, Lora):
    """LoRA that trains the minor singular directions of each weight, so that the principal ones stay as they are."""

    name = "milora"
    title = "MiLoRA"
    reference = "Wang et al. 2024, MiLoRA: Harnessing Minor Singular Components for Parameter-Efficient LLM Finetuning"
    parameters = "rank * (m + n)"
    Options = LoraOptions

    def initialise(self, layer: LoraLayer, adapter_name: str, statistic: None) -> None:
        """B_0 = U_r diag(sqrt(sigma_r / s)),  A_0 = diag(sqrt(sigma_r / s)) V_r^T,  of the r smallest singular values."""
        U, S, Vh = torch.linalg.svd(layer.get_base_layer().weight, full_matrices=False)
        rank = layer.r[adapter_name]
        root = (S[-rank:] / layer.scaling[adapter_name]).sqrt()
        layer.lora_A[adapter_name].weight.data = root[:, None] * Vh[-rank:]
        layer.lora_B[adapter_name].weight.data = U[:, -rank:] * root


METHOD = Milora
