"""Weighted sums of NoRA adapters as one adapter, exactly:

    sum_i w_i B_i C_i A_i = [B_1 ... B_n] diag(w_1 C_1, ..., w_n C_n) [A_1; ...; A_n],    C_i = s_i B'_i A'_i.

Adapters with equal outer factors, such as two with the same initialisation, share them in the sum, where only their inner factors
are concatenated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from .config import NoraConfig
from .inner import gated
from .layer import NoraLayer

# PEFT's combination types for which NoRA computes the exact sum.
EXACT_TYPES = ("linear", "svd", "cat")


class Factors(NamedTuple):
    """The weight change B up down A of one layer, including the scaling.

    Args:
        B, A: outer factors, (out, r) and (r, in), in the base layer's dtype.
        up, down: inner factors, (r, k) and (k, r), with k at most r.
        activation_scale: (in,), from which the outer factors were computed with the weight; ones for a sum of several.
    """

    B: torch.Tensor
    A: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    activation_scale: torch.Tensor


@torch.no_grad()
def weighted_sum(layer: NoraLayer, weights: Sequence[tuple[str, float]], max_rank: int | None = None) -> Factors:
    """The weighted sum sum_i w_i D_i of the adapters' weight changes D_i of one layer, each at its current scaling.

    Outer ranks add up, and so do inner ranks. If the outer rank exceeds the layer's width, or the inner rank `max_rank`, the
    factors are recomputed with B and A orthonormal, in the base layer's dtype.

    Args:
        layer: has every adapter that `weights` names.
        weights: names of adapters and their weights w_i.
        max_rank: rank of the best approximation that replaces the sum; None for the exact sum.
    Raises: ValueError if the outer factors of an adapter are not set.
    """
    parts = [_within_outer_rank(part) for part in _by_basis(layer, weights)]
    total = parts[0] if len(parts) == 1 else _concatenated(parts)
    rank, inner_rank = total.up.shape
    limit = min(layer.out_features, layer.in_features)
    if rank > limit or (max_rank is not None and inner_rank > max_rank):
        return _recomputed(total, min(inner_rank, limit, max_rank or limit))
    return total


def _by_basis(layer: NoraLayer, weights: Sequence[tuple[str, float]]) -> list[Factors]:
    """The weighted factors of each adapter; adapters with equal outer factors are concatenated."""
    parts: list[Factors] = []
    for name, weight in weights:
        up, down = layer._inner_factors(name, weight * layer.scaling[name])
        B, A = layer.nora_B[name], layer.nora_A[name]
        same = next((i for i, part in enumerate(parts) if torch.equal(part.B, B) and torch.equal(part.A, A)), None)
        if same is None:
            parts.append(Factors(B, A, up.float(), down.float(), layer.nora_activation_scale[name]))
        else:
            earlier = parts[same]
            parts[same] = earlier._replace(up=torch.cat([earlier.up, up], dim=1), down=torch.cat([earlier.down, down]))
    return parts


def combined_config(config: NoraConfig, sums: Mapping[str, Factors]) -> NoraConfig:
    """`config` with the ranks and layers of `sums`, factors by layer name."""
    ranks = {name: tuple(factors.up.shape) for name, factors in sums.items()}
    r, inner_r = (max(sizes) for sizes in zip(*ranks.values(), strict=True))
    return replace(
        config,
        r=r,
        inner_r=inner_r,
        alpha=float(inner_r),
        target_modules=sorted(sums),
        exclude_modules=None,
        inner_form="serial",
        inner_blocks=1,
        sparse_entries=0,
        inner_init="zero",
        preserve_output=False,
        # Computes no outer factors: `set_factors` sets them.
        outer_init="awsvd",
        outer_slice="1/1",
        outer_dtype="base",
        calibration="data",
        init_weights=True,
        rank_pattern={f"^{name}": rank for name, (rank, _) in ranks.items() if rank != r},
        inner_rank_pattern={f"^{name}": rank for name, (_, rank) in ranks.items() if rank != inner_r},
    )


@torch.no_grad()
def set_factors(layer: NoraLayer, adapter_name: str, factors: Factors) -> None:
    """Set the weight change of the layer's adapter, which has the ranks of `factors`, and freeze it."""
    layer.nora_activation_scale[adapter_name].copy_(factors.activation_scale)
    layer.set_outer_factors(adapter_name, factors.B, factors.A)
    layer.nora_inner_B[adapter_name].copy_(factors.up / layer.scaling[adapter_name]).requires_grad_(False)
    layer.nora_inner_A[adapter_name].copy_(factors.down).requires_grad_(False)


def check_weights(adapters: Sequence[str], weights: Sequence[float], present: Mapping[str, NoraConfig]) -> None:
    """Check that every adapter is in `present`, has one finite weight, no gates, and no modules_to_save.

    Raises: ValueError naming the adapter.
    """
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"There must be at least one adapter and one weight for each, got {len(adapters)} and {len(weights)}.")
    for name, weight in zip(adapters, weights, strict=True):
        if name not in present:
            raise ValueError(f"Adapter {name!r} does not exist; there are {sorted(present)}.")
        if not math.isfinite(weight):
            raise ValueError(f"The weight of adapter {name!r} must be a finite number, got {weight!r}.")
        if present[name].num_subspaces > 1:
            raise ValueError(gated(f"NoRA adapter {name!r} is"))
        if modules := present[name].modules_to_save:
            raise ValueError(
                f"Adapter {name!r} has modules that are trained in full, {sorted(modules)}. "
                "add_weighted_adapter does not support modules_to_save; merge the adapter instead."
            )


def _within_outer_rank(part: Factors) -> Factors:
    """Equal factors with an inner rank of at most r: for a larger one, the product and the identity."""
    if part.up.shape[1] <= part.up.shape[0]:
        return part
    return part._replace(up=part.up @ part.down, down=torch.eye(part.up.shape[0], device=part.up.device))


def _concatenated(parts: Sequence[Factors]) -> Factors:
    return Factors(
        torch.cat([part.B for part in parts], dim=1),
        torch.cat([part.A for part in parts]),
        torch.block_diag(*(part.up for part in parts)),
        torch.block_diag(*(part.down for part in parts)),
        torch.ones_like(parts[0].activation_scale),
    )


def _recomputed(factors: Factors, rank: int) -> Factors:
    """The best approximation of rank `rank`, by the singular value decomposition U sqrt(S) sqrt(S) V^T."""
    # Apple's GPUs have no float64.
    dtype = torch.float32 if factors.B.device.type == "mps" else torch.float64
    left, left_triangle = torch.linalg.qr(factors.B.to(dtype) @ factors.up.to(dtype))
    right, right_triangle = torch.linalg.qr((factors.down.to(dtype) @ factors.A.to(dtype)).T)
    U, S, Vh = torch.linalg.svd(left_triangle @ right_triangle.T, full_matrices=False)
    root = S[:rank].sqrt().diag().float()
    B, A = (left @ U[:, :rank]).to(factors.B), (Vh[:rank] @ right.T).to(factors.A)
    return Factors(B, A, root, root.clone(), torch.ones_like(factors.activation_scale))
