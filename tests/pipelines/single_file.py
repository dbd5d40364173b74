"""A pipeline written as one file in Stability's own layout, the inverse of what diffusers reads."""

import re

import torch
from safetensors.torch import save_file

from nora_vision.kohya import stability_name

RESNET_NORMS = {"norm1": "in_layers.0", "norm2": "out_layers.0"}
OPEN_CLIP = {
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn": "attn",
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
}
VAE = (
    (r"down_blocks\.(\d+)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d+)\.upsamplers\.0", r"up.\1.upsample"),
    (r"up_blocks\.(\d+)\.resnets", r"up.\1.block"),
    (r"mid_block\.resnets\.0", r"mid.block_1"),
    (r"mid_block\.resnets\.1", r"mid.block_2"),
    (r"mid_block\.attentions\.0", r"mid.attn_1"),
    (r"conv_shortcut", r"nin_shortcut"),
    (r"group_norm", r"norm"),
    (r"to_([qkv])\.", r"\1."),
    (r"to_out\.0", r"proj_out"),
    (r"conv_norm_out", r"norm_out"),
)


def unet_tensors(unet):
    """The UNet's weights, with Stability's names."""
    tensors = {}
    for name, value in unet.state_dict().items():
        module, _, kind = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        if ".resnets." in module and last in RESNET_NORMS:
            stability = f"{stability_name(f'{parent}.conv1', unet.config.layers_per_block).rpartition('.in_layers')[0]}"
            stability += f".{RESNET_NORMS[last]}"
        else:
            known = {"conv_norm_out": "out.0"}
            stability = known.get(module) or stability_name(module, unet.config.layers_per_block)
        tensors[f"model.diffusion_model.{stability}.{kind}"] = value
    return tensors


def autoencoder_tensors(vae):
    """The autoencoder's weights, with Stability's names, which number the up blocks in reverse."""
    tensors, last = {}, len(vae.config.up_block_types) - 1
    for name, value in vae.state_dict().items():
        for pattern, replacement in VAE:
            name = re.sub(pattern, replacement, name)
        name = re.sub(r"\bup\.(\d+)", lambda match: f"up.{last - int(match[1])}", name)
        if ".attn_1." in name and name.endswith("weight") and value.ndim == 2:
            value = value[:, :, None, None]
        tensors[f"first_stage_model.{name}"] = value
    return tensors


def open_clip_tensors(encoder):
    """The second text encoder's weights, packed as in open_clip."""
    state = {name.removeprefix("text_model."): value for name, value in encoder.state_dict().items()}
    tensors = {"text_projection": state.pop("text_projection.weight").T}
    for name, value in state.items():
        packed = re.fullmatch(r"(.+\.self_attn)\.([qkv])_proj\.(weight|bias)", name)
        if packed is not None:
            if packed[2] != "q":
                continue
            value = torch.cat([state[f"{packed[1]}.{part}_proj.{packed[3]}"] for part in "qkv"])
            name = f"{packed[1]}.in_proj_{packed[3]}"
        for ours, theirs in OPEN_CLIP.items():
            name = name.replace(ours, theirs)
        tensors[name] = value
    return {f"conditioner.embedders.1.model.{name}": value for name, value in tensors.items()}


def save_single_file(pipe, path):
    """Write the weights of the whole pipeline to `path`."""
    first = {name.removeprefix("text_model."): value for name, value in pipe.text_encoder.state_dict().items()}
    clip = {f"conditioner.embedders.0.transformer.text_model.{name}": value for name, value in first.items()}
    tensors = unet_tensors(pipe.unet) | autoencoder_tensors(pipe.vae) | open_clip_tensors(pipe.text_encoder_2) | clip
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
