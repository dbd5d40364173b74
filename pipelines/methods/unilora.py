"""Uni-LoRA: h = W x + B A x,  entries of A and B are theta_k / sqrt(n_k), k random, n_k its count, by PEFT  [Li et al. 2025]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pipelines.adapter_method import TaskDefaults, option
from pipelines.lazy_modules import torch
from pipelines.option_checks import above_zero, at_least, below_one
from pipelines.run_options import Task
from pipelines.shared_state import SharedStateMethod

if TYPE_CHECKING:
    from peft import PeftConfig
    from peft.tuners.unilora import UniLoraLayer

    from nora_vision.factors import Factors


@dataclass
class UniLoraOptions:
    """Options of Uni-LoRA."""

    rank: int | None = option(None, "rank", **{"few-shot": "lora_rank"})
    theta_d_length: int | None = option(None, "length of the trained vector theta", "Uni-LoRA theta_d_length (length of theta)")
    init_theta_d_bound: float = option(
        0.02, "theta starts uniform in [-bound, bound]", "Uni-LoRA init_theta_d_bound (bound of theta at the start)"
    )
    dropout: float = option(0.0, "dropout probability within the adapter")

    def __post_init__(self) -> None:
        at_least(self, 1, "rank")
        at_least(self, 1, "theta_d_length")
        above_zero(self, "init_theta_d_bound")
        below_one(self, "dropout")


class UniLora(SharedStateMethod):
    """Uni-LoRA: one trained vector theta for all layers, whose entries are spread over A and B by an isometry.

    As neither A nor B starts at zero, training starts near the base model, not at it.
    """

    name = "unilora"
    title = "Uni-LoRA"
    reference = "Li et al. 2025, Uni-LoRA: One Vector is All You Need"
    parameters = "0"
    shared_parameters = "theta_d_length"
    Options = UniLoraOptions
    starts_at_base = False
    config_class = "UniLoraConfig"
    fields: ClassVar = {"rank": "r", "dropout": "unilora_dropout"}
    shared = ("unilora_theta_d",)
    seed_field = "proj_seed"

    @classmethod
    def defaults(cls, task: Task, built_in: bool) -> TaskDefaults:
        """PEFT's rank, and a vector shorter than NoRA's inner factors."""
        length = {("subject", True): 4096, ("subject", False): 65536}.get((task, built_in), 1024)
        return TaskDefaults(1e-3, {"rank": 4, "theta_d_length": length})

    @classmethod
    def complete(cls, layers: Sequence[UniLoraLayer], config: PeftConfig, adapter_name: str) -> None:
        """Set 1 / sqrt(n_k) in float32, n_k the number of entries that use theta_k; PEFT rounds to the weights' precision."""
        indices = [part[adapter_name] for layer in layers for part in (layer.unilora_indices_A, layer.unilora_indices_B)]
        counts = sum(torch.bincount(part.flatten(), minlength=config.theta_d_length) for part in indices)
        factors = counts.float().rsqrt()
        for layer in layers:
            layer.unilora_scales_A[adapter_name] = factors[layer.unilora_indices_A[adapter_name]]
            layer.unilora_scales_B[adapter_name] = factors[layer.unilora_indices_B[adapter_name]]

    @classmethod
    def generated(cls, layers: Mapping[str, UniLoraLayer], adapter_name: str) -> dict[str, torch.Tensor]:
        """The indices k of A and B."""
        parts = {"A": "unilora_indices_A", "B": "unilora_indices_B"}
        return {
            f"{name}.{part}": getattr(layer, attribute)[adapter_name]
            for name, layer in layers.items()
            for part, attribute in parts.items()
        }

    @staticmethod
    def factors_of(layer: UniLoraLayer, adapter_name: str) -> Factors:
        """B A."""
        from nora_vision.factors import Factors

        A, B = layer._get_lora_matrices(adapter_name, cast_to_fp32=True)
        return Factors(B, A)


METHOD = UniLora
