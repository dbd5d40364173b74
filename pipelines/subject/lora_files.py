"""LoRA files from anywhere: checked before stock diffusers loads them, and taken off again where they do not fit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from nora_vision.files import AdapterFileError, SafetensorsHeader, read_header, read_tensors
from pipelines.errors import InputError

# PEFT runs names as regular expressions, and those of a stranger's file may take for ever.
PLAIN_NAME = re.compile(r"\^?[\w.-]+")
CONFIGURATION = "lora_adapter_metadata"
# Of PEFT's configuration; its other fields may start anything, and must be what they are by default.
ALLOWED = frozenset(
    {
        "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "use_rslora", "use_dora",
        "lora_bias", "lora_dropout", "bias", "init_lora_weights", "inference_mode", "peft_type", "peft_version", "task_type",
        "base_model_name_or_path", "revision",
    }
)  # fmt: skip
LAST_FACTORS = ("lora_up.weight", "lora_B.weight", "lora.up.weight")
# All that diffusers and PEFT raise for a file that is none of theirs, or of another model.
UNFIT = (ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError)


def load_lora_file(pipeline: StableDiffusionXLPipeline, path: Path, adapter_name: str) -> None:
    """Load a LoRA in diffusers' or kohya's format as `adapter_name`.

    Raises:
        AdapterFileError: the file must not be used.
        InputError: it is no LoRA of this model; the pipeline has no such adapter then.
    """
    header = read_header(path)
    check_names(header, path)
    read_tensors(path)
    try:
        pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=adapter_name)
    except UNFIT as error:
        raise InputError(f"{path} does not fit this base model. Load it onto the model that it was trained on.") from error
    layers = [layer for part in _parts_of(pipeline) for layer in part.modules() if isinstance(layer, LoraLayer)]
    loaded = sum(adapter_name in layer.lora_B for layer in layers)
    expected = sum(name.endswith(LAST_FACTORS) for name in header.tensors)
    if not loaded or loaded < expected:
        if any(adapter_name in (getattr(part, "peft_config", None) or {}) for part in _parts_of(pipeline)):
            pipeline.delete_adapters([adapter_name])
        raise InputError(
            f"{path} fits {loaded} of the {expected} layers that it changes. Load it onto the base model that it was trained on."
        )


def check_names(header: SafetensorsHeader, path: Path) -> None:
    """Check every name that a file gives to diffusers and PEFT.

    Raises: AdapterFileError naming the first that is not plain, and a configuration that wants more than a LoRA.
    """
    strange = next((name for name in header.tensors if not PLAIN_NAME.fullmatch(name)), None)
    if strange is not None:
        raise AdapterFileError(f"{path} has a tensor called {strange!r:.100}, which is no layer's name. It is not used.")
    if CONFIGURATION not in header.metadata:
        return
    try:
        given = json.loads(header.metadata[CONFIGURATION])
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} has a configuration that is no JSON: {error}.") from error
    if not isinstance(given, dict):
        raise AdapterFileError(f"{path} has a configuration that is no table.")
    usual = LoraConfig().to_dict()
    for name, value in given.items():
        # "unet.r", "text_encoder.lora_alpha" and the like.
        field = str(name).rpartition(".")[2]
        if (field not in ALLOWED and value != usual.get(field)) or not _are_plain(value):
            raise AdapterFileError(f"{path} has a configuration whose {name!r:.100} is not one of a LoRA: {value!r:.100}.")


def _are_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_are_plain, [*value, *value.values()]))
    if isinstance(value, list):
        return all(map(_are_plain, value))
    # Names of models may have a slash, which is nothing to an expression.
    return not isinstance(value, str) or not value or bool(PLAIN_NAME.fullmatch(value.replace("/", "-")))


def _parts_of(pipeline: StableDiffusionXLPipeline) -> tuple[Any, ...]:
    return pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2
