"""Weightings of NoRA's outer factors: which norm of W - B A they minimise.

With X (tokens, in) the inputs of a layer and C a second-moment matrix of them, C = F F^T,

    ||(W - B A) F||_F  is least at  B = U_r S_r,  A = V_r^T F^-1,    W F = U S V^T,

and for C = X^T X it is the error of the outputs, ||(W - B A) X^T||_F. F is one number for each input (diagonal weightings), such
a diagonal and a part of low rank, or C^(1/2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from .moments import COVARIANCE, HISTOGRAM, SKETCH, bin_magnitudes, low_rank_part

Weighting = Literal["none", "diagonal", "quantile", "trimmed", "huber", "diagonal_low_rank", "covariance"]
WEIGHTINGS: tuple[str, ...] = get_args(Weighting)
ROBUST = ("quantile", "trimmed", "huber")
# The kind of moments that a weighting needs beside sqrt(diag(X^T X)).
MOMENTS = dict.fromkeys(ROBUST, HISTOGRAM) | {"diagonal_low_rank": SKETCH, "covariance": COVARIANCE}
# The rank of the part of low rank.
LOW_RANK = 16
# Those whose F is not one number for each input, so that a compact file could not hold it.
NOT_DIAGONAL = ("diagonal_low_rank", "covariance")
# Relative to the mean of F's diagonal or singular values. Without a floor, inputs with tiny activations in the calibration would
# get huge factors.
SCALE_FLOOR = 1e-3
# `quantile`: this quantile of |x|. `trimmed`: the share of the largest |x| that is left out. One token of a sequence,
# such as the first of a prompt, can have activations a hundred times those of the others; both leave it out of 20 or more.
QUANTILE, TRIMMED_SHARE = 0.95, 0.05
# `huber`: |x| counts up to this many times the scale.
HUBER_THRESHOLD = 2.5
HUBER_ITERATIONS = 100


@dataclass(frozen=True)
class InputRoot:
    """A square root of a second-moment matrix: F = diag(scale) (I + Q diag(stretch - 1) Q^T),  C = F F^T.

    Args:
        scale: (in,), above 0.
        vectors: Q (in, k) with orthonormal columns; k = 0 for a diagonal F.
        stretch: (k,), above 0.
    """

    scale: torch.Tensor
    vectors: torch.Tensor
    stretch: torch.Tensor

    @classmethod
    def diagonal(cls, scale: torch.Tensor) -> InputRoot:
        """F = diag(scale), divided by its mean and floored; the identity for inputs that are all zero. scale: (in,)."""
        return cls(floored(scale.double()), scale.new_zeros(len(scale), 0).double(), scale.new_zeros(0).double())

    def weigh(self, matrix: torch.Tensor) -> torch.Tensor:
        """matrix F, for `matrix` (m, in)."""
        scaled = matrix * self.scale
        return scaled + (scaled @ self.vectors) * (self.stretch - 1) @ self.vectors.T

    def unweigh(self, matrix: torch.Tensor) -> torch.Tensor:
        """matrix F^-1, for `matrix` (m, in)."""
        return (matrix + (matrix @ self.vectors) * (1 / self.stretch - 1) @ self.vectors.T) / self.scale

    def to(self, device: torch.device) -> InputRoot:
        """F on another device."""
        return InputRoot(*(part.to(device) for part in (self.scale, self.vectors, self.stretch)))

    def relative(self) -> InputRoot:
        """F divided by its largest singular value."""
        return InputRoot(self.scale / self.singular_values().max(), self.vectors, self.stretch)

    def singular_values(self) -> torch.Tensor:
        """Those of F in any order, (in,)."""
        if not len(self.stretch):
            return self.scale
        if len(self.stretch) == len(self.scale) and (self.scale == self.scale[0]).all():
            return self.scale * self.stretch
        return torch.linalg.svdvals(self.weigh(torch.eye(len(self.scale)).to(self.scale)))

    @property
    def condition_number(self) -> float:
        """The largest singular value of F divided by the smallest."""
        values = self.singular_values()
        return (values.max() / values.min()).item()


def in_float64(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in float64, on the CPU if its device is one of Apple's GPUs, which have no float64."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def floored(values: torch.Tensor) -> torch.Tensor:
    """`values` (n,), at least 0, divided by their mean and at least `SCALE_FLOOR`; ones if all are 0."""
    return (values / values.mean()).clamp_min(SCALE_FLOOR) if values.any() else torch.ones_like(values)


def covariance_root(covariance: torch.Tensor) -> InputRoot:
    """C^(1/2) = Q diag(sqrt lambda) Q^T, with the square roots of the eigenvalues floored as in `floored`.

    Args:
        covariance: C = X^T X, (in, in).
    """
    eigenvalues, vectors = torch.linalg.eigh(covariance.double())
    return InputRoot(vectors.new_ones(len(vectors)), vectors, floored(eigenvalues.clamp_min(0).sqrt()))


def diagonal_low_rank_root(sketch: torch.Tensor, squares: torch.Tensor, rank: int) -> InputRoot:
    """F of D + L L^T, L L^T being about the best approximation of C of rank `rank`, and D the rest of its diagonal.

    With M = D^(-1/2) L = Q diag(sigma) P^T:  D + L L^T = F F^T,  F = D^(1/2) (I + Q diag(sqrt(1 + sigma^2) - 1) Q^T).

    Args:
        sketch: C Omega, (in, l); see `nora_vision.moments`.
        squares: diag(C), (in,).
    """
    if not squares.any():
        return InputRoot.diagonal(squares)
    low_rank, squares = low_rank_part(sketch, rank).double(), squares.double()
    # Divided by the mean of the scales, as a diagonal F is.
    unit = squares.sqrt().mean()
    rest = (squares - low_rank.square().sum(dim=1)).clamp_min(0).sqrt()
    root = (rest / unit).clamp_min(SCALE_FLOOR)
    vectors, sigma, _ = torch.linalg.svd(low_rank / unit / root[:, None], full_matrices=False)
    return InputRoot(root, vectors, (1 + sigma.square()).sqrt())


def robust_scale(counts: torch.Tensor, weighting: str) -> torch.Tensor:
    """A scale of each input that few large values do not change.

        quantile: the 0.95 quantile of |x|
        trimmed: the root of the mean of x^2 over the 95% smallest |x|
        huber: s with mean(min(x^2, (2.5 s)^2)) = beta s^2, beta that of a normal distribution    [Huber 1964, proposal 2]

    Magnitudes are those of the middles of histogram bins, within 4.5%.

    Args:
        counts: (in, bins); see `nora_vision.moments`.
    Returns: (in,) float32.
    """
    counts = counts.double()
    magnitudes = bin_magnitudes(counts.shape[1]).to(counts)
    totals, cumulative = counts.sum(dim=1, keepdim=True), counts.cumsum(dim=1)
    if weighting == "quantile":
        return magnitudes[(cumulative < QUANTILE * totals).sum(dim=1).clamp_max(len(magnitudes) - 1)].float()
    if weighting == "trimmed":
        before = cumulative - counts
        remaining = torch.minimum(counts, ((1 - TRIMMED_SHARE) * totals - before).clamp_min(0))
        return (remaining @ magnitudes.square() / remaining.sum(dim=1).clamp_min(1)).sqrt().float()
    return _huber_scale(counts / totals.clamp_min(1), magnitudes).float()


def _huber_scale(shares: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    """The fixed point s (in,), reached from the root of the mean square."""
    squares, limit = magnitudes.square(), HUBER_THRESHOLD**2
    density = math.exp(-limit / 2) / math.sqrt(2 * math.pi)
    tail = math.erfc(HUBER_THRESHOLD / math.sqrt(2))
    # The mean of min(z^2, c^2) for a standard normal z.
    beta = 1 - tail - 2 * HUBER_THRESHOLD * density + limit * tail
    variance = shares @ squares
    for _ in range(HUBER_ITERATIONS):
        variance = (shares * torch.minimum(squares, limit * variance[:, None])).sum(dim=1) / beta
    return variance.sqrt()
