"""Register NoRA in PEFT's mappings on `import nora_vision`; PEFT's own function refuses types outside of its enum."""

from __future__ import annotations

from peft import mapping

from .config import NoraConfig, NoraPeftType
from .model import NoraModel


def register() -> None:
    """Make `get_peft_model`, `inject_adapter_in_model` and `PeftModel.from_pretrained` accept `NoraConfig`."""
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[NoraPeftType.NORA] = NoraConfig
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[NoraPeftType.NORA] = NoraModel
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[NoraPeftType.NORA] = NoraModel.prefix
