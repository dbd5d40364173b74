"""Adapters as plain LoRA, which diffusers and PEFT scale, mix, fuse and delete."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.adapter_checks import matrix_size
from pipelines.adapter_method import add_adapter
from pipelines.errors import InputError
from pipelines.lazy_modules import nn, torch

if TYPE_CHECKING:
    from peft import LoraConfig

    from nora_vision.factors import Factors


def as_lora(factors: Mapping[str, Factors]) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """The plain LoRA (or DoRA) with exactly these weight changes: its PEFT configuration and tensors.

    Args:
        factors: by layer name: up (out, k) and down (k, in), or (out, k, 1, 1) and (k, in, kh, kw) for a convolution.
    """
    from peft import LoraConfig

    from nora_vision.saving import PEFT_PREFIX

    ranks = {layer: len(each.down) for layer, each in factors.items()}
    rank = max(ranks.values())
    others = {f"^{layer}": of_layer for layer, of_layer in ranks.items() if of_layer != rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=others,
        alpha_pattern=others,
        target_modules=sorted(factors),
        use_dora=any(each.magnitude is not None for each in factors.values()),
        inference_mode=True,
    )
    tensors = {}
    for layer, each in factors.items():
        values = {"lora_A.weight": each.down, "lora_B.weight": each.up, "lora_magnitude_vector": each.magnitude}
        tensors |= {f"{PEFT_PREFIX}{layer}.{key}": value for key, value in values.items() if value is not None}
    return config, tensors


def add_as_lora(model: nn.Module, factors: Mapping[str, Factors], adapter_name: str, source: Path) -> None:
    """Add the plain LoRA with exactly these weight changes, which diffusers scales, fuses and deletes like any LoRA.

    Args:
        factors: by layer name: up (out, k) and down (k, in), or (k, in * kh * kw) for a convolution.
        source: the file or folder of the adapter, for error messages.
    Raises: InputError naming a layer that the model lacks or has in another size.
    """
    from peft import set_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer

    from nora_vision.calibration import base_name
    from nora_vision.factors import in_weight_shape

    modules = {base_name(name): module for name, module in model.named_modules() if not name.endswith(".base_layer")}
    shaped = {}
    for name, each in factors.items():
        layer = modules.get(name)
        layer = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
        size = matrix_size(layer)
        if size != (len(each.up), each.down.shape[1]):
            raise InputError(
                f"{source} does not fit this model: it changes the layer {name!r} of size {len(each.up)} x {each.down.shape[1]}, "
                f"but the model has {'no such layer' if size is None else f'one of {size[0]} x {size[1]}'}. Load it onto the "
                "model that it was trained on."
            )
        shaped[name] = in_weight_shape(layer, each)
    config, tensors = as_lora(shaped)
    add_adapter(model, config, adapter_name)
    set_peft_model_state_dict(model, tensors, adapter_name)
