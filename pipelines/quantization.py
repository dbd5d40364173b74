"""4-bit base weights under an adapter in full precision  [QLoRA, Dettmers et al. 2023].

NF4 has 16 values at quantiles of the normal distribution and one scale for each block of 64 weights. Double quantisation stores
these scales in 8 bits: 0.127 instead of 0.5 bits a weight. Products are computed with dequantised weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from pipelines.errors import InputError
from pipelines.packages import installed

KINDS = ("nf4",)
# Names in a run's directory: of the folder for what initialisation reads, and within it of the unquantised weights.
CALIBRATION, UNQUANTIZED = "calibration", "unquantized"
INDEX = "unquantized.safetensors.index.json"


def compute_dtype(dtype: torch.dtype, device: torch.device | str) -> torch.dtype:
    """The dtype of products with 4-bit weights: bfloat16 as in QLoRA, on CPUs, where it is slow, the model's own `dtype`."""
    return dtype if torch.device(device).type == "cpu" else torch.bfloat16


def quantize_linear_layers(model: nn.Module, kind: str, compute_dtype: torch.dtype, unquantized: Path | None = None) -> float:
    """Replace all linear layers of `model` by bitsandbytes' 4-bit layers with double quantisation, on any device.

    Quantised loading in diffusers does the same, but requires a GPU. Each layer's weight is released before the next is
    quantised.

    Args:
        kind: "nf4".
        compute_dtype: of the matrix products, for which the weights are dequantised.
        unquantized: a folder, to which the weights are written first, in a form that `CheckpointWeights` reads.
    Returns: the relative error sqrt(sum ||Q(W) - W||^2 / sum ||W||^2) over all layers.
    Raises: InputError for another kind, if bitsandbytes is not installed, or if there is no linear layer.
    """
    if kind not in KINDS:
        raise InputError(f"quantize must be one of {', '.join(KINDS)}, got {kind!r}.")
    installed("bitsandbytes", f"--quantize {kind}")
    names = [name for name, layer in model.named_modules() if type(layer) is nn.Linear]
    if not names:
        raise InputError(f"{type(model).__name__} has no linear layers to quantise. Leave out --quantize {kind}.")
    squares = torch.zeros(2, dtype=torch.float64)
    for name in names:
        if unquantized is not None:
            _write_weight(unquantized, name, model.get_submodule(name).weight)
        squares += _quantize(model, name, kind, compute_dtype)
    if unquantized is not None:
        index = {"weight_map": {f"{name}.weight": f"{name}.safetensors" for name in names}}
        (unquantized / INDEX).write_text(json.dumps(index), encoding="utf-8")
    error, total = squares.tolist()
    return (error / total) ** 0.5 if total else 0.0


def _write_weight(folder: Path, name: str, weight: torch.Tensor) -> None:
    from nora_vision.files import write_tensors

    write_tensors(folder / f"{name}.safetensors", {f"{name}.weight": weight.detach()})


def _quantize(model: nn.Module, name: str, kind: str, compute_dtype: torch.dtype) -> torch.Tensor:
    """Quantise the layer called `name`. Returns: ||Q(W) - W||^2 and ||W||^2, (2,) float64 on the CPU."""
    from nora_vision.quantization import dequantized_weight

    bnb, layer = installed("bitsandbytes", f"--quantize {kind}").nn, model.get_submodule(name)
    weight, device = layer.weight.data, layer.weight.device
    quantized = bnb.Linear4bit(
        layer.in_features,
        layer.out_features,
        layer.bias is not None,
        compute_dtype,
        compress_statistics=True,
        quant_type=kind,
        device="meta",
    )
    quantized.weight = bnb.Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type=kind, module=quantized)
    quantized.bias = layer.bias
    # Otherwise, some CPUs repack the weight for inference into a lossy form that has no gradient.
    quantized.support_avx512bf16_for_cpu = False
    # Where open_clip looks for the dtype of a layer whose weight is an integer.
    quantized.int8_original_dtype = weight.dtype
    # Moving the layer to its device quantises it.
    quantized = quantized.to(device)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, quantized)
    weight = weight.float()
    error = torch.stack([(dequantized_weight(quantized).float() - weight).square().sum(), weight.square().sum()])
    return error.double().cpu()


def summary(kind: str, dtype: torch.dtype, errors: Mapping[str, float]) -> str:
    """How the base model was quantised, and what that lost.

    Args:
        dtype: of the products.
        errors: as of `losses_of`.
    """
    return (
        f"The linear layers are stored in {kind.upper()} with double quantisation, and their products are computed in "
        f"{str(dtype).removeprefix('torch.')}. AdamW is paged on GPUs, and plain on CPUs. {losses_of(errors)} {EXPORT_NOTE}"
    )


def losses_of(errors: Mapping[str, float]) -> str:
    """The relative errors of quantisation, by component, as a sentence."""
    losses = ", ".join(f"{name} {error:.1%}" for name, error in errors.items())
    return f"Relative error of the quantised weights, ||Q(W) - W|| / ||W||: {losses}."


EXPORT_NOTE = (
    "The adapter and its exports belong to the quantised weights Q(W): on the base model in full precision the result differs "
    "from training by W - Q(W)."
)
