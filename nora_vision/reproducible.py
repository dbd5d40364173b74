"""Record which outer factors are exactly reproducible from base weight and activation scale, to avoid a second decomposition.

A record consists of digests and is compared with the current state of the layer. So it stays valid on another device or after
gathering FSDP shards, and becomes invalid when the base weight (by a merge, a cast or a change in place), the activation scale,
the rank or an outer factor changes.
"""

from __future__ import annotations

import hashlib

import torch

from .files import tensor_bytes
from .layer import NoraLayer
from .quantization import dequantized_weight


def record_reproducible(layer: NoraLayer, adapter_name: str) -> None:
    """Record that the layer's current outer factors are those computed from their source.

    Call it after computing them, or after checking that recomputing gives the same bits.
    """
    layer.reproducible[adapter_name] = (source_digest(layer, adapter_name), factors_digest(layer, adapter_name))


def is_reproducible(layer: NoraLayer, adapter_name: str) -> bool:
    """Whether a valid record says that the adapter's outer factors can be recomputed."""
    recorded = layer.reproducible.get(adapter_name)
    return recorded is not None and recorded == (source_digest(layer, adapter_name), factors_digest(layer, adapter_name))


def adapter_of_same_source(layer: NoraLayer, adapter_name: str) -> str | None:
    """An adapter of the layer with recorded outer factors of the same source as `adapter_name`; None if there is none.

    All adapters of a run share the source, for example.
    """
    if not layer.reproducible:
        return None
    source = source_digest(layer, adapter_name)
    for other, recorded in layer.reproducible.items():
        if recorded == (source, factors_digest(layer, other)):
            return other
    return None


def source_digest(layer: NoraLayer, adapter_name: str) -> str:
    """The hash of the source of outer factors: base weight (or unquantised weight), scale, rank, slice, scaling and dtype."""
    values = {
        "weight": layer.unquantized_digest or weight_digest(dequantized_weight(layer.get_base_layer())),
        "rank": layer.r[adapter_name],
        "outer_slice": layer.outer_slice[adapter_name],
        "outer_scaling": layer.outer_scaling[adapter_name],
        "dtype": str(layer.nora_B[adapter_name].dtype),
    }
    return _digest(layer.nora_activation_scale[adapter_name], **values)


def weight_digest(weight: torch.Tensor) -> str:
    """The hash of a weight, of any shape."""
    return _digest(weight)


def factors_digest(layer: NoraLayer, adapter_name: str) -> str:
    """The hash of the outer factors."""
    return _digest(layer.nora_B[adapter_name], layer.nora_A[adapter_name])


def _digest(*tensors: torch.Tensor, **values: object) -> str:
    digest = hashlib.sha256(repr(sorted(values.items())).encode())
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
