"""Rounding of factors before they are used and saved, so that small files contain exactly what was measured."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import nn

from .config import OuterDtype
from .layer import nora_layers

InnerDtype = Literal["float32", "float16", "int8"]
INT8_LIMIT, INT4_LIMIT = 127, 7
# A step with so many significant bits times |q| <= 7 is exact in bfloat16, which has 8.
STEP_BITS = 4


@torch.no_grad()
def round_inner_factors(model: nn.Module, dtype: InnerDtype, adapter_name: str = "default") -> None:
    """Round the trained factors of the adapter to values that a compact file stores exactly in `dtype`.

    The factors stay float32. "int8" has one step for each factor F of each layer: q = round(F / step), F <- q step, |q| <= 127.

    Raises: ValueError if `dtype` is unknown, or a value is too large for float16.
    """
    if dtype not in get_args(InnerDtype):
        raise ValueError(f"The dtype of inner factors must be one of {', '.join(get_args(InnerDtype))}, got {dtype!r}.")
    for name, layer in nora_layers(model).items():
        for kind in layer.adapter_layer_names:
            factors = getattr(layer, kind)
            if adapter_name in factors:
                factors[adapter_name].copy_(_rounded(factors[adapter_name], dtype, f"{name}.{kind}"))


def rounded_outer_factors(B: torch.Tensor, A: torch.Tensor, dtype: OuterDtype) -> tuple[torch.Tensor, torch.Tensor]:
    """`B` (out, r) and `A` (r, in), or with "int4" each of their columns and rows rounded to 4 bits, float32."""
    if dtype == "base":
        return B, A
    return directions_of_int4(*int4_directions(B, axis=1), axis=1), directions_of_int4(*int4_directions(A, axis=0), axis=0)


def int8_factors(factors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`factors`, of any shape, as int8 q of this shape, and the step (), bfloat16.

    step = max|F| / 127. With 8 significant bits, its products with |q| <= 127 are exact in float32, so rounded factors give the
    same q and step again.
    """
    largest = factors.abs().max() if factors.numel() else torch.zeros(())
    step = (largest.float() / INT8_LIMIT).bfloat16()
    quantised = (factors / step.float()).round() if step > 0 else torch.zeros_like(factors)
    return quantised.clamp(-INT8_LIMIT, INT8_LIMIT).to(torch.int8), step


def factors_of_int8(quantised: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """q step, float32: `quantised` of any shape, `step` ()."""
    return quantised.float() * step.float()


def int4_directions(factors: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Directions, the rows (`axis` 0) or columns (1) of `factors`, as int8 q with |q| <= 7 and steps, bfloat16.

    Each direction is q step with step = max / 7, rounded to 4 significant bits, so that rounded directions give the same q and
    step again. The part of a direction that rounding removes has about a tenth of its length.

    Returns: q, of the shape of `factors`, and steps (r,).
    """
    largest = factors.float().abs().amax(dim=1 - axis)
    mantissa, exponent = torch.frexp(largest / INT4_LIMIT)
    steps = torch.ldexp((mantissa * 2**STEP_BITS).round() / 2**STEP_BITS, exponent)
    divisor = torch.where(steps > 0, steps, 1.0).unsqueeze(1 - axis)
    quantised = (factors.float() / divisor).round().clamp(-INT4_LIMIT, INT4_LIMIT)
    return quantised.to(torch.int8), steps.bfloat16()


def directions_of_int4(quantised: torch.Tensor, steps: torch.Tensor, axis: int) -> torch.Tensor:
    """q step, float32: `quantised` as from `int4_directions`, `steps` (r,)."""
    return quantised.float() * steps.float().unsqueeze(1 - axis)


def _rounded(factors: torch.Tensor, dtype: InnerDtype, where: str) -> torch.Tensor:
    if dtype == "int8":
        return factors_of_int8(*int8_factors(factors))
    if dtype == "float16" and factors.numel() and factors.abs().max() > torch.finfo(torch.float16).max:
        raise ValueError(
            f"The factors of {where!r} must be at most {torch.finfo(torch.float16).max:.0f} in float16, got "
            f"{factors.abs().max().item():.3g}. Use int8 or float32."
        )
    return factors.half().float() if dtype == "float16" else factors
