"""The change of one layer's weight, whatever kind its tensors are, as the two factors of a LoRA or DoRA; exact.

With W as a matrix (out, in * kernel):
    LoRA    s up down
    Tucker  s up mid down            a LoRA whose down is mid * down
    LoHa    s (a1 b1) * (a2 b2)      elementwise; a LoRA of rank r^2, since row products of a1, a2 times column products of b1, b2
    LoKr    s kron(w1, w2)           a LoRA of rank r1 r2, since kron(u1 d1, u2 d2) = kron(u1, u2) kron(d1, d2)
    diff    the change itself        a LoRA of full rank: one factor is the identity
    DoRA    m (W + change) / ||W + change||, by rows as PEFT has it; by columns, which PEFT has not, as the change that it makes.
A product whose rank would reach the full one is multiplied out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from pipelines.subject.lora_files.configuration import Settings

Parts = Mapping[str, torch.Tensor]
# By the one part that tells each kind.
KINDS = {
    "hada_w1_a": "LoHa",
    "lokr_w1": "LoKr",
    "lokr_w1_a": "LoKr",
    "mid": "Tucker",
    "down": "LoRA",
    "up": "LoRA",
    "diff": "diff",
}
NEEDED = {
    "LoRA": {"down", "up"},
    "Tucker": {"down", "up", "mid"},
    "LoHa": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    "LoKr": set(),
    "diff": {"diff"},
}
ALLOWED = {
    "LoRA": {"up_bias", "magnitude", "dora_scale"},
    "Tucker": {"dora_scale"},
    "LoHa": {"hada_t1", "hada_t2", "dora_scale"},
    "LoKr": {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "dora_scale"},
    "diff": {"dora_scale"},
}
VECTORS = ("alpha", "diff_b", "up_bias", "magnitude", "dora_scale")
CORES = ("mid", "hada_t1", "hada_t2", "lokr_t2")


class MisfitError(ValueError):
    """Tensors that make no change of the layer that they name; the message says why."""


@dataclass(frozen=True)
class Change:
    """A layer's change of weight: `scale` up (out, k) times down (k, in * kernel), and its change of bias.

    Args:
        magnitude: a DoRA's length of each row, (out,).
        bias: what is added to the layer's bias, (out,).
    """

    up: torch.Tensor | None = None
    down: torch.Tensor | None = None
    scale: float = 1.0
    magnitude: torch.Tensor | None = None
    bias: torch.Tensor | None = None


def change_of(layer: nn.Module, name: str, parts: Parts, settings: Settings | None) -> Change:
    """The change that `parts` make to a Linear layer or convolution.

    Args:
        name: the layer's in its component, for `settings`.
        parts: tensors by the parts of `names.PART_PATTERNS`.
        settings: PEFT's, where the file has them.
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
        raise MisfitError("its configuration says use_dora, and there is no lora_magnitude_vector")
    return change


def _bias_in(parts: Parts, layer: nn.Module) -> torch.Tensor | None:
    if "diff_b" in parts and layer.bias is None:
        raise MisfitError("it changes a bias, and the layer has none")
    return parts["diff_b"].float() if "diff_b" in parts else None


def _change_of_bias(bias: torch.Tensor | None, layer: nn.Module, parts: Parts) -> Change:
    """The change of a layer whose weight stays as it is."""
    if bias is None or parts.keys() - {"diff_b", "alpha"}:
        raise MisfitError(f"there is {', '.join(sorted(parts))} alone, which is no change")
    return Change(bias=_of_shape(bias, layer.bias.shape))


def _with_bias(change: Change, layer: nn.Module, parts: Parts) -> Change:
    """The bias of PEFT's `lora_bias`, which is scaled, in place of the change's own; of the layer's shape."""
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
        if not tensor.is_floating_point() and part != "alpha":
            raise MisfitError(f"{part} must hold fractions, got {tensor.dtype}")
        if part == "alpha" and tensor.numel() != 1:
            raise MisfitError(f"alpha must be one number, got shape {tuple(tensor.shape)}")
        if tensor.ndim not in _dimensions(part) or not tensor.numel():
            raise MisfitError(f"{part} has shape {tuple(tensor.shape)}")


def _dimensions(part: str) -> tuple[int, ...]:
    """How many dimensions a part may have."""
    if part in VECTORS:
        return (0, 1, 2, 3, 4)
    return (4,) if part in CORES else (2, 3, 4)


def _scale(kind: str, parts: Parts, name: str, rank: int | None, settings: Settings | None) -> float:
    """What the product is multiplied by: alpha / rank; 1 where nothing says an alpha, or the kind knows none."""
    if kind == "diff":
        return 1.0
    configured = None if settings is None else _configured_scale(name, rank, settings)
    if "alpha" not in parts or rank is None:
        return 1.0 if configured is None else configured
    scale = parts["alpha"].item() / rank
    if configured is not None and abs(configured - scale) > 1e-6 * abs(scale):
        raise MisfitError(f"its alpha tensor makes a scaling of {scale:g}, and its configuration one of {configured:g}")
    return scale


def _configured_scale(name: str, rank: int | None, settings: Settings) -> float | None:
    """The scaling of the layer called `name` by its configuration; None where that has no rank."""
    configured = settings.rank_of(name)
    if rank is not None and configured not in (None, rank):
        raise MisfitError(f"its configuration says rank {configured}, and its tensors have rank {rank}")
    size = configured if rank is None else rank
    return None if size is None else settings.scale_of(name, size)


def _check_product(up: torch.Tensor, down: torch.Tensor, layer: nn.Module) -> None:
    """Refuse factors (rows, k) and (k, columns) whose product is no change of the layer's weight."""
    if up.shape[1] != len(down):
        raise MisfitError(f"its factors are of ranks {up.shape[1]} and {len(down)}")
    _check_size(up.shape[0], down.shape[1], layer)


def _check_size(rows: int, columns: int, layer: nn.Module) -> None:
    shape = _weight_shape(layer)
    expected = shape[0], math.prod(shape[1:])
    if (rows, columns) != expected:
        raise MisfitError(f"it changes a weight of {rows} x {columns}, the model's is {expected[0]} x {expected[1]}")


def _weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """The shape of a layer's weight, which a quantised one does not store in that form."""
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
        raise MisfitError("its factors are of different sizes")
    _check_size(a1.shape[0], b1.shape[1], layer)
    if len(b1) * len(b2) >= min(a1.shape[0], b1.shape[1]):
        return *_full_rank((a1 @ b1) * (a2 @ b2)), len(b1)
    up = (a1[:, :, None] * a2[:, None, :]).flatten(1)
    down = (b1[:, None, :] * b2[None, :, :]).flatten(0, 1)
    return *_balanced(up, down), len(b1)


def _lokr(parts: Parts, layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor, int | None]:
    (u1, d1), rank1 = _of_lokr(parts, "lokr_w1", None)
    (u2, d2), rank2 = _of_lokr(parts, "lokr_w2", "lokr_t2")
    # LyCORIS, A1111 and ComfyUI: alpha counts for the factors alone.
    rank = rank1 if rank2 is None else rank2
    rows, columns = u1.shape[0] * u2.shape[0], d1.shape[1] * d2.shape[1]
    _check_size(rows, columns, layer)
    if len(d1) * len(d2) >= min(rows, columns):
        return *_full_rank(torch.kron(u1 @ d1, u2 @ d2)), rank
    return *_balanced(torch.kron(u1, u2), torch.kron(d1, d2)), rank


def _of_lokr(parts: Parts, prefix: str, core: str | None) -> tuple[tuple[torch.Tensor, torch.Tensor], int | None]:
    """One side of a Kronecker product as two factors, and their rank where the file itself has factors."""
    factors = {f"{prefix}_a", f"{prefix}_b"} & parts.keys()
    if prefix in parts and not factors:
        return _full_rank(parts[prefix].flatten(1)), None
    if prefix in parts or len(factors) != 2:
        raise MisfitError(f"it must have {prefix}, or {prefix}_a and {prefix}_b")
    left, right = _with_core(parts, prefix, core)
    # torch.kron takes no transposed views.
    return (left.contiguous(), right.contiguous()), len(right)


def _with_core(parts: Parts, prefix: str, core: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """A pair of factors (out, r) and (r, in * kernel); with a Tucker core (r, r, kernel), whose first is stored as (r, out)."""
    left, right = parts[f"{prefix}_a"].flatten(1), parts[f"{prefix}_b"].flatten(1)
    if core in parts:
        left, tucker = left.T, parts[core]
        if tucker.shape[:2] != (left.shape[1], len(right)):
            raise MisfitError(f"{core} has shape {tuple(tucker.shape)}, its factors have rank {left.shape[1]} and {len(right)}")
        right = torch.einsum("ijkl,jr->irkl", tucker, right).flatten(1)
    if left.shape[1] != len(right):
        raise MisfitError(f"{prefix}_a and {prefix}_b have ranks {left.shape[1]} and {len(right)}")
    return left, right


def _diff(parts: Parts, layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor, None]:
    return *_full_rank(parts["diff"].flatten(1)), None


MAKERS = {"LoRA": _lora, "Tucker": _tucker, "LoHa": _loha, "LoKr": _lokr, "diff": _diff}


def _full_rank(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix (m, n) as a product: itself and the identity of its smaller side."""
    rows, columns = matrix.shape
    return (torch.eye(rows), matrix) if rows <= columns else (matrix, torch.eye(columns))


def _balanced(up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product with columns of `up` (m, k) and rows of `down` (k, n) of like size, which half precision keeps exact."""
    sizes = torch.stack([up.norm(dim=0), down.norm(dim=1)]).clamp(min=torch.finfo(up.dtype).tiny)
    # A power of two changes no digit.
    shift = torch.exp2(((sizes[1].log2() - sizes[0].log2()) / 2).round().clamp(-30, 30))
    return up * shift, down / shift[:, None]


def _decomposed(change: Change, layer: nn.Module, parts: Parts) -> Change:
    """A DoRA's change: with its rows' lengths as PEFT takes them, or multiplied out where it has those of columns."""
    rows, columns = _weight_shape(layer)[:2]
    scale = parts["magnitude" if "magnitude" in parts else "dora_scale"].float()
    if "magnitude" in parts or (scale.numel() == rows == scale.shape[0]):
        if scale.numel() != rows:
            raise MisfitError(f"it has {scale.numel()} lengths, and the weight has {rows} rows")
        return replace(change, magnitude=scale.flatten())
    if scale.numel() != columns:
        raise MisfitError(f"dora_scale has shape {tuple(scale.shape)}, and the weight {tuple(layer.weight.shape)}")
    if not layer.weight.is_floating_point():
        raise MisfitError("it sets the lengths of columns, which needs a base model that is not quantised")
    weight = layer.weight.detach().float().cpu()
    merged = weight + (change.scale * change.up @ change.down).reshape(weight.shape)
    axes = [axis for axis in range(weight.ndim) if axis != 1]
    shape = (1, columns, *(1,) * (weight.ndim - 2))
    lengths = torch.linalg.vector_norm(merged, dim=axes, keepdim=True).clamp(min=torch.finfo(torch.float32).eps)
    up, down = _full_rank((merged * scale.reshape(shape) / lengths - weight).flatten(1))
    return Change(up, down, bias=change.bias)


def _of_shape(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    if tensor.shape != torch.Size(shape):
        raise MisfitError(f"its change of the bias has shape {tuple(tensor.shape)}, the layer's is {tuple(shape)}")
    return tensor
