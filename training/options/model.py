"""Options of the base model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipelines.errors import InputError
from pipelines.subject.base_model import BUILT_IN_MODEL


@dataclass
class ModelOptions:
    """The base model and how it is computed."""

    pretrained_model_name_or_path: str = field(
        default=str(BUILT_IN_MODEL), metadata={"help": "SDXL base model: a hub name or a folder. The built-in one unless said."}
    )
    variant: str | None = field(default=None, metadata={"help": "Variant of the model's files, such as fp16."})
    mixed_precision: Literal["no", "fp16", "bf16"] | None = field(
        default=None, metadata={"help": "Precision of the frozen weights; what accelerate is configured for unless said."}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute activations in the backward pass: less memory, more time."}
    )

    _argument_group_name = "model"

    def __post_init__(self) -> None:
        if not self.pretrained_model_name_or_path:
            raise InputError("pretrained_model_name_or_path must be a hub name or a folder, got nothing.")
