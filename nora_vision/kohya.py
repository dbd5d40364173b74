"""Layer names and header of kohya's LoRA files for SDXL, as sd-scripts, A1111, ComfyUI and diffusers read them.

All four support the layer names of Stability's code for the UNet (`input_blocks_4_1_...`); sd-scripts supports no others.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import torch

from .files import tensor_hash

PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
OUTER_LAYERS = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
RESNET_LAYERS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
# The widths of SDXL's UNet. A model of the same architecture but other widths has other files.
SDXL_WIDTHS, SDXL_TEXT_WIDTH = (320, 640, 1280), 2048
# What a header says of the base model: SDXL or a model fine-tuned from it, or another one.
SDXL = {"ss_base_model_version": "sdxl_base_v1-0", "modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}
CUSTOM = {"ss_base_model_version": "custom", "modelspec.architecture": "custom/lora"}
BLOCK = re.compile(r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


def kohya_name(component: str, module_name: str, layers_per_block: int) -> str:
    """Kohya's name of a layer: `lora_unet_...`, `lora_te1_text_model_...` or `lora_te2_text_model_...`, without a suffix.

    Args:
        component: "unet", "text_encoder" or "text_encoder_2".
        module_name: the layer's name in that component, text encoder names with their `text_model.`.
        layers_per_block: of the UNet's configuration.
    Raises: ValueError for a layer of the UNet that the format has no name for.
    """
    name = stability_name(module_name, layers_per_block) if component == "unet" else module_name
    return PREFIXES[component] + name.replace(".", "_")


def stability_name(module_name: str, layers_per_block: int) -> str:
    """The name in Stability's code of a layer of a UNet2DConditionModel.

    Raises: ValueError for a layer without such a name.
    """
    if module_name in OUTER_LAYERS:
        return OUTER_LAYERS[module_name]
    match = BLOCK.fullmatch(module_name)
    if match is None:
        raise ValueError(f"The kohya format has no name for UNet layer {module_name!r}. Export to format='diffusers' instead.")
    block, kind, index, layer = match[1], match[2], int(match[3]), match[4]
    if kind == "resnets":
        layer = RESNET_LAYERS.get(layer, layer)
    side, _, number = block.partition(".")
    if side == "mid_block":
        return f"middle_block.{1 if kind == 'attentions' else 2 * index}.{layer}"
    first = int(number) * (layers_per_block + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + layers_per_block + 1}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{first + layers_per_block}.2.{layer}"
    # input_blocks.0 is conv_in, and the downsampler of each block has an index too.
    start, part = (first + 1, "input_blocks") if side == "down_blocks" else (first, "output_blocks")
    return f"{part}.{start + index}.{1 if kind == 'attentions' else 0}.{layer}"


def kohya_header(
    tensors: Mapping[str, torch.Tensor],
    *,
    title: str,
    is_sdxl: bool,
    rank: int,
    network_args: Mapping[str, Any],
    prediction_type: str,
    zero_terminal_snr: bool,
    resolution: int,
) -> dict[str, str]:
    """The metadata of a kohya file. A1111 lists it under SDXL if `ss_base_model_version` says so, else under SD 1.

    Args:
        tensors: all tensors of the file, of any shape, for its hash.
        title: name of the LoRA in other programs.
        is_sdxl: whether the base model has the shape of SDXL.
        rank: rank and alpha of the network; layers may have another rank.
        network_args: further settings of the network.
        prediction_type, zero_terminal_snr: of the scheduler, such as "epsilon" and False.
        resolution: side of the images.
    """
    digest = tensor_hash(tensors)
    return {
        **(SDXL if is_sdxl else CUSTOM),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(rank)),
        "ss_network_args": json.dumps(network_args, sort_keys=True),
        "ss_v2": "False",
        "ss_zero_terminal_snr": str(zero_terminal_snr),
        "ss_output_name": title,
        "sshs_model_hash": digest,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title,
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.prediction_type": {"v_prediction": "v"}.get(prediction_type, prediction_type),
        "modelspec.hash_sha256": f"0x{digest}",
    }
