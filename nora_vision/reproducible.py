"""Which layers' outer factors are known to follow from base weight and activation scale, so that none is decomposed twice.

A record holds digests of everything it depends on and is compared with the layer as it is now. It therefore survives a move
to another device or a gathered FSDP shard, and it is void as soon as the base weight (a merge, a cast, a change in place), the
activation scale, the rank or an outer factor has changed.
"""

from __future__ import annotations

import hashlib

import torch
from peft.utils.integrations import dequantize_module_weight

from .files import tensor_bytes
from .layer import NoraLayer


def record_reproducible(layer: NoraLayer, adapter_name: str) -> None:
    """Record that computing the adapter's outer factors from their source gives the factors that the layer holds now.

    To be called where they were just computed so, or where computing them again gave the same.
    """
    layer.reproducible[adapter_name] = (source_digest(layer, adapter_name), factors_digest(layer, adapter_name))


def is_reproducible(layer: NoraLayer, adapter_name: str) -> bool:
    """Whether that is recorded and still holds."""
    recorded = layer.reproducible.get(adapter_name)
    return recorded is not None and recorded == (source_digest(layer, adapter_name), factors_digest(layer, adapter_name))


def adapter_of_same_source(layer: NoraLayer, adapter_name: str) -> str | None:
    """An adapter of the layer whose outer factors are known to be what `adapter_name`'s source gives; None if there is none.

    The kept adapters of a run all have the source of the adapter in training.
    """
    if not layer.reproducible:
        return None
    source = source_digest(layer, adapter_name)
    for other, recorded in layer.reproducible.items():
        if recorded == (source, factors_digest(layer, other)):
            return other
    return None


def source_digest(layer: NoraLayer, adapter_name: str) -> str:
    """The hash of everything that outer factors are computed from: base weight (dequantised), activation scale, rank, dtype."""
    weight = dequantize_module_weight(layer.get_base_layer()).detach()
    kept_in = layer.nora_B[adapter_name].dtype
    return _digest(weight, layer.nora_activation_scale[adapter_name], rank=layer.r[adapter_name], dtype=str(kept_in))


def factors_digest(layer: NoraLayer, adapter_name: str) -> str:
    """The hash of the outer factors."""
    return _digest(layer.nora_B[adapter_name], layer.nora_A[adapter_name])


def _digest(*tensors: torch.Tensor, **values: object) -> str:
    digest = hashlib.sha256(repr(sorted(values.items())).encode())
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
