"""LoKr: h = W x + s (C kron B A) x,  s = alpha / r, a Kronecker product, by PEFT  [Yeh et al. 2024]."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import ClassVar

from pipelines.adapter_method import LowRankOptions, TaskDefaults, option
from pipelines.errors import InputError
from pipelines.peft_method import PeftMethod
from pipelines.run_options import Task


@dataclass
class LokrOptions(LowRankOptions):
    """Options of LoKr."""

    decompose_factor: int = option(
        8, "the size of C as far as it divides the layer's; -1 for sizes close to their square roots", "Decompose factor"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decompose_factor != -1 and self.decompose_factor < 1:
            raise InputError(f"decompose_factor must be -1 or at least 1, got {self.decompose_factor}.")


class Lokr(PeftMethod):
    """LoKr. C is (m1, n1), B A (m2, n2), m = m1 m2, n = n1 n2. From r = max(m2, n2) / 2 on, B A is one matrix."""

    name = "lokr"
    title = "LoKr"
    reference = "Yeh et al. 2024, Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation"
    parameters = "m1 * n1 + (rank * (m2 + n2) if 2 * rank < max(m2, n2) else m2 * n2)"
    Options = LokrOptions
    config_class = "LoKrConfig"
    # A high rank is the usual way to ask for B A as one matrix.
    rank_option = None
    fields: ClassVar = {"rank": "r", "dropout": "module_dropout"}

    @classmethod
    def defaults(cls, task: Task, built_in: bool) -> TaskDefaults:
        """A rank that needs about half of LoRA's parameters; C starts at zero, so the rate is higher than LoRA's."""
        return TaskDefaults(5e-4, {"rank": 16}) if task == "subject" else TaskDefaults(5e-4, {"rank": 4})

    def formula_names(self, m: int, n: int) -> dict[str, int]:
        """m, n and the sizes m1, n1 of C and m2, n2 of B A."""
        m1, n1 = (self._size_of_C(side) for side in (m, n))
        return {"m": m, "n": n, "m1": m1, "n1": n1, "m2": m // m1, "n2": n // n1}

    def _size_of_C(self, side: int) -> int:
        """The factor of `side` that becomes a side of C, as PEFT chooses it."""
        factor = self.options.decompose_factor
        if factor > 0 and side % factor == 0:
            return factor
        largest = isqrt(side) if factor == -1 else min(factor, isqrt(side))
        return next(divisor for divisor in range(largest, 0, -1) if side % divisor == 0)


METHOD = Lokr
