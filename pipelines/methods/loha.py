"""LoHa: h = W x + s (B_1 A_1 * B_2 A_2) x,  * elementwise, s = alpha / r, by PEFT  [Hyeon-Woo et al. 2022]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pipelines.adapter_method import LowRankOptions, TaskDefaults
from pipelines.peft_method import PeftMethod
from pipelines.run_options import Task


@dataclass
class LohaOptions(LowRankOptions):
    """Options of LoHa."""


class Loha(PeftMethod):
    """LoHa, whose weight change has rank up to r^2."""

    name = "loha"
    title = "LoHa"
    reference = "Hyeon-Woo et al. 2022, FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning"
    parameters = "2 * rank * (m + n)"
    Options = LohaOptions
    config_class = "LoHaConfig"
    fields: ClassVar = {"rank": "r", "dropout": "module_dropout"}

    @classmethod
    def defaults(cls, task: Task, built_in: bool) -> TaskDefaults:
        """Half of LoRA's rank, for as many parameters; products of small values need a higher rate."""
        return TaskDefaults(5e-4, {"rank": 2}) if task == "subject" else TaskDefaults(1e-3, {"rank": 1})


METHOD = Loha
