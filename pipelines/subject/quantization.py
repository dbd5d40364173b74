"""4-bit base weights under an adapter in full precision  [QLoRA, Dettmers et al. 2023]."""

from __future__ import annotations

import torch
from torch import nn

from pipelines.errors import InputError
from pipelines.packages import installed

KINDS = ("nf4",)


def quantize_linear_layers(model: nn.Module, kind: str, compute_dtype: torch.dtype) -> None:
    """Replace all linear layers of `model` by bitsandbytes' 4-bit layers, on any device including the CPU.

    Quantised loading in diffusers does the same, but requires a GPU.

    Args:
        kind: "nf4".
        compute_dtype: of the matrix products, for which the weights are dequantised.
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
        # Otherwise, some CPUs repack the weight for inference into a lossy form that adapters cannot read.
        quantized.support_avx512bf16_for_cpu = False
        parent, _, child = name.rpartition(".")
        # Moving the layer to its device quantises it.
        setattr(model.get_submodule(parent), child, quantized.to(device))
