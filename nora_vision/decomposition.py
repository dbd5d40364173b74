"""Activation-weighted singular value decomposition, which gives NoRA's frozen outer factors."""

from __future__ import annotations

from typing import Literal

import torch

POWER_ITERATIONS = 2


@torch.no_grad()
def awsvd(
    weight: torch.Tensor,
    activation_scale: torch.Tensor,
    rank: int,
    *,
    method: Literal["auto", "exact", "randomized"] = "auto",
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Best rank-`rank` factors of `weight` in the activation-weighted norm.

    W diag(s) = U S V^T;  B = U_r S_r,  A = V_r^T diag(1/s)      [NoRA, AwSVD, eqs. 1-5]

    Args:
        weight: (out_features, in_features).
        activation_scale: (in_features,), strictly positive.
        rank: number of singular triples kept.
        method: "exact" decomposes in full, "randomized" by subspace iteration [Halko, Martinsson, Tropp 2011, alg. 4.4];
            "auto" uses the randomised method if it is cheaper.
        generator: for the initial subspace of the randomised method, on the CPU; a fixed seed if None.
    Returns: B (out_features, rank), A (rank, in_features), float32 (float64 for a float64 weight). The sign of
        each singular vector is chosen so that the entry of V of largest magnitude is positive.
    Raises: ValueError if `rank` exceeds min(weight.shape), a shape does not fit, or a value is not finite or not positive.
    """
    _check(weight, activation_scale, rank, method)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    scale = activation_scale.to(weight.device, dtype)
    weighted = weight.to(dtype) * scale
    # Oversampling by half of the rank: with two power iterations the error is within about 1% of optimal even on a flat spectrum.
    block = min(rank + max(rank // 2, 16), *weight.shape)
    if method == "auto":
        method = "randomized" if 3 * block <= min(weight.shape) else "exact"
    if method == "exact":
        U, S, Vh = torch.linalg.svd(weighted, full_matrices=False)
    else:
        U, S, Vh = _randomized_svd(weighted, block, generator)
    U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    largest = Vh.gather(1, Vh.abs().argmax(dim=1, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(dtype)
    return U * (S * signs[:, 0]), Vh * signs / scale


def reproducible_awsvd(
    weight: torch.Tensor, activation_scale: torch.Tensor | None, rank: int, outer_slice: tuple[int, int] = (1, 1)
) -> tuple[torch.Tensor, torch.Tensor]:
    """`awsvd` in float64, which gives the same factors on every machine: compact files leave them out and recompute them.

    In float32, another number of threads rotates the singular vectors by about 1e-4 and may flip the sign of one whose largest
    entries tie; in float64 the rotation is about 1e-13.

    Args:
        weight: (out_features, in_features), of any dtype.
        activation_scale: (in_features,), strictly positive, or None for the plain SVD.
        outer_slice: (i, n) decomposes at rank n * rank and returns the i-th of n slices. With S = diag(activation_scale), two
            slices i != j have B_i^T B_j = 0 and A_i S^2 A_j^T = 0.
    Returns: B (out_features, rank), A (rank, in_features), float64.
    """
    # Apple's GPUs have no float64.
    weight = (weight.cpu() if weight.device.type == "mps" else weight).double()
    scale = weight.new_ones(weight.shape[1]) if activation_scale is None else activation_scale.to(weight)
    number, count = outer_slice
    B, A = awsvd(weight, scale, count * rank)
    kept = slice((number - 1) * rank, number * rank)
    return B[:, kept].contiguous(), A[kept].contiguous()


def _randomized_svd(
    matrix: torch.Tensor, block: int, generator: torch.Generator | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U (m, block), S (block,), V^T (block, n) of `matrix` (m, n), close to its leading singular triples."""
    # Sampled on the CPU, so that every device starts from the same subspace.
    generator = generator or torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], block, generator=generator, dtype=matrix.dtype).to(matrix.device)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix.T @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    # The SVD of the tall matrix is twice as fast as that of the wide one.
    V, S, Uh = torch.linalg.svd(matrix.T @ basis, full_matrices=False)
    return basis @ Uh.T, S, V.T


def _check(weight: torch.Tensor, activation_scale: torch.Tensor, rank: int, method: str) -> None:
    if weight.ndim != 2:
        raise ValueError(f"weight must be a matrix (out_features, in_features), got shape {tuple(weight.shape)}.")
    if activation_scale.shape != weight.shape[1:]:
        raise ValueError(f"activation_scale must have shape {tuple(weight.shape[1:])}, got {tuple(activation_scale.shape)}.")
    if not 1 <= rank <= min(weight.shape):
        shape = f"{weight.shape[0]} x {weight.shape[1]}"
        raise ValueError(f"rank must be in [1, {min(weight.shape)}] for a {shape} weight, got {rank}.")
    if method not in ("auto", "exact", "randomized"):
        raise ValueError(f"method must be 'auto', 'exact' or 'randomized', got {method!r}.")
    if not torch.isfinite(weight).all():
        raise ValueError("weight must be finite, got NaN or infinite entries.")
    if not (torch.isfinite(activation_scale) & (activation_scale > 0)).all():
        raise ValueError(f"activation_scale must be finite and above 0, got a smallest entry of {activation_scale.min().item()}.")
