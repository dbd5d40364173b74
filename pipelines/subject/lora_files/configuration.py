"""PEFT's configuration of a LoRA file: in its header (`lora_adapter_metadata`) or in adapter_config.json.

Only numbers are passed on to PEFT. A setting that would make the adapter something other than a LoRA is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import LoHaConfig, LoKrConfig, LoraConfig
from peft.utils.other import get_pattern_key

from nora_vision.files import PLAIN_NAME, AdapterFileError

METADATA = "lora_adapter_metadata"
READ_TYPES = {"LORA": LoraConfig, "LOHA": LoHaConfig, "LOKR": LoKrConfig}
# Together with the tensors, these determine the adapter.
USED = ("r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
# These follow from the tensors, or matter only for training.
UNUSED = (
    *("target_modules", "exclude_modules", "lora_bias", "bias", "peft_type", "use_effective_conv2d"),
    *("decompose_both", "decompose_factor", "lora_dropout", "rank_dropout", "module_dropout", "inference_mode"),
    *("rank_dropout_scale", "init_weights", "runtime_config", "low_cpu_mem_usage", "ephemeral_gpu_offload"),
)
# Texts without any effect.
REMARKS = ("base_model_name_or_path", "revision", "task_type", "peft_version", "auto_mapping")
# Initialisations that keep the base model's weights; with the others, an adapter is trained against changed weights.
PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva", "lora_only", "lycoris")


@dataclass(frozen=True)
class Settings:
    """The configuration of one component's adapter.

    Args:
        r, alpha: of its layers; None if not configured.
        rank_pattern, alpha_pattern: exceptions by layer name.
        use_rslora: whether the scaling is alpha / sqrt(r).
        use_dora: whether each layer must have the magnitudes of a DoRA.
    """

    r: int | None = None
    alpha: float | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False

    def rank_of(self, layer: str) -> int | None:
        """The rank of a layer, by its name in the component."""
        return self.rank_pattern.get(get_pattern_key(self.rank_pattern, layer), self.r)

    def scale_of(self, layer: str, rank: int) -> float | None:
        """The scaling of a layer of that rank, alpha / r or alpha / sqrt(r); None if no alpha is configured."""
        alpha = self.alpha_pattern.get(get_pattern_key(self.alpha_pattern, layer), self.alpha)
        return None if alpha is None else alpha / (rank**0.5 if self.use_rslora else rank)


def settings_of_metadata(metadata: Mapping[str, str], path: Path) -> dict[str, Settings]:
    """The settings in a file's header by component; those without a component are under "".

    Raises: AdapterFileError naming a setting that does not belong to a LoRA.
    """
    if METADATA not in metadata:
        return {}
    try:
        given = json.loads(metadata[METADATA])
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} has a configuration that is not JSON: {error}.") from error
    if not isinstance(given, dict):
        raise AdapterFileError(f"{path} has a configuration that is not a JSON object.")
    by_component: dict[str, dict[str, Any]] = {}
    for name, value in given.items():
        # "unet.r", "text_encoder.lora_alpha" and the like.
        component, _, setting = str(name).rpartition(".")
        by_component.setdefault(component, {})[setting] = value
    return {component: checked(fields, path, component) for component, fields in by_component.items()}


def checked(fields: Mapping[str, Any], path: Path, component: str = "") -> Settings:
    """The settings of one component.

    Raises: AdapterFileError naming a setting that does not belong to a LoRA.
    """
    peft_type = str(fields.get("peft_type") or "LORA").upper()
    if peft_type not in READ_TYPES:
        raise AdapterFileError(
            f"{path} configures an adapter of PEFT type {peft_type!r:.40}, but only LoRA, DoRA, LoHa and LoKr can be loaded."
        )
    defaults = READ_TYPES[peft_type]().to_dict()
    for name, value in fields.items():
        setting = f"{component}.{name}" if component else name
        if not _is_harmless(name, value, defaults):
            raise AdapterFileError(
                f"{path} has a configuration in which {setting!r:.100} has a value that is not supported: {value!r:.100}."
            )
    alpha = fields.get("lora_alpha", fields.get("alpha"))
    return Settings(
        fields.get("r"),
        alpha,
        fields.get("rank_pattern") or {},
        fields.get("alpha_pattern") or {},
        bool(fields.get("use_rslora")),
        bool(fields.get("use_dora")),
    )


def _is_harmless(name: str, value: Any, defaults: Mapping[str, Any]) -> bool:
    """Whether a setting leaves the adapter a LoRA; `defaults` are those of its PEFT type."""
    if name in REMARKS:
        return True
    if name in CHECKS:
        return CHECKS[name](value)
    if name in (*USED, *UNUSED):
        return _is_plain(value)
    return not value or value == defaults.get(name)


def _is_rank(value: Any) -> bool:
    return value is None or (_is_number(value) and value > 0)


def _is_alpha(value: Any) -> bool:
    return value is None or _is_number(value)


def _is_pattern(value: Any) -> bool:
    return not value or (isinstance(value, dict) and all(map(_is_plain, value)) and all(map(_is_number, value.values())))


def _is_plain_initialisation(value: Any) -> bool:
    return value in PLAIN_INITIALISATIONS


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (dict, list)):
        return all(map(_is_plain, [*value, *value.values()] if isinstance(value, dict) else value))
    return not isinstance(value, str) or not value or bool(PLAIN_NAME.fullmatch(value))


CHECKS: dict[str, Callable[[Any], bool]] = {
    "r": _is_rank,
    **dict.fromkeys(("lora_alpha", "alpha"), _is_alpha),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), _is_pattern),
    "init_lora_weights": _is_plain_initialisation,
}
