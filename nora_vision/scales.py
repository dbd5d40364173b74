"""Activation scales on a coarse grid, so that another machine can recompute them exactly.

The statistics of a base calibration differ in the last digits between machines, numbers of threads and dtypes, and outer factors
from slightly different scales would be those of another adapter. So the scale is rounded to half octaves,

    x = 2 log2(max(S / max(S), 2^-10)),    k = round(x),    scale = 2^(k / 2),

and an adapter stores the parity of k, one bit for each entry. Statistics that were computed again give x' instead of x. If
|x' - x| < 1/2, k is the integer of the stored parity that is nearest to x': its distance from x' is less than 1, and all other
integers of its parity are at least 2 from it.
"""

from __future__ import annotations

import torch

STEPS_PER_OCTAVE = 2
# Smaller entries are raised. The initialisation has a floor of about this size, too.
OCTAVES = 10
# In place of k for entries of zero, which a layer has that saw only zeros.
ZERO = -128


def coarse_scale(statistics: torch.Tensor) -> torch.Tensor:
    """`statistics` S (in,) relative to the largest entry, rounded to half octaves: (in,) float32, all zeros if S is."""
    if not statistics.any():
        return torch.zeros_like(statistics, dtype=torch.float32)
    return scale_of(_steps(statistics).round().to(torch.int8))


def scale_of(steps: torch.Tensor) -> torch.Tensor:
    """The scale (in,) float32 at `steps` k (in,) int8."""
    return torch.where(steps == ZERO, 0.0, torch.exp2(steps.double() / STEPS_PER_OCTAVE).float())


def steps_of(scale: torch.Tensor) -> torch.Tensor | None:
    """The steps k (in,) int8 of a coarse `scale` (in,); None if an entry is between two steps."""
    scale = scale.detach().float().cpu()
    steps = (STEPS_PER_OCTAVE * scale.double().log2()).round().clamp_min(ZERO).to(torch.int8)
    return steps if torch.equal(scale_of(steps), scale) else None


def recovered_steps(statistics: torch.Tensor, parity: torch.Tensor) -> torch.Tensor:
    """The steps k (in,) int8 with the stored `parity` (in,) that are nearest to those of the recomputed `statistics` (in,)."""
    if not statistics.any():
        return torch.full(statistics.shape, ZERO, dtype=torch.int8)
    odd = parity.double()
    return (2 * ((_steps(statistics) - odd) / 2).round() + odd).to(torch.int8)


def _steps(statistics: torch.Tensor) -> torch.Tensor:
    """x of the module's docstring, (in,) float64."""
    values = statistics.detach().double().cpu()
    return STEPS_PER_OCTAVE * (values / values.max()).log2().clamp_min(-OCTAVES)
