"""DeLoRA: h = W x + (lambda / r) sum_i b_i a_i^T diag(||w_j||) x / (||b_i|| ||a_i||), by PEFT  [Bini et al. 2025]."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.adapter_method import TaskDefaults, option
from pipelines.option_checks import above_zero, at_least
from pipelines.peft_method import PeftMethod
from pipelines.run_options import Task


@dataclass
class DeloraOptions:
    """Options of DeLoRA."""

    rank: int | None = option(None, "rank", **{"few-shot": "lora_rank"})
    delora_lambda: float = option(15.0, "initial bound lambda on the norm of the weight change", "DeLoRA lambda")

    def __post_init__(self) -> None:
        at_least(self, 1, "rank")
        above_zero(self, "delora_lambda")


class Delora(PeftMethod):
    """DeLoRA, which trains the directions and the norm of a low-rank change apart. ||w_j|| are the norms of the columns of W."""

    name = "delora"
    title = "DeLoRA"
    reference = "Bini et al. 2025, Decoupling Angles and Strength in Low-rank Adaptation"
    parameters = "rank * (m + n) + 1"
    Options = DeloraOptions
    config_class = "DeloraConfig"
    adapts_convolutions = False
    is_low_rank = True

    @classmethod
    def defaults(cls, task: Task, built_in: bool) -> TaskDefaults:
        """LoRA's ranks."""
        return TaskDefaults(5e-4, {"rank": 4}) if task == "subject" else TaskDefaults(5e-4, {"rank": 2})


METHOD = Delora
