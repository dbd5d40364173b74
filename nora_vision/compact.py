"""Compact adapters: files without the outer factors, which are recomputed from the base weights on loading.

Outer factors that the weights do not determine can only be in the file, rounded to 4 bits. Otherwise the file contains the
activation scale, which the weights do not determine either, or what is needed to compute it again, and a probe of every layer's
weight change. The probe detects outer factors that differ because of other base weights or rounding; otherwise the adapter would
be wrong silently.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from .config import NoraConfig
from .files import AdapterFileError
from .initialization import outer_factors
from .layer import NoraLayer
from .reproducible import adapter_of_same_source, is_reproducible, record_reproducible

PROJECTIONS = 4
# In files of earlier versions, which are not packed.
EARLIER_PROJECTIONS = 8
# Relative to the Frobenius norm of the weight change. Rounding errors are far below, other base weights far above.
TOLERANCE = 1e-3


@torch.no_grad()
def weight_change_probe(
    layer: NoraLayer, adapter_name: str, B: torch.Tensor, A: torch.Tensor, projections: int = PROJECTIONS
) -> torch.Tensor:
    """The norm of the layer's weight change D, and u^T D v for fixed sign vectors u, v: (1 + projections,) float32.

    For independent random signs (u^T E v)^2 has the mean ||E||_F^2: the projections of two changes differ in root mean
    square by about the Frobenius norm of their difference E.

    Another change, with ||E||_F of about ||D||_F, passes the check only if all four projections of E are below 2e-3 of their
    root mean square. u^T E v is about normal if E has a high rank, for which one is that small with probability 1.6e-3, and a
    product of two normal numbers if E has rank one: 9e-3. So a layer with other weights passes with a probability of 7e-12 to
    8e-9, and then only if its norm agrees.

    Args:
        layer: gives the inner factors.
        B, A: outer factors, (out, r) and (r, in).
    """
    B, A = B.double().cpu(), A.double().cpu()
    # For a mixture of subspaces, of the change with all gates at 1.
    tensors = {name: tensor.double() for name, tensor in layer.inner_tensors(adapter_name).items()}
    up, down = layer.inner_form[adapter_name].factors(tensors)
    core = (up @ down).cpu() * (layer.alpha[adapter_name] / layer.inner_r[adapter_name])
    squared_norm = torch.trace((B.T @ B) @ core @ (A @ A.T) @ core.T)
    u, v = _signs(projections, len(B), offset=1), _signs(projections, A.shape[1], offset=2)
    projections = ((u @ B) @ core * (v @ A.T)).sum(dim=1)
    return torch.cat([squared_norm.clamp_min(0).sqrt()[None], projections]).float()


def probe_difference(probe: torch.Tensor, expected: torch.Tensor) -> float:
    """How much two weight changes with these probes (1 + projections,) differ, about, relative to the norm of the second."""
    norm = expected[0].item()
    differences = probe.double().cpu() - expected.double().cpu()
    difference = max(differences[0].abs().item(), differences[1:].square().mean().sqrt().item())
    return difference / norm if norm else math.inf if difference else 0.0


def recomputed_outer_factors(
    layer: NoraLayer, adapter_name: str, probe: torch.Tensor, where: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """B (out, r) and A (r, in) as in the adapter's initialisation, from the base weight and the activation scale.

    Args:
        probe: (1 + projections,), which the weight change with these factors must have.
    Raises: AdapterFileError naming `where` if it differs by more than about a thousandth of its norm.
    """
    differences = []
    for B, A in _candidates(layer, adapter_name, where):
        differences.append(probe_difference(weight_change_probe(layer, adapter_name, B, A, len(probe) - 1), probe))
        if differences[-1] <= TOLERANCE:
            return B, A
    raise AdapterFileError(
        f"{where}: the weight change recomputed from the base weights must be that of the adapter, but differs by "
        f"{min(differences):.1e} of its norm (at most {TOLERANCE:.0e}). The base model has other weights, another precision or a "
        "fused adapter, the adapter is a combination of several or has a random start, or this version of PyTorch draws other "
        "random numbers. Load the base model that the adapter was saved with, or use the full adapter."
    )


def _candidates(layer: NoraLayer, adapter_name: str, where: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Outer factors for the same base weight and activation scale: another adapter's, new ones, and those of earlier versions."""
    other = adapter_of_same_source(layer, adapter_name)
    if other is not None:
        yield layer.nora_B[other].clone(), layer.nora_A[other].clone()
    for legacy in (False, True):
        B, A = outer_factors(layer, adapter_name, where, legacy=legacy)
        yield B.to(layer.nora_B[adapter_name]), A.to(layer.nora_A[adapter_name])


def not_recomputable(config: NoraConfig, adapter: str) -> str:
    """Why `adapter`, whose configuration does not have `has_compact_layout`, has none."""
    source = f"the weighting {config.weighting!r}" if config.basis == "weight" else f"the basis {config.basis!r}"
    return (
        f"{adapter} is not saved as a compact file: with {source}, its outer factors cannot be recomputed from the base weights. "
        "The full file contains them; a compact one can with outer_dtype='int4'."
    )


def check_compact(config: NoraConfig, adapter: str) -> None:
    """Raise AdapterFileError naming `adapter` if its configuration has no compact layout."""
    if not config.has_compact_layout:
        raise AdapterFileError(not_recomputable(config, adapter))


def reproducible_probe(layer: NoraLayer, adapter_name: str, where: str) -> torch.Tensor:
    """The layer's probe (1 + PROJECTIONS,), after checking that its outer factors can be recomputed from its base weight.

    The factors are recomputed unless a record says that this gives the same bits. Equal weight changes are not recorded: they do
    not imply equal outer factors, for example while the inner factors are zero.

    Raises: AdapterFileError naming `where` if they cannot be recomputed.
    """
    B, A = layer.nora_B[adapter_name], layer.nora_A[adapter_name]
    probe = weight_change_probe(layer, adapter_name, B, A)
    if not is_reproducible(layer, adapter_name):
        again = recomputed_outer_factors(layer, adapter_name, probe, where)
        if torch.equal(again[0], B) and torch.equal(again[1], A):
            record_reproducible(layer, adapter_name)
    return probe


def _signs(count: int, size: int, offset: int) -> torch.Tensor:
    """(count, size) of +1 and -1 from an integer hash: the same on every machine and in every version."""
    state = torch.arange(count * size, dtype=torch.int64).reshape(count, size) + offset * 2**33
    for shift, factor in ((33, 0x7FB5D329728EA185), (29, 0x1B873593CC9E2D51)):
        state = (state ^ (state >> shift) ^ (state << 7)) * factor
    return 1.0 - 2.0 * ((state >> 40) & 1).double()
