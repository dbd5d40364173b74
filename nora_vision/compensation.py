"""The start of NoRA's inner factors that compensates for quantisation as far as the outer factors can."""

from __future__ import annotations

import torch


@torch.no_grad()
def nearest_inner_factors(
    change: torch.Tensor, B: torch.Tensor, A: torch.Tensor, activation_scale: torch.Tensor | None, inner_rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inner factors whose change of the weight is nearest to `change` in the activation-weighted norm.

    min ||(change - B B' A' A) diag(s)||_F:  B = Q_B R_B and (A diag(s))^T = Q_A R_A with orthonormal columns of Q_B and Q_A,
    Q_B^T change diag(s) Q_A = U S V^T,  B' = R_B^-1 U_k S_k^1/2,  A' = S_k^1/2 V_k^T R_A^-T    [Eckart-Young]

    Args:
        change: (out, in).
        B, A: outer factors (out, r) and (r, in); directions that depend on others numerically are left out.
        activation_scale: (in,), strictly positive, or None for the plain norm.
        inner_rank: k, at most r.
    Returns: B' (r, inner_rank), A' (inner_rank, r), float64.
    """
    change, B, A = change.double(), B.double(), A.double()
    scale = A.new_ones(A.shape[1]) if activation_scale is None else activation_scale.to(A)
    # Q = U and R = S V^T, by which dependent directions are found.
    Q_B, S_B, V_B = torch.linalg.svd(B, full_matrices=False)
    Q_A, S_A, V_A = torch.linalg.svd((A * scale).T, full_matrices=False)
    U, S, V = torch.linalg.svd(Q_B.T @ (change * scale) @ Q_A)
    root = S[:inner_rank].sqrt()
    up = V_B.T @ (_inverse(S_B)[:, None] * U[:, :inner_rank] * root)
    down = (root[:, None] * V[:inner_rank] * _inverse(S_A)) @ V_A
    return up, down


def _inverse(singular_values: torch.Tensor) -> torch.Tensor:
    """The reciprocals of `singular_values`, with zero for those that rounding cannot tell from zero."""
    significant = singular_values > 1e-10 * singular_values.max()
    return torch.where(significant, 1 / singular_values, 0.0)
