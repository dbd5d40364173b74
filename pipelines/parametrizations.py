"""Parametrisations of the factors of a change less its start: torch's `register_parametrization` takes them."""

from __future__ import annotations

import torch
from torch import nn


class RowsLessStart(nn.Module):
    """A (r, ...) becomes [A; A - A_0] (2r, ...)."""

    def __init__(self, start: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("start", start.detach().clone())

    def forward(self, trained: torch.Tensor) -> torch.Tensor:
        """(2r, ...)"""
        return torch.cat([trained, trained - self.start])


class ColumnsLessStart(RowsLessStart):
    """B (out, r, ...) becomes [B - B_0, B_0] (out, 2r, ...).

    Its product with [A; A - A_0] is B A - B_0 A_0. It is exactly zero at step 0, and small at all steps: in half precision, where
    files may be loaded, [B, -B_0] and [A; A_0] would leave the rounding error of two large products.
    """

    def forward(self, trained: torch.Tensor) -> torch.Tensor:
        """(out, 2r, ...)"""
        return torch.cat([trained - self.start, self.start], dim=1)


class ScaledRowsLessStart(RowsLessStart):
    """A (r, ...) becomes [S A; S A - S_0 A_0] (2r, ...). Its product with [B - B_0, B_0] is B S A - B_0 S_0 A_0."""

    def __init__(self, start: torch.Tensor) -> None:
        super().__init__(start)
        self.scales = nn.Parameter(torch.ones(len(start), device=start.device))

    def forward(self, trained: torch.Tensor) -> torch.Tensor:
        """(2r, ...)"""
        return super().forward(self.scales.reshape(-1, *(1,) * (trained.ndim - 1)) * trained)
