"""Mapping of the tensor names in LoRA files of all programs to the layers of a pipeline.

A tensor's name consists of the layer's name, which differs between programs, and the part: `lora_unet_input_blocks_4_1_proj_in`
and `lora_down.weight`. Layers are looked up in a table of all names that the model's layers can have, so that no name in a file
is used as a regular expression.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from diffusers import StableDiffusionXLPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from nora_vision.components import COMPONENTS
from nora_vision.kohya import stability_name

# Prefixes of names with dots, in diffusers and PEFT, in Stability's code and in OneTrainer.
DOTTED = {
    "unet": ("unet.", "", "lora_unet.", "diffusion_model.", "model.diffusion_model."),
    "text_encoder": ("text_encoder.", "clip_l.", "lora_te1.", "lora_te.", "text_encoders.clip_l.transformer."),
    "text_encoder_2": ("text_encoder_2.", "clip_g.", "lora_te2.", "text_encoders.clip_g.transformer."),
}
# Prefixes of names with underscores, in kohya's format.
UNDERSCORED = {
    "unet": ("lora_unet_",),
    "text_encoder": ("lora_te1_", "lora_te_"),
    "text_encoder_2": ("lora_te2_",),
}
PEFT_PREFIX = "base_model.model."
# PEFT can put the adapter's name into that of a tensor: lora_A.default.weight.
ADAPTER = r"(?:\.[A-Za-z0-9_-]+)?"
PART_PATTERNS = {
    "down": rf"\.lora_A{ADAPTER}\.weight|\.lora_down\.weight|[._]lora\.down\.weight|\.lora_linear_layer\.down\.weight",
    "up": rf"\.lora_B{ADAPTER}\.weight|\.lora_up\.weight|[._]lora\.up\.weight|\.lora_linear_layer\.up\.weight",
    "up_bias": rf"\.lora_B{ADAPTER}\.bias",
    "mid": r"\.lora_mid\.weight",
    "alpha": r"[._]lora\.alpha|\.lora_linear_layer\.alpha|\.alpha",
    "magnitude": rf"\.lora_magnitude_vector{ADAPTER}(?:\.weight)?",
    "dora_scale": r"\.dora_scale",
    "diff": r"\.diff|\.w_norm",
    "diff_b": r"\.diff_b|\.b_norm",
} | {
    name: rf"\.{name}{ADAPTER}"
    for name in (
        *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
        *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    )
}
# In a file of IA3, the scales of a layer are called like the weight of a checkpoint; only the layer's name differs.
IA3_PART = re.compile(r"(lora_(?:unet|te1|te2|te)_[a-zA-Z0-9_]+)\.(weight|on_input)")
PART = re.compile("(?:" + "|".join(f"(?P<{name}>{pattern})" for name, pattern in PART_PATTERNS.items()) + ")$")
LAYER_TYPES = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)


class Layer(NamedTuple):
    """A layer of a pipeline: its component, and its name in that component without adapters."""

    component: str
    name: str

    def __str__(self) -> str:
        return f"{self.component}.{self.name}"


def split_name(name: str) -> tuple[str, str] | None:
    """Split a tensor's name into the layer's name and the part; None if it ends in no known part."""
    name = name.removeprefix(PEFT_PREFIX)
    if scaled := IA3_PART.fullmatch(name):
        return scaled[1], scaled[2]
    match = PART.search(name)
    return None if match is None else (name[: match.start()], str(match.lastgroup))


def base_layers(pipeline: StableDiffusionXLPipeline) -> dict[Layer, nn.Module]:
    """All layers that a LoRA file can change, without the adapters around them."""
    layers = {}
    for component in COMPONENTS:
        for name, module in _base_modules(getattr(pipeline, component)):
            if isinstance(module, LAYER_TYPES):
                layers[Layer(component, name)] = module
    return layers


def spellings(layers: Iterable[Layer], layers_per_block: int) -> dict[str, Layer]:
    """The layers by every name that a file can use for them.

    Args:
        layers_per_block: of the UNet's configuration; names in Stability's code depend on it.
    """
    table: dict[str, Layer] = {}
    for layer in layers:
        component = layer.component
        names = _unet_names(layer.name, layers_per_block) if component == "unet" else _text_names(layer.name)
        for name in names:
            table |= {prefix + name: layer for prefix in DOTTED[component]}
            table |= {prefix + name.replace(".", "_"): layer for prefix in UNDERSCORED[component]}
    return table


def _unet_names(name: str, layers_per_block: int) -> list[str]:
    """The names of a UNet layer in diffusers, in older versions of it, and in Stability's code if it has one there."""
    older = re.sub(r"\.to_out\.0$", ".to_out", name)
    names = [name, older, *(re.sub(r"\.(attn[12])\.", r".\1.processor.", each) for each in (name, older))]
    try:
        return [*names, stability_name(name, layers_per_block)]
    except ValueError:
        # A layer that SDXL does not have.
        return names


def _text_names(name: str) -> list[str]:
    """A text encoder layer's names with and without `text_model.`, which transformers 5 removed, and diffusers' older ones."""
    core = name.removeprefix("text_model.")
    older = re.sub(r"self_attn\.([qkv])_proj$", r"self_attn.to_\1", core).replace("self_attn.out_proj", "self_attn.to_out")
    return [spelling for each in dict.fromkeys((core, older)) for spelling in (each, f"text_model.{each}")]


def _base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the model without adapters, by name."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside or "\0"):
            continue
        if isinstance(module, BaseTunerLayer):
            inside += (f"{name}.",)
            module = module.get_base_layer()
        yield name, module
