"""Compact adapters: the outer factors are left out of the file, and computed again from the base weights on loading.

What the weights alone do not determine, the activation scale, is in the file; so is a probe of every layer's change of
weight, without which a basis from other weights, or turned by rounding, would make a wrong adapter and say nothing.
"""

from __future__ import annotations

import math

import torch

from .files import AdapterFileError
from .initialization import outer_factors
from .layer import NoraLayer
from .reproducible import adapter_of_same_source, is_reproducible, record_reproducible

PROJECTIONS = 8
# Of the Frobenius norm of the change. Rounding alone stays far below, other weights far above.
TOLERANCE = 1e-3


@torch.no_grad()
def weight_change_probe(layer: NoraLayer, adapter_name: str, B: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """The norm of the layer's change of weight D, and some u^T D v for fixed vectors of signs: (1 + PROJECTIONS,) float32.

    For independent random signs (u^T E v)^2 has the mean ||E||_F^2: the projections of two changes differ in root mean
    square by about the Frobenius norm of their difference.

    Args:
        layer: gives the inner factors.
        B, A: outer factors, (out, r) and (r, in).
    """
    B, A = B.double().cpu(), A.double().cpu()
    core = layer.nora_inner_B[adapter_name].double() @ layer.nora_inner_A[adapter_name].double()
    if adapter_name in layer.nora_inner_A0:
        core = core - layer.nora_inner_B0[adapter_name].double() @ layer.nora_inner_A0[adapter_name].double()
    core = core.cpu() * (layer.alpha[adapter_name] / layer.inner_r[adapter_name])
    squared_norm = torch.trace((B.T @ B) @ core @ (A @ A.T) @ core.T)
    u, v = _signs(len(B), offset=1), _signs(A.shape[1], offset=2)
    projections = ((u @ B) @ core * (v @ A.T)).sum(dim=1)
    return torch.cat([squared_norm.clamp_min(0).sqrt()[None], projections]).float()


def check_probe(probe: torch.Tensor, expected: torch.Tensor, where: str) -> None:
    """Compare two probes (1 + PROJECTIONS,) of a layer's change of weight.

    Raises: AdapterFileError naming `where` if the changes differ by more than about a thousandth of their norm.
    """
    norm = expected[0].item()
    differences = probe.double().cpu() - expected.double().cpu()
    difference = max(differences[0].abs().item(), differences[1:].square().mean().sqrt().item())
    if difference > TOLERANCE * norm:
        relative = difference / norm if norm else math.inf
        raise AdapterFileError(
            f"{where}: the outer factors computed from the base weights change the weight by something else than the adapter "
            f"does (relative difference {relative:.1e}, at most {TOLERANCE:.0e}). These are other base weights, or the same in "
            "another precision or with an adapter fused, or the adapter is combined of several or started at random. Load the "
            "base model as it was when the adapter was made, or use the full adapter."
        )


def recomputed_outer_factors(layer: NoraLayer, adapter_name: str, where: str) -> tuple[torch.Tensor, torch.Tensor]:
    """B (out, r) and A (r, in) as the adapter's start computed them, from the base weight and the activation scale.

    Where another adapter of the layer is known to have come from the same, they are copied from it.
    """
    other = adapter_of_same_source(layer, adapter_name)
    if other is not None:
        return layer.nora_B[other].clone(), layer.nora_A[other].clone()
    B, A = outer_factors(layer, where, layer.r[adapter_name], layer.nora_activation_scale[adapter_name])
    return B.to(layer.nora_B[adapter_name]), A.to(layer.nora_A[adapter_name])


def reproducible_probe(layer: NoraLayer, adapter_name: str, where: str) -> torch.Tensor:
    """The layer's probe (1 + PROJECTIONS,), once it is shown that its outer factors follow from its base weight.

    They are computed again only where that is not known yet. A later call relies on it only if they came out the same to the
    bit: two changes of weight may be alike, such as those of inner factors that are still zero, where the factors are not.

    Raises: AdapterFileError naming `where` if they do not follow.
    """
    B, A = layer.nora_B[adapter_name], layer.nora_A[adapter_name]
    probe = weight_change_probe(layer, adapter_name, B, A)
    if not is_reproducible(layer, adapter_name):
        again = recomputed_outer_factors(layer, adapter_name, where)
        check_probe(weight_change_probe(layer, adapter_name, *again), probe, where)
        if torch.equal(again[0], B) and torch.equal(again[1], A):
            record_reproducible(layer, adapter_name)
    return probe


def narrowed(scale: torch.Tensor) -> torch.Tensor:
    """`scale` in bfloat16 where that loses nothing, as it is otherwise."""
    narrow = scale.bfloat16()
    return narrow if torch.equal(narrow.to(scale.dtype), scale) else scale


def _signs(size: int, offset: int) -> torch.Tensor:
    """(PROJECTIONS, size) of +1 and -1 from an integer hash: the same on every machine and in every version."""
    state = torch.arange(PROJECTIONS * size, dtype=torch.int64).reshape(PROJECTIONS, size) + offset * 2**33
    for shift, factor in ((33, 0x7FB5D329728EA185), (29, 0x1B873593CC9E2D51)):
        state = (state ^ (state >> shift) ^ (state << 7)) * factor
    return 1.0 - 2.0 * ((state >> 40) & 1).double()
