"""The product of an input with a trained and a frozen factor, with a backward pass that saves memory and time."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F


def nested_product(x: torch.Tensor, A: torch.Tensor, D: torch.Tensor) -> torch.Tensor:
    """D A x (..., k), as `NestedProduct` where x (..., n) needs a gradient."""
    return NestedProduct.apply(x, A, D)[0] if x.requires_grad else F.linear(F.linear(x, A).to(D.dtype), D)


class NestedProduct(torch.autograd.Function):
    """D A x for an input x (..., n), a frozen A (r, n) and a trained D (k, r): returns D A x (..., k) and A x (..., r).

    For backward, A x is saved instead of x, and the gradient of x is one product with D A (k, n) instead of those with D and A:

        dD = dy^T (A x),    dx = dy (D A)      where dy is the gradient of D A x
    """

    @staticmethod
    def forward(x: torch.Tensor, A: torch.Tensor, D: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The products, in the dtype of D unless autocast chooses another."""
        projected = F.linear(x, A)
        return F.linear(projected.to(D.dtype), D), projected

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]) -> None:
        """Save what backward needs."""
        x, A, D = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1], A, D)
        ctx.dtype = x.dtype

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor, None, torch.Tensor]:
        """The gradients of x and D, from that of D A x (..., k)."""
        projected, A, D = ctx.saved_tensors
        of_D = gradient.flatten(0, -2).to(D.dtype).T @ projected.flatten(0, -2).to(D.dtype)
        of_x = gradient.to(ctx.dtype) @ (D @ A.to(D.dtype)).to(ctx.dtype)
        return of_x, None, of_D
