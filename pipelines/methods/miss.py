"""MiSS: h = W x + D^T (x_1 + ... + x_k),  with x in k shards of r values and a trained D (r, m), by PEFT  [Kang and Yin 2025]."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.adapter_method import TaskDefaults, option
from pipelines.option_checks import at_least
from pipelines.peft_method import PeftMethod
from pipelines.run_options import Task


@dataclass
class MissOptions:
    """Options of MiSS."""

    rank: int | None = option(None, "rank, the number of values in a shard of the input", **{"few-shot": "lora_rank"})

    def __post_init__(self) -> None:
        at_least(self, 1, "rank")


class Miss(PeftMethod):
    """MiSS. The weight change, D^T [I ... I], has rank r."""

    name = "miss"
    title = "MiSS"
    reference = "Kang and Yin 2025, MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure"
    parameters = "rank * m"
    Options = MissOptions
    config_class = "MissConfig"
    rank_option = None
    adapts_quantized_layers = True
    samples_start = False
    adapts_convolutions = False
    is_low_rank = True

    @classmethod
    def defaults(cls, task: Task, built_in: bool) -> TaskDefaults:
        """Twice LoRA's rank, for as many parameters."""
        return TaskDefaults(1e-4, {"rank": 8}) if task == "subject" else TaskDefaults(2e-4, {"rank": 4})

    def misfit_of_size(self, m: int, n: int) -> str | None:
        """A shard cannot be longer than the input."""
        rank = self.options.rank
        return None if rank <= n else f"rank must be at most its in_features of {n}, got {rank}. Lower rank."


METHOD = Miss
