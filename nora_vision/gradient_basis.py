"""Outer factors from the gradient of the training loss, so that the frozen basis contains the directions that the task needs.

    G: mean gradient of the loss with respect to W at the base model;  -G F = U Sigma V^T
    A = V_k^T F^-1,  B = U_k c,  c the mean of the r leading singular values of W

F is a root of the inputs' second moments (`nora_vision.weighting`) divided by its largest singular value: for a diagonal one
S / max S. For k < r the other directions from the weight, orthogonal to these in the weighted sense:

    (I - U_k U_k^T) W F (I - V_k V_k^T) = U' S' V'^T;  A' = V'^T F^-1,  B' = U' S'
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

import torch

from .calibration import ActivationStatistics
from .decomposition import reproducible_awsvd
from .factors import Factors
from .layer import NoraLayer
from .weighting import InputRoot, in_float64

GradientScale = Literal["mean", "gradient"]
GRADIENT_SCALES: tuple[str, ...] = get_args(GradientScale)


@torch.no_grad()
def gradient_factors(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    root: InputRoot,
    rank: int,
    *,
    share: float = 1.0,
    scale: GradientScale = "mean",
) -> tuple[torch.Tensor, torch.Tensor]:
    """B (out, rank) and A (rank, in), float64, with the leading directions of the negative gradient first.

    If the gradient has a rank below `share` times `rank`, more directions come from the weight.

    Args:
        weight: W, (out, in).
        gradient: G, (out, in), of the same dtype or another.
        root: F, times any number.
        share: of the directions that come from the gradient, in [0, 1]; rounded to a number of directions.
        scale: the norms of their columns of B: "mean", all the mean of the r leading singular values of W, or "gradient", the
            singular values Sigma times a number with which the first is the first of W.
    """
    weight = in_float64(weight)
    gradient, root = gradient.to(weight), root.to(weight.device).relative()
    B, A = _leading_directions(root.weigh(-gradient), round(share * rank))
    sigma = B.norm(dim=0)
    U, count = B / sigma, len(sigma)
    if count:
        leading = reproducible_awsvd(weight, None, rank)[0].norm(dim=0)
        B = U * (leading.mean() if scale == "mean" else sigma * leading[0] / sigma[0])
    if count < rank:
        rest = root.weigh(weight)
        rest = rest - U @ (U.T @ rest)
        others = reproducible_awsvd(rest - (rest @ A.T) @ A, None, rank - count)
        B, A = torch.cat([B, others[0]], dim=1), torch.cat([A, others[1]])
    return B, root.unweigh(A)


def adapter_factors(
    layers: Mapping[str, NoraLayer],
    adapter_name: str,
    gradients: Iterable[tuple[str, torch.Tensor]],
    stats: ActivationStatistics | None,
    weighting: str,
    **options: Any,
) -> Iterator[tuple[str, Factors]]:
    """B and A of the adapter in each layer, float32 on the CPU, as the layers' gradients arrive.

    Args:
        layers: by name.
        gradients: name and gradient G of the weight, (out, in).
        stats, weighting: give F; without statistics it is I.
        options: of `gradient_factors`.
    """
    for name, gradient in gradients:
        layer = layers[name]
        weight, gradient = layer.finite_weight_matrix(name), layer._as_matrix(gradient)
        ones = torch.ones(layer.in_features)
        root = InputRoot.diagonal(ones) if stats is None else stats.root(name, weighting)
        pair = gradient_factors(weight, gradient, root, layer.r[adapter_name], **options)
        yield name, Factors(*(part.float().cpu() for part in pair))


def _leading_directions(matrix: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """U_k S_k and V_k^T of `matrix` (m, n), k being `count` or, if that is smaller, its rank in float32."""
    if not count or not matrix.any():
        return matrix[:, :0], matrix[:0]
    B, A = reproducible_awsvd(matrix, None, count)
    sigma = B.norm(dim=0)
    # Gradients are float32.
    significant = sigma > max(matrix.shape) * torch.finfo(torch.float32).eps * sigma[0]
    return B[:, significant], A[significant]
