"""Check that A1111 and ComfyUI can read a kohya LoRA file for SDXL."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch

from nora_vision.files import AdapterFileError, read_header, read_tensors, tensor_hash
from nora_vision.kohya import CUSTOM, PREFIXES, SDXL

PARTS = ("lora_up.weight", "lora_down.weight", "alpha")
# The parts of a layer in a form of LyCORIS that A1111 or ComfyUI reads; one of the sets must be complete.
LYCORIS_PARTS = (
    {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"},
    {"lokr_w1", "lokr_w2", "alpha"},
    {"lokr_w1", "lokr_w2_a", "lokr_w2_b", "alpha"},
    {"weight", "on_input"},
)
OPTIONAL_PARTS = ("dora_scale",)
UNET_LAYER = re.compile(
    r"((input|output)_blocks_\d+_\d+|middle_block_\d+)_\w+|input_blocks_0_0|time_embed_[02]|label_emb_0_[02]|out_2"
)
TEXT_LAYER = re.compile(r"text_model_encoder_layers_\d+_(self_attn_(q|k|v|out)_proj|mlp_fc[12])")


def lint_kohya(path: Path) -> list[str]:
    """What A1111 or ComfyUI would misread in the file at `path`, a sentence each; empty if nothing is wrong.

    A file for a base model of another shape must not claim to be for SDXL, which A1111 recognises by `ss_base_model_version`.
    Both programs identify layers by their names in Stability's code, and ignore unknown names silently.
    """
    try:
        header, tensors = read_header(path), read_tensors(path)
    except (AdapterFileError, FileNotFoundError) as error:
        return [str(error)]
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.partition(".")
        layers.setdefault(name, {})[part] = tensor
    findings = [finding for name, parts in layers.items() for finding in _of_layer(name, parts)]
    return _of_header(header.metadata, layers, tensors) + findings


def _of_header(
    metadata: Mapping[str, str], layers: Mapping[str, Mapping[str, torch.Tensor]], tensors: Mapping[str, torch.Tensor]
) -> list[str]:
    """Findings in the metadata of the file."""
    ranks = Counter(len(parts["lora_down.weight"]) for parts in layers.values() if "lora_down.weight" in parts)
    rank = str(ranks.most_common(1)[0][0]) if ranks else "none"
    digest = tensor_hash(tensors)
    base = CUSTOM if metadata.items() & CUSTOM.items() else SDXL
    lycoris = any(set(parts) in LYCORIS_PARTS for parts in layers.values())
    expected = {
        "ss_network_module": "lycoris.kohya" if lycoris else "networks.lora",
        **({} if lycoris else {"ss_network_dim": rank}),
        "ss_v2": "False",
        "sshs_model_hash": digest,
        "modelspec.sai_model_spec": "1.0.0",
        **base,
        "modelspec.hash_sha256": f"0x{digest}",
    }
    findings = [
        f"{key} must be {value!r}, got {metadata.get(key)!r}" for key, value in expected.items() if metadata.get(key) != value
    ]
    findings += [
        f"{key} is missing" for key in ("ss_network_alpha", "ss_output_name", "modelspec.title") if not metadata.get(key)
    ]
    return findings if layers else [*findings, "the file has no layer"]


def _of_layer(name: str, parts: Mapping[str, torch.Tensor]) -> list[str]:
    """Findings in the tensors of one layer, by the part of their names after the layer's."""
    prefix = next((prefix for prefix in PREFIXES.values() if name.startswith(prefix)), None)
    if prefix is None:
        return [f"{name!r} must start with one of {', '.join(PREFIXES.values())}"]
    pattern = UNET_LAYER if prefix == PREFIXES["unet"] else TEXT_LAYER
    findings = (
        [] if pattern.fullmatch(name.removeprefix(prefix)) else [f"{name!r} is not the name of a layer in A1111 and ComfyUI"]
    )
    return findings if set(parts) in LYCORIS_PARTS else findings + _of_lora(name, parts)


def _of_lora(name: str, parts: Mapping[str, torch.Tensor]) -> list[str]:
    """Findings in the tensors of a layer of plain LoRA or DoRA."""
    findings = [f"{name!r} has no {part}" for part in PARTS if part not in parts]
    findings += [f"{name!r} has an unknown {part}" for part in parts if part not in (*PARTS, *OPTIONAL_PARTS)]
    if len(findings) or parts["lora_up.weight"].shape[1] == parts["lora_down.weight"].shape[0]:
        return findings
    shapes = ", ".join(f"{part} {tuple(parts[part].shape)}" for part in PARTS[:2])
    return [f"{name!r} has factors of different ranks: {shapes}"]
