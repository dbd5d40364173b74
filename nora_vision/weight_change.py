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


class LowRank(NamedTuple):
    """A matrix `up` (out, k) times `down` (k, in), and the norm of what it leaves out, relative to the norm of the whole."""

    up: torch.Tensor
    down: torch.Tensor
    relative_error: float


@torch.no_grad()
def weight_change(layer: BaseTunerLayer, adapter_name: str) -> torch.Tensor:
    """W' - W, with W' the adapted weight at the trained scale: (out, in), or (out, in * kh * kw), float64.

    A quantised W is dequantised. The output of a linear layer for the unit vectors is its weight; a convolution is merged.
    """
    copied = copy.deepcopy(layer).cpu().eval()
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
    U, S, Vh = torch.linalg.svd(change, full_matrices=False)
    rank = int((ROUNDING * S[0] < S).sum())
    truncated = max(rank, 1) if rank <= max(EXPORT_RANK, len(S) // 2) else EXPORT_RANK
    error = float(S[truncated:].norm() / S.norm()) if rank > truncated else 0.0
    return LowRank((U[:, :truncated] * S[:truncated]).float(), Vh[:truncated].float(), error)
