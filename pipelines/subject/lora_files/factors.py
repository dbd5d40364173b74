"""Exact conversion of one layer's weight change, of any kind, to the two factors of a LoRA or DoRA.

With W as a matrix (out, in * kernel):
    LoRA    s up down
    Tucker  s up mid down            a LoRA whose down is mid * down
    LoHa    s (a1 b1) * (a2 b2)      elementwise; a LoRA of rank r^2: row-wise products of a1, a2 and column-wise ones of b1, b2
    LoKr    s kron(w1, w2)           a LoRA of rank r1 r2, since kron(u1 d1, u2 d2) = kron(u1, u2) kron(d1, d2)
    IA3     W diag(w)                or diag(w) W: the columns or rows of W scaled by 1 + w
    diff    the change itself        a LoRA of full rank: one factor is the identity
    DoRA    m (W + change) / ||W + change||; by rows as in PEFT; by columns, which PEFT lacks, as the resulting weight change.
A product whose rank would not be below the full rank is multiplied out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from pipelines.subject.lora_files.configuration import Settings

Parts = Mapping[str, torch.Tensor]
# The kind of a layer's tensors, by the first of these parts that it has.
KINDS = {
    "hada_w1_a": "LoHa",
    "lokr_w1": "LoKr",
    "lokr_w1_a": "LoKr",
    "mid": "Tucker",
    "down": "LoRA",
    "up": "LoRA",
    "on_input": "IA3",
    "diff": "diff",
}
NEEDED = {
    "LoRA": {"down", "up"},
    "Tucker": {"down", "up", "mid"},
    "LoHa": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    "LoKr": set(),
    "IA3": {"weight", "on_input"},
    "diff": {"diff"},
}
ALLOWED = {
    "LoRA": {"up_bias", "magnitude", "dora_scale"},
    "Tucker": {"dora_scale"},
    "LoHa": {"hada_t1", "hada_t2", "dora_scale"},
    "LoKr": {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "dora_scale"},
    "IA3": set(),
    "diff": {"dora_scale"},
}
VECTORS = ("alpha", "diff_b", "up_bias", "magnitude", "dora_scale", "weight", "on_input")
NUMBERS = ("alpha", "on_input")
CORES = ("mid", "hada_t1", "hada_t2", "lokr_t2")


class MisfitError(ValueError):
    """Tensors that do not fit the layer that they name; the message says why."""


@dataclass(frozen=True)
class Change:
    """A layer's weight change, `scale` up (out, k) times down (k, in * kernel), and its bias change.

    Args:
        magnitude: a DoRA's norm of each row, (out,).
        bias: is added to the layer's bias, (out,).
    """

    up: torch.Tensor | None = None
    down: torch.Tensor | None = None
    scale: float = 1.0
    magnitude: torch.Tensor | None = None
    bias: torch.Tensor | None = None


def change_of(layer: nn.Module, name: str, parts: Parts, settings: Settings | None) -> Change:
    """The change of a linear layer or a convolution by `parts`.

    Args:
        name: the layer's name in its component, for `settings`.
        parts: tensors by the parts of `names.PART_PATTERNS`, of the shapes of the file's format.
        settings: PEFT's configuration, if the file has one.
    Raises: MisfitError.
    """
    kind = next((KINDS[part] for part in KINDS if part in parts), None)
    bias = _bias_in(parts, layer)
    if kind is None:
        return _change_of_bias(bias, layer, parts)
    _check_parts(kind, parts)
    up, down, rank = MAKERS[kind]({part: tensor.float() for part, tensor in parts.items()}, layer)
    change = Change(up, down, _scale(kind, parts, name, rank, settings), None, bias)
    _check_product(up, down, layer)
    change = _with_bias(change, layer, parts)
    if "magnitude" in parts or "dora_scale" in parts:
        return _decomposed(change, layer, parts)
    if settings is not None and settings.use_dora:
        raise MisfitError("its configuration says use_dora, but it has no lora_magnitude_vector")
    return change


def _bias_in(parts: Parts, layer: nn.Module) -> torch.Tensor | None:
    if "diff_b" in parts and layer.bias is None:
        raise MisfitError("it changes a bias, but the layer has none")
    return parts["diff_b"].float() if "diff_b" in parts else None


def _change_of_bias(bias: torch.Tensor | None, layer: nn.Module, parts: Parts) -> Change:
    """The change of a layer of which only the bias changes."""
    if bias is None or parts.keys() - {"diff_b", "alpha"}:
        raise MisfitError(f"it has only {', '.join(sorted(parts))}, which is not a complete change")
    return Change(bias=_of_shape(bias, layer.bias.shape))


def _with_bias(change: Change, layer: nn.Module, parts: Parts) -> Change:
    """`change` with the scaled bias of PEFT's `lora_bias` if there is one; checks the shape of the bias."""
    bias = change.scale * parts["up_bias"].float() if "up_bias" in parts else change.bias
    return change if bias is None else replace(change, bias=_of_shape(bias, _weight_shape(layer)[:1]))


def _check_parts(kind: str, parts: Parts) -> None:
    missing = NEEDED[kind] - parts.keys()
    if missing:
        raise MisfitError(f"{', '.join(sorted(missing))} is missing")
    unused = parts.keys() - NEEDED[kind] - ALLOWED[kind] - {"alpha", "diff_b"}
    if unused:
        raise MisfitError(f"{', '.join(sorted(unused))} is not used beside a {kind}'s tensors")
    for part, tensor in parts.items():
        if not tensor.is_floating_point() and part not in NUMBERS:
            raise MisfitError(f"{part} must be floating-point, got {tensor.dtype}")
        if part in NUMBERS and tensor.numel() != 1:
            raise MisfitError(f"{part} must be one number, got shape {tuple(tensor.shape)}")
        if tensor.ndim not in _dimensions(part) or not tensor.numel():
            raise MisfitError(f"{part} has shape {tuple(tensor.shape)}")


def _dimensions(part: str) -> tuple[int, ...]:
    """The allowed numbers of dimensions of a part."""
    if part in VECTORS:
        return (0, 1, 2, 3, 4)
    return (4,) if part in CORES else (2, 3, 4)


def _scale(kind: str, parts: Parts, name: str, rank: int | None, settings: Settings | None) -> float:
    """The factor on the product: alpha / rank; 1 without an alpha, or for kinds that have none."""
    if kind == "diff":
        return 1.0
    configured = None if settings is None else _configured_scale(name, rank, settings)
    if "alpha" not in parts or rank is None:
        return 1.0 if configured is None else configured
    scale = parts["alpha"].item() / rank
    if configured is not None and abs(configured - scale) > 1e-6 * abs(scale):
        raise MisfitError(f"its alpha tensor gives a scaling of {scale:g}, but its configuration gives {configured:g}")
    return scale


def _configured_scale(name: str, rank: int | None, settings: Settings) -> float | None:
    """The scaling of the layer `name` by its configuration; None if that has no rank or no alpha."""
    configured = settings.rank_of(name)
    if rank is not None and configured not in (None, rank):
        raise MisfitError(f"its configuration says rank {configured}, but its tensors have rank {rank}")
    size = configured if rank is None else rank
    return None if size is None else settings.scale_of(name, size)


def _check_product(up: torch.Tensor, down: torch.Tensor, layer: nn.Module) -> None:
    """Check that the product of `up` (rows, k) and `down` (k, columns) has the size of the layer's weight."""
    if up.shape[1] != len(down):
        raise MisfitError(f"its factors have different ranks, {up.shape[1]} and {len(down)}")
    _check_size(up.shape[0], down.shape[1], layer)


def _check_size(rows: int, columns: int, layer: nn.Module) -> None:
    shape = _weight_shape(layer)
    expected = shape[0], math.prod(shape[1:])
    if (rows, columns) != expected:
        raise MisfitError(f"it changes a weight of size {rows} x {columns}, but the model's is {expected[0]} x {expected[1]}")


def _weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """The shape of a layer's weight before quantisation."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return tuple(layer.weight.shape)


def _lora(parts: Parts, layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor, int]:
    up, down = parts["up"].flatten(1), parts["down"].flatten(1)
    if parts["up"].ndim > 2 and parts["up"][0, 0].numel() != 1:
        raise MisfitError(f"lora_up must end in 1 x 1, got shape {tuple(parts['up'].shape)}")
    return up, down, len(down)


def _tucker(parts: Parts, layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor, int]:
    up, down, mid = parts["up"].flatten(1), parts["down"].flatten(1), parts["mid"]
    _check_size(len(up), down.shape[1] * mid[0, 0].numel(), layer)
    if mid.shape[1] != len(down):
        raise MisfitError(f"lora_mid has shape {tuple(mid.shape)}, lora_down {tuple(parts['down'].shape)}")
    return up, torch.einsum("mnkl,ni->mikl", mid, down).flatten(1), len(down)


def _loha(parts: Parts, layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor, int]:
    (a1, b1), (a2, b2) = (_with_core(parts, f"hada_w{i}", f"hada_t{i}") for i in (1, 2))
    if a1.shape[0] != a2.shape[0] or b1.shape[1] != b2.shape[1] or (a1.shape[1], a2.shape[1]) != (len(b1), len(b2)):
        raise MisfitError("its factors have different sizes")
    _check_size(a1.shape[0], b1.shape[1], layer)
    if len(b1) * len(b2) >= min(a1.shape[0], b1.shape[1]):
        return *_full_rank((a1 @ b1) * (a2 @ b2)), len(b1)
    up = (a1[:, :, None] * a2[:, None, :]).flatten(1)
    down = (b1[:, None, :] * b2[None, :, :]).flatten(0, 1)
    return *_balanced(up, down), len(b1)


def _lokr(parts: Parts, layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor, int | None]:
    (u1, d1), rank1 = _of_lokr(parts, "lokr_w1", None)
    (u2, d2), rank2 = _of_lokr(parts, "lokr_w2", "lokr_t2")
    # As in LyCORIS, A1111 and ComfyUI, alpha applies only if the file has factors.
    rank = rank1 if rank2 is None else rank2
    rows, columns = u1.shape[0] * u2.shape[0], d1.shape[1] * d2.shape[1]
    _check_size(rows, columns, layer)
    if len(d1) * len(d2) >= min(rows, columns):
        return *_full_rank(torch.kron(u1 @ d1, u2 @ d2)), rank
    return *_balanced(torch.kron(u1, u2), torch.kron(d1, d2)), rank


def _of_lokr(parts: Parts, prefix: str, core: str | None) -> tuple[tuple[torch.Tensor, torch.Tensor], int | None]:
    """One side of a Kronecker product as two factors, (m, k) and (k, n), and k if the file itself has factors."""
    factors = {f"{prefix}_a", f"{prefix}_b"} & parts.keys()
    if prefix in parts and not factors:
        return _full_rank(parts[prefix].flatten(1)), None
    if prefix in parts or len(factors) != 2:
        raise MisfitError(f"it must have {prefix}, or {prefix}_a and {prefix}_b")
    left, right = _with_core(parts, prefix, core)
    # torch.kron does not accept transposed views.
    return (left.contiguous(), right.contiguous()), len(right)


def _with_core(parts: Parts, prefix: str, core: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """A pair of factors (out, r) and (r, in * kernel); with a Tucker core (r, r, kernel), the first is stored as (r, out)."""
    left, right = parts[f"{prefix}_a"].flatten(1), parts[f"{prefix}_b"].flatten(1)
    if core in parts:
        left, tucker = left.T, parts[core]
        if tucker.shape[:2] != (left.shape[1], len(right)):
            raise MisfitError(
                f"{core} has shape {tuple(tucker.shape)}, but its factors have ranks {left.shape[1]} and {len(right)}"
            )
        right = torch.einsum("ijkl,jr->irkl", tucker, right).flatten(1)
    if left.shape[1] != len(right):
        raise MisfitError(f"{prefix}_a and {prefix}_b have different ranks, {left.shape[1]} and {len(right)}")
    return left, right


def _ia3(parts: Parts, layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor, None]:
    if not layer.weight.is_floating_point():
        raise MisfitError("it scales the weight itself, which needs a base model that is not quantised")
    weight, scales, on_input = layer.weight.detach().float().cpu(), parts["weight"].flatten(), bool(parts["on_input"])
    side = weight.shape[1 if on_input else 0]
    if len(scales) != side:
        raise MisfitError(f"it has {len(scales)} scales, but the weight has {side} {'inputs' if on_input else 'outputs'}")
    shape = (1, side) if on_input else (side, 1)
    return *_full_rank((weight * scales.reshape(*shape, *(1,) * (weight.ndim - 2))).flatten(1)), None


def _diff(parts: Parts, layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor, None]:
    return *_full_rank(parts["diff"].flatten(1)), None


MAKERS = {"LoRA": _lora, "Tucker": _tucker, "LoHa": _loha, "LoKr": _lokr, "IA3": _ia3, "diff": _diff}


def _full_rank(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix (m, n) as the product of itself and the identity of its smaller side."""
    rows, columns = matrix.shape
    return (torch.eye(rows), matrix) if rows <= columns else (matrix, torch.eye(columns))


def _balanced(up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product with columns of `up` (m, k) and rows of `down` (k, n) of similar norm, against underflow of float16."""
    sizes = torch.stack([up.norm(dim=0), down.norm(dim=1)]).clamp(min=torch.finfo(up.dtype).tiny)
    # Multiplication by a power of two is exact.
    shift = torch.exp2(((sizes[1].log2() - sizes[0].log2()) / 2).round().clamp(-30, 30))
    return up * shift, down / shift[:, None]


def _decomposed(change: Change, layer: nn.Module, parts: Parts) -> Change:
    """The change of a DoRA: with row norms as in PEFT, or multiplied out if it has column norms."""
    rows, columns = _weight_shape(layer)[:2]
    scale = parts["magnitude" if "magnitude" in parts else "dora_scale"].float()
    if "magnitude" in parts or (scale.numel() == rows == scale.shape[0]):
        if scale.numel() != rows:
            raise MisfitError(f"it has {scale.numel()} row norms, but the weight has {rows} rows")
        return replace(change, magnitude=scale.flatten())
    if scale.numel() != columns:
        raise MisfitError(f"dora_scale has shape {tuple(scale.shape)}, but the weight has shape {tuple(layer.weight.shape)}")
    if not layer.weight.is_floating_point():
        raise MisfitError("it has column norms, which need a base model that is not quantised")
    weight = layer.weight.detach().float().cpu()
    merged = weight + (change.scale * change.up @ change.down).reshape(weight.shape)
    axes = [axis for axis in range(weight.ndim) if axis != 1]
    shape = (1, columns, *(1,) * (weight.ndim - 2))
    norms = torch.linalg.vector_norm(merged, dim=axes, keepdim=True).clamp(min=torch.finfo(torch.float32).eps)
    up, down = _full_rank((merged * scale.reshape(shape) / norms - weight).flatten(1))
    return Change(up, down, bias=change.bias)


def _of_shape(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    if tensor.shape != torch.Size(shape):
        raise MisfitError(f"its bias change has shape {tuple(tensor.shape)}, but the layer's bias has shape {tuple(shape)}")
    return tensor
