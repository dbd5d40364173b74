"""Base weights in four bits a number, under an adapter in full precision  [QLoRA, Dettmers et al. 2023]."""

from __future__ import annotations

import torch
from torch import nn

from pipelines.errors import InputError
from pipelines.packages import installed

KINDS = ("nf4",)


def quantize_linear_layers(model: nn.Module, kind: str, compute_dtype: torch.dtype) -> None:
    """Put bitsandbytes' 4-bit layers in the place of all linear layers of `model`, on any device, the CPU included.

    diffusers' own loading does the same where there is a GPU, and refuses where there is none.

    Args:
        kind: "nf4".
        compute_dtype: of the products; the weights are dequantised to it for each.
    Raises: InputError for another kind, or if bitsandbytes is not installed.
    """
    if kind not in KINDS:
        raise InputError(f"quantize must be one of {', '.join(KINDS)}, got {kind!r}.")
    layers = installed("bitsandbytes", f"--quantize {kind}").nn
    for name, layer in list(model.named_modules()):
        if type(layer) is not nn.Linear:
            continue
        has_bias, device = layer.bias is not None, layer.weight.device
        quantized = layers.Linear4bit(
            layer.in_features, layer.out_features, has_bias, compute_dtype, quant_type=kind, device="meta"
        )
        quantized.weight = layers.Params4bit(layer.weight.data, requires_grad=False, quant_type=kind, module=quantized)
        quantized.bias = layer.bias
        # On some CPUs it would repack its weight for inference, in a form that has lost digits and that adapters cannot read.
        quantized.support_avx512bf16_for_cpu = False
        parent, _, child = name.rpartition(".")
        # Moving a layer to its device is what quantises it.
        setattr(model.get_submodule(parent), child, quantized.to(device))
