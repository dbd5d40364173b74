"""The weight change of any adapted layer, and its best low-rank factors."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import nn

# Rank of the approximation of a change without low rank.
EXPORT_RANK = 64
# Singular values below this fraction of the largest are rounding errors of a merge in float64.
ROUNDING = 1e-9
# Random samples beyond the rank that is looked for.
OVERSAMPLING = 8


class LowRank(NamedTuple):
    """A matrix `up` (out, k) times `down` (k, in), and the norm of what it leaves out, relative to the norm of the whole."""

    up: torch.Tensor
    down: torch.Tensor
    relative_error: float


@torch.no_grad()
def weight_change(layer: BaseTunerLayer, adapter_name: str) -> torch.Tensor:
    """W' - W, with W' the adapted weight at the trained scale: (out, in), or (out, in * kh * kw), float64.

    It does not depend on the layer's current state: whether adapters are merged, disabled or active, and at which scale.

    A quantised W is dequantised. The output of a linear layer for the unit vectors is its weight; a convolution is merged.
    """
    copied = copy.deepcopy(layer).cpu().eval()
    # While adapters are merged or disabled, the output is that of the base layer alone.
    if copied.merged:
        copied.unmerge()
    copied.enable_adapters(True)
    if hasattr(copied, "set_scale"):
        copied.set_scale(adapter_name, 1.0)
    base = copied.get_base_layer()
    if isinstance(base, nn.Linear):
        unit_vectors = torch.eye(base.in_features, dtype=torch.float64)
        copied.base_layer = base = _in_float64(base)
        copied.double().set_adapter([adapter_name])
        return (copied(unit_vectors) - base(unit_vectors)).T
    copied.double()
    before = base.weight.detach().clone()
    copied.merge(adapter_names=[adapter_name])
    return (copied.get_base_layer().weight.detach() - before).flatten(1)


def _in_float64(base: nn.Linear) -> nn.Linear:
    """A linear layer with the weight of `base`, dequantised if it is quantised, and no bias."""
    linear = nn.Linear(base.in_features, base.out_features, bias=False, dtype=torch.float64)
    linear.weight = nn.Parameter(dequantize_module_weight(base).double(), requires_grad=False)
    return linear


def best_low_rank(change: torch.Tensor) -> LowRank:
    """The factors of `change` (out, in): exact if its rank is at most EXPORT_RANK or half of full, else the best of EXPORT_RANK.

    change = U S V^T;  up = U_k S_k,  down = V_k^T      [Eckart and Young 1936]
    """
    exact = _exact_factors(change)
    if exact is not None:
        return exact
    # For the leading singular values, the Gram matrix is as good as an SVD and several times faster.
    squares, vectors = torch.linalg.eigh(change.T @ change if change.shape[0] >= change.shape[1] else change @ change.T)
    leading = vectors[:, -EXPORT_RANK:].flip(1)
    error = float((squares[:-EXPORT_RANK].clamp(min=0).sum() / squares.sum()).sqrt())
    if change.shape[0] >= change.shape[1]:
        return LowRank((change @ leading).float(), leading.T.contiguous().float(), error)
    return LowRank(leading.float(), (leading.T @ change).float(), error)


def _exact_factors(change: torch.Tensor) -> LowRank | None:
    """The factors of `change` (out, in) if its rank is at most EXPORT_RANK or half of full; None otherwise.

    change = Q Q^T change,  with Q an orthonormal basis of change Omega, Omega random      [Halko et al. 2011]
    """
    full = min(change.shape)
    least = min(EXPORT_RANK, full)
    generator = torch.Generator().manual_seed(0)
    for limit in sorted({least, max(least, full // 2)}):
        size = (change.shape[1], min(limit + OVERSAMPLING, full))
        samples = torch.randn(size, generator=generator, dtype=change.dtype)
        Q = torch.linalg.qr(change @ samples).Q
        inner = Q.T @ change
        if (change - Q @ inner).norm() > ROUNDING * change.norm():
            continue
        U, S, Vh = torch.linalg.svd(inner, full_matrices=False)
        rank = max(int((ROUNDING * S[0] < S).sum()), 1)
        if rank <= limit:
            return LowRank((Q @ U[:, :rank] * S[:rank]).float(), Vh[:rank].float(), 0.0)
    return None
