"""Products of a trained and a frozen factor, whose backward passes save memory and time."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def nested_product(x: torch.Tensor, A: torch.Tensor, D: torch.Tensor) -> torch.Tensor:
    """D A x (..., k), as `NestedProduct` where x (..., n) needs a gradient; equal to the bit whether or not it does."""
    return NestedProduct.apply(x, A, D)[0] if x.requires_grad else F.linear(F.linear(x, A).to(D.dtype), D)


def frozen_product(B: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    """B C (m, k) of a frozen B (m, r) and a trained C (r, k), in the dtype of C unless autocast chooses another.

    Where B must be cast, backward casts it again instead of saving the cast copy.
    """
    if B.dtype == C.dtype or torch.is_autocast_enabled(B.device.type):
        return B @ C
    return FrozenProduct.apply(B, C)


def is_cheaper_first(B: torch.Tensor, C: torch.Tensor, tokens: int) -> bool:
    """Whether (B C) h takes at most as many multiplications as B (C h), for B (m, r), C (r, k) and h (k, tokens)."""
    (m, r), k = B.shape, C.shape[1]
    return m * r * k + tokens * m * k <= tokens * (r * k + m * r)


# Both have `ctx` in `forward`: with `setup_context`, PyTorch inspects the signature at every call, which takes longer than the
# products of a small layer.


class NestedProduct(torch.autograd.Function):
    """D A x for an input x (..., n), a frozen A (r, n) and a trained D (k, r): returns D A x (..., k) and A x (..., r).

    For backward, A x is saved instead of x, and the gradient of x is one product with D A (k, n) instead of those with D and A:

        dD = dy^T (A x),    dx = dy (D A)      where dy is the gradient of D A x
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, A: torch.Tensor, D: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The products, in the dtype of D unless autocast chooses another."""
        projected = F.linear(x, A)
        ctx.mark_non_differentiable(projected)
        # Else backward would get zeros for the gradient of A x.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(projected, A, D)
        ctx.dtype = x.dtype
        return F.linear(projected.to(D.dtype), D), projected

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor, None, torch.Tensor]:
        """The gradients of x and D, from that of D A x (..., k). They have no gradients themselves, which would need x."""
        projected, A, D = ctx.saved_tensors
        of_D = gradient.flatten(0, -2).to(D.dtype).T @ projected.flatten(0, -2).to(D.dtype)
        of_x = gradient.to(ctx.dtype) @ (D @ A.to(D.dtype)).to(ctx.dtype)
        return of_x, None, of_D


class FrozenProduct(torch.autograd.Function):
    """B C for a frozen B (m, r) and a trained C (r, k) of another dtype, for which B is cast: dC = B^T dy."""

    @staticmethod
    def forward(ctx: Any, B: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
        """The product (m, k), in the dtype of C."""
        ctx.save_for_backward(B)
        return B.to(C.dtype) @ C

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor]:
        """The gradient of C, from that of B C (m, k)."""
        (B,) = ctx.saved_tensors
        return None, B.to(gradient.dtype).T @ gradient
