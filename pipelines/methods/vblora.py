"""VB-LoRA: h = W x + B A x,  parts of A and B are softmax mixtures of k vectors of a shared bank, by PEFT  [Li et al. 2024]."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pipelines.adapter_method import TaskDefaults, option
from pipelines.errors import InputError
from pipelines.lazy_modules import nn, torch
from pipelines.option_checks import above_zero, at_least, below_one
from pipelines.peft_method import targeted_layers
from pipelines.run_options import Task
from pipelines.shared_state import SharedStateMethod

if TYPE_CHECKING:
    from peft import PeftConfig
    from peft.tuners.vblora import VBLoRALayer

    from nora_vision.factors import Factors

# The paper's length of the vectors; it must divide the sizes of all layers.
LONGEST_VECTOR = 256


@dataclass
class VbLoraOptions:
    """Options of VB-LoRA."""

    rank: int | None = option(None, "rank", **{"few-shot": "lora_rank"})
    num_vectors: int = option(90, "vectors in the bank", "VB-LoRA num_vectors (vectors in the bank)")
    vector_length: int | None = option(
        None,
        "length of the bank's vectors, a divisor of the sizes of all adapted layers (by default, the largest one up to "
        f"{LONGEST_VECTOR})",
        "VB-LoRA vector_length (of the vectors of the bank)",
    )
    topk: int = option(2, "vectors mixed in each sub-vector", "VB-LoRA topk (vectors in a mixture)")
    init_vector_bank_bound: float = option(
        0.02, "the bank starts uniform in [-bound, bound]", "VB-LoRA init_vector_bank_bound (bound of the bank at the start)"
    )
    dropout: float = option(0.0, "dropout probability within the adapter")

    def __post_init__(self) -> None:
        for name in ("rank", "num_vectors", "vector_length", "topk"):
            at_least(self, 1, name)
        if self.topk > self.num_vectors:
            raise InputError(f"topk must be at most num_vectors={self.num_vectors}, got {self.topk}.")
        above_zero(self, "init_vector_bank_bound")
        below_one(self, "dropout")


class VbLora(SharedStateMethod):
    """VB-LoRA. As A and B are mixtures of the same bank, training starts near the base model, not at it.

    Files contain the k selected weights of each sub-vector and not the logits, as in the paper: training cannot go on from them.
    """

    name = "vblora"
    title = "VB-LoRA"
    reference = "Li et al. 2024, VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks"
    parameters = "rank * (m + n) // vector_length * num_vectors"
    shared_parameters = "num_vectors * vector_length"
    Options = VbLoraOptions
    starts_at_base = False
    config_class = "VBLoRAConfig"
    fields: ClassVar = {"rank": "r", "dropout": "vblora_dropout"}
    settings: ClassVar = {"save_only_topk_weights": True}
    shared = ("vblora_vector_bank",)

    @classmethod
    def defaults(cls, task: Task, built_in: bool) -> TaskDefaults:
        """The paper's rank; the bank's learning rate is the paper's, and for classification LoRA's."""
        return TaskDefaults(1e-3 if task == "subject" else 2e-4, {"rank": 4})

    def attach(self, model: nn.Module, config: PeftConfig, adapter_name: str, generator: torch.Generator) -> None:
        """Add the adapter, with vectors as long as the layers allow unless their length is given."""
        if self.options.vector_length is None:
            config.vector_length = longest_vector(model, config)
        super().attach(model, config, adapter_name, generator)

    def misfit_of_size(self, m: int, n: int) -> str | None:
        """The length of the vectors must divide both sizes."""
        length = self.options.vector_length
        if length is None or (m % length, n % length) == (0, 0):
            return None
        return f"vector_length must divide its sizes, {m} and {n}, got {length}. Change it, or leave it out."

    def learning_rate_factor(self, parameter_name: str) -> float:
        """The paper's ratio of the learning rates of the logits and the bank, 10."""
        return 10.0 if ".vblora_logits_" in parameter_name else 1.0

    @staticmethod
    def factors_of(layer: VBLoRALayer, adapter_name: str) -> Factors:
        """B A."""
        from nora_vision.factors import Factors

        A, B = layer._get_lora_matrices(adapter_name, cast_to_fp32=True)
        return Factors(B, A)


def longest_vector(model: nn.Module, config: PeftConfig) -> int:
    """The largest divisor, up to `LONGEST_VECTOR`, of the sizes of all linear layers of `model` that `config` targets."""
    layers = [layer for _, layer in targeted_layers(model, config) if isinstance(layer, nn.Linear)]
    common = math.gcd(*(size for layer in layers for size in (layer.in_features, layer.out_features)))
    # Without a layer, the target is refused.
    return max((length for length in range(1, LONGEST_VECTOR + 1) if common % length == 0), default=1)


METHOD = VbLora
