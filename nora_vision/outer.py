"""Where the singular values of a weight are in the outer factors, or how far they are left out."""

from __future__ import annotations

from typing import Literal

import torch

OuterScaling = Literal["B", "A", "split", "mean", "none"]
# Singular values below this fraction of the largest are rounding errors in float64, and their vectors arbitrary.
NEGLIGIBLE = 1e-9


@torch.no_grad()
def scaled_outer_factors(B: torch.Tensor, A: torch.Tensor, outer_scaling: OuterScaling) -> tuple[torch.Tensor, torch.Tensor]:
    """`B` = U_r S_r and `A` = V_r^T diag(1/s) with the singular values S_r elsewhere; U_r and V_r are not changed.

    B:      U_r S_r           V_r^T diag(1/s)
    A:      U_r               S_r V_r^T diag(1/s)
    split:  U_r sqrt(S_r)     sqrt(S_r) V_r^T diag(1/s)
    mean:   U_r mean(S_r)     V_r^T diag(1/s)
    none:   U_r               V_r^T diag(1/s)

    Args:
        B, A: (out_features, rank) and (rank, in_features), as `awsvd` returns them, in float64.
    Returns: the same shapes. The column of U_r for a singular value of zero is zero, since it is arbitrary.
    """
    if outer_scaling == "B":
        return B, A
    values = B.norm(dim=0)
    present = values > NEGLIGIBLE * values.max()
    U = torch.where(present, B / torch.where(present, values, 1.0), 0.0)
    if outer_scaling == "A":
        return U, values[:, None] * A
    if outer_scaling == "split":
        return U * values.sqrt(), values.sqrt()[:, None] * A
    return (U * values.mean() if outer_scaling == "mean" else U), A


@torch.no_grad()
def outer_coefficients(weight: torch.Tensor, B: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """How often the product of each column b_i of `B` and row a_i of `A` is in the weight: <b_i a_i, W> / (|b_i|^2 |a_i|^2).

    For the outer factors of `awsvd` these are the singular values that `scaled_outer_factors` left out: with M = diag(d_1, ...,
    d_k, 0, ...), B M A is the best approximation of rank k of the weight, in the activation-weighted norm.

    Args:
        weight: (out_features, in_features).
        B, A: (out_features, rank) and (rank, in_features).
    Returns: (rank,), float32; zero where b_i or a_i is zero.
    """
    weight, B, A = (tensor.float() for tensor in (weight, B, A))
    squares = B.square().sum(dim=0) * A.square().sum(dim=1)
    products = ((B.T @ weight) * A).sum(dim=1)
    return torch.where(squares > 0, products / torch.where(squares > 0, squares, 1.0), 0.0)
