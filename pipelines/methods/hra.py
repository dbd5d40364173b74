"""HRA: h = W H_1 ... H_r x,  H_i = I - 2 u_i u_i^T / ||u_i||^2, Householder reflections, by PEFT  [Yuan et al. 2024]."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.adapter_method import TaskDefaults, option
from pipelines.errors import InputError
from pipelines.peft_method import PeftMethod
from pipelines.run_options import Task


@dataclass
class HraOptions:
    """Options of HRA."""

    rank: int | None = option(None, "number of reflections, an even number", **{"few-shot": "lora_rank"})

    def __post_init__(self) -> None:
        if self.rank is not None and (self.rank < 2 or self.rank % 2):
            raise InputError(
                f"rank must be an even number of at least 2, got {self.rank}: pairs of equal reflections start at the base model."
            )


class Hra(PeftMethod):
    """HRA. The weight change, W (H_1 ... H_r - I), has rank r."""

    name = "hra"
    title = "HRA"
    reference = "Yuan et al. 2024, Bridging the Gap between Low-Rank and Orthogonal Adaptation via Householder Reflection"
    parameters = "rank * n"
    Options = HraOptions
    config_class = "HRAConfig"
    is_low_rank = True

    @classmethod
    def defaults(cls, task: Task, built_in: bool) -> TaskDefaults:
        """PEFT's rank."""
        return TaskDefaults(1e-3, {"rank": 8})


METHOD = Hra
