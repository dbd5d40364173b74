"""GraLoRA: h = W x + s Delta x,  Delta of k x k blocks, each of rank r / k, s = alpha / r, by PEFT  [Jung et al. 2025]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pipelines.adapter_method import LowRankOptions, TaskDefaults, option
from pipelines.errors import InputError
from pipelines.option_checks import at_least
from pipelines.peft_method import PeftMethod
from pipelines.run_options import Task


@dataclass
class GraloraOptions(LowRankOptions):
    """Options of GraLoRA."""

    gralora_k: int = option(2, "blocks in a row and in a column of the weight; must divide the rank", "GraLoRA k")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "gralora_k")
        if self.rank is not None and self.rank % self.gralora_k:
            raise InputError(f"gralora_k must divide rank={self.rank}, got {self.gralora_k}. Change one of the two.")


class Gralora(PeftMethod):
    """GraLoRA. The weight change has rank k r, with the parameters of LoRA of rank r."""

    name = "gralora"
    title = "GraLoRA"
    reference = "Jung et al. 2025, GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning"
    parameters = "rank * (m + n)"
    Options = GraloraOptions
    config_class = "GraloraConfig"
    adapts_quantized_layers = True
    fields: ClassVar = {"rank": "r", "dropout": "gralora_dropout"}
    adapts_convolutions = False

    @classmethod
    def defaults(cls, task: Task, built_in: bool) -> TaskDefaults:
        """LoRA's ranks, and twice its rates."""
        return TaskDefaults(2e-4, {"rank": 4}) if task == "subject" else TaskDefaults(4e-4, {"rank": 2})

    def misfit_of_size(self, m: int, n: int) -> str | None:
        """Blocks tile the whole weight."""
        k = self.options.gralora_k
        fits = m % k == 0 and n % k == 0
        return None if fits else f"gralora_k must divide its sizes {m} x {n}, got {k}. Lower gralora_k."


METHOD = Gralora
