"""The weight change of any adapted layer, and its best low-rank factors."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

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
    """W' - W, with W' the weight after merging the adapter at its trained scale: (out, in), or (out, in * kh * kw), float64.

    Raises: ValueError if the layer's weight cannot be merged, for example a quantised one.
    """
    base = layer.get_base_layer()
    if not base.weight.is_floating_point():
        raise ValueError(f"has a weight of {base.weight.dtype}, into which {type(layer).__name__} cannot be merged.")
    merged = copy.deepcopy(layer).to("cpu", torch.float64)
    before = merged.get_base_layer().weight.detach().clone()
    merged.merge(adapter_names=[adapter_name])
    return (merged.get_base_layer().weight.detach() - before).flatten(1)


def best_low_rank(change: torch.Tensor) -> LowRank:
    """The factors of `change` (out, in): exact if its rank is at most EXPORT_RANK or half of full, else the best of EXPORT_RANK.

    change = U S V^T;  up = U_k S_k,  down = V_k^T      [Eckart and Young 1936]
    """
    U, S, Vh = torch.linalg.svd(change, full_matrices=False)
    rank = int((ROUNDING * S[0] < S).sum())
    truncated = max(rank, 1) if rank <= max(EXPORT_RANK, len(S) // 2) else EXPORT_RANK
    error = float(S[truncated:].norm() / S.norm()) if rank > truncated else 0.0
    return LowRank((U[:, :truncated] * S[:truncated]).float(), Vh[:truncated].float(), error)
