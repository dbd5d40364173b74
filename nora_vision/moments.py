"""Moments of a layer's inputs beyond their squares, summed up while a model runs, for the weightings of the outer factors.

A `histogram` of |x| for each input (in, BINS) int32, a `sketch` C Omega of C = X^T X (in, SKETCH_WIDTH), or C itself, the
`covariance` (in, in), both float64. All are sums over tokens, so that those of several processes add up.
"""

from __future__ import annotations

from functools import lru_cache

import torch

HISTOGRAM, SKETCH, COVARIANCE = "histogram", "sketch", "covariance"
KINDS = (HISTOGRAM, SKETCH, COVARIANCE)
# |x| from 2^-16 to 2^16 in bins of an eighth of an octave; the first bin is for smaller values, the last for larger ones.
LOWEST_OCTAVE, OCTAVES, BINS_PER_OCTAVE = -16, 32, 8
BINS = OCTAVES * BINS_PER_OCTAVE + 2
# Columns of Omega: ranks up to about half of them are accurate.
SKETCH_WIDTH = 64


def empty_moments(kind: str, in_features: int, device: torch.device) -> torch.Tensor:
    """Zeros in the shape of the moments `kind` of a layer with `in_features` inputs."""
    if kind == HISTOGRAM:
        return torch.zeros(in_features, BINS, dtype=torch.int32, device=device)
    columns = in_features if kind == COVARIANCE else min(SKETCH_WIDTH, in_features)
    return torch.zeros(in_features, columns, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


def add_moments(kind: str, moments: torch.Tensor, x: torch.Tensor) -> None:
    """Add those of the inputs `x` (tokens, in) to `moments` in place."""
    if kind == HISTOGRAM:
        positions = ((x.abs().log2() - LOWEST_OCTAVE) * BINS_PER_OCTAVE).floor().add(1).clamp(0, BINS - 1)
        positions = positions.nan_to_num(0).long() + BINS * torch.arange(x.shape[1], device=x.device)
        moments.add_(torch.bincount(positions.flatten(), minlength=moments.numel()).view_as(moments))
    elif kind == SKETCH:
        moments.addmm_(x.T, x @ _omega(*moments.shape).to(x))
    else:
        moments.addmm_(x.T, x)


def bin_magnitudes(bins: int) -> torch.Tensor:
    """(bins,): the magnitude that stands for each bin of a histogram, the geometric middle of its ends; 0 for the first."""
    middles = 2.0 ** (LOWEST_OCTAVE + (torch.arange(bins, dtype=torch.float64) - 0.5) / BINS_PER_OCTAVE)
    middles[0] = 0.0
    return middles


def low_rank_part(sketch: torch.Tensor, rank: int) -> torch.Tensor:
    """L (in, k) with L L^T about the best approximation of C of rank k, from Y = C Omega.

    Nystrom's approximation Y (Omega^T Y)^+ Y^T, which is never above C, cut to its k leading eigenvectors
    [Tropp et al. 2017, algorithm 3].

    Args:
        sketch: Y (in, l).
        rank: k is this, or l if that is smaller.
    """
    omega = _omega(*sketch.shape).to(sketch)
    shift = torch.finfo(sketch.dtype).eps * sketch.norm()
    if shift == 0:
        return sketch[:, :rank]
    shifted = sketch + shift * omega
    core = omega.T @ shifted
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    # Directions that rounding dominates are left out.
    significant = values > values[-1] * torch.finfo(sketch.dtype).eps * len(sketch)
    U, sigma, _ = torch.linalg.svd(shifted @ (vectors[:, significant] / values[significant].sqrt()), full_matrices=False)
    return U[:, :rank] * (sigma[:rank].square() - shift).clamp_min(0).sqrt()


@lru_cache(maxsize=8)
def _omega(rows: int, columns: int) -> torch.Tensor:
    """Omega (rows, columns), orthonormal columns of a Gaussian matrix of a fixed seed."""
    sample = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(sample).Q
