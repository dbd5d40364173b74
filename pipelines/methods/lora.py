"""LoRA: h = W x + s B A x,  s = alpha / r, or alpha / sqrt(r) with rsLoRA, by PEFT  [Hu et al. 2021; Kalajdzievski 2023]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from pipelines.adapter_method import AdapterMethod, LowRankOptions, Probe, TaskDefaults, option
from pipelines.option_checks import above_zero
from pipelines.run_options import Task

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass
class LoraOptions(LowRankOptions):
    """Options of LoRA."""

    use_rslora: bool = option(False, "scale by alpha / sqrt(rank) instead of alpha / rank, with alpha = rank by default")
    lora_plus_ratio: float = option(1.0, "LoRA+ ratio of the learning rates of B and A", "LoRA+ ratio")
    lora_fa: bool = option(False, "LoRA-FA: only B is trained, and A keeps its random start", "LoRA-FA (only B is trained)")

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(self, "lora_plus_ratio")


class Lora(AdapterMethod):
    """LoRA with a Gaussian A and a zero B.

    Options: the learning rates of LoRA+  [Hayou et al. 2024], the scaling of rsLoRA  [Kalajdzievski 2023], and LoRA-FA, which
    trains only B: m r parameters a layer, and A x is kept for the backward pass instead of x  [Zhang et al. 2023].
    """

    name = "lora"
    title = "LoRA"
    reference = "Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models"
    parameters = "rank * (m + n)"
    Options = LoraOptions

    @classmethod
    def defaults(cls, task: Task, built_in: bool) -> TaskDefaults:
        """The usual rank and learning rate of DreamBooth on SDXL, and those of CLIP-LoRA for classification."""
        return TaskDefaults(1e-4, {"rank": 4}) if task == "subject" else TaskDefaults(2e-4, {"rank": 2})

    def config(self, target_modules: list[str], exclude_modules: str | None = None) -> PeftConfig:
        """PEFT's configuration; the scaling is 1 unless alpha is given."""
        # Imported here, as `--help` needs only the options above.
        from peft import LoraConfig

        options = self.options
        return LoraConfig(
            r=options.rank,
            lora_alpha=options.rank if options.alpha is None else options.alpha,
            lora_dropout=options.dropout,
            use_rslora=options.use_rslora,
            init_lora_weights="gaussian",
            target_modules=target_modules,
            exclude_modules=exclude_modules,
        )

    def start(self, model: nn.Module, probe: Probe, adapter_name: str) -> None:
        """Sample A from the probe's generator; LoRA needs neither activations nor losses."""
        from diffusers.training_utils import cast_training_params

        cast_training_params(model, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if f"lora_A.{adapter_name}." in name:
                rank = parameter.shape[0]
                with torch.no_grad():
                    parameter.copy_(torch.randn(parameter.shape, generator=probe.generator) / rank)
                parameter.requires_grad_(not self.options.lora_fa)

    def learning_rate_factor(self, parameter_name: str) -> float:
        """`lora_plus_ratio` for B, 1 for A."""
        return self.options.lora_plus_ratio if ".lora_B." in parameter_name else 1.0

    @classmethod
    def allows_any_scale(cls, config: PeftConfig) -> bool:
        """True for LoRA. False for DoRA, whose row norms PEFT cannot scale."""
        return not config.use_dora


METHOD = Lora
