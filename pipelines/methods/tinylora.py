"""TinyLoRA: h = W x + U_r sqrt(S_r) sum_i v_i P_i sqrt(S_r) V_r^T x,  W = U S V^T,  P_i random, by PEFT  [Morris et al. 2026]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pipelines.adapter_method import TaskDefaults, option
from pipelines.option_checks import at_least, below_one, within
from pipelines.run_options import Task
from pipelines.shared_state import SharedStateMethod

if TYPE_CHECKING:
    from peft import PeftConfig
    from peft.tuners.tinylora.layer import TinyLoraLayer

    from nora_vision.factors import Factors


@dataclass
class TinyLoraOptions:
    """Options of TinyLoRA."""

    rank: int | None = option(None, "number of singular directions of each weight", **{"few-shot": "lora_rank"})
    u: int = option(64, "length of the trained vector v", "TinyLoRA u (length of v)")
    weight_tying: float = option(
        0.0,
        "share of tying between layers: 0 for a vector each, 1 for one vector for all",
        "TinyLoRA weight_tying (share of tying between layers)",
    )
    dropout: float = option(0.0, "dropout probability within the adapter")

    def __post_init__(self) -> None:
        at_least(self, 1, "rank")
        at_least(self, 1, "u")
        within(self, 0, 1, "weight_tying")
        below_one(self, "dropout")


class TinyLora(SharedStateMethod):
    """TinyLoRA, whose vectors start at zero; consecutive layers can share one. Its file contains the frozen factors too."""

    name = "tinylora"
    title = "TinyLoRA"
    reference = "Morris et al. 2026, Learning to Reason in 13 Parameters"
    parameters = "0"
    shared_parameters = "u * max(1, round(layers * (1 - weight_tying)))"
    Options = TinyLoraOptions
    config_class = "TinyLoraConfig"
    fields: ClassVar = {"rank": "r", "dropout": "tinylora_dropout"}
    shared = ("tinylora_v",)
    seed_field = "projection_seed"

    @classmethod
    def defaults(cls, task: Task, built_in: bool) -> TaskDefaults:
        """The paper's rank; for classification, LoRA's learning rate."""
        return TaskDefaults(1e-3 if task == "subject" else 2e-4, {"rank": 2})

    @classmethod
    def complete(cls, layers: Sequence[TinyLoraLayer], config: PeftConfig, adapter_name: str) -> None:
        """Compute in float32, as v is trained in it; PEFT keeps the other factors in the weights' precision."""
        for layer in layers:
            for part in (layer.tinylora_A, layer.tinylora_B):
                part[adapter_name] = part[adapter_name].float()

    @staticmethod
    def factors_of(layer: TinyLoraLayer, adapter_name: str) -> Factors:
        """(B R) A."""
        from nora_vision.factors import Factors

        R = layer._compute_R(adapter_name).float()
        return Factors(layer.tinylora_B[adapter_name].float() @ R, layer.tinylora_A[adapter_name].float())


METHOD = TinyLora
