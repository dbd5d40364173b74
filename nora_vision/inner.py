"""The forms of NoRA's core M (r, r), the trained part of the weight change s B M A.

A' (inner_r, r) and B' (r, inner_r) are trained, and P is the first inner_r rows of the identity: P A and B P^T are the leading
inner_r rows of A and columns of B.

    serial             M = B' A'                                 2 r inner_r parameters
    parallel           M = B' P + P^T A'                         2 r inner_r
    a_side             M = P^T A'                                r inner_r
    b_side             M = B' P                                  r inner_r
    full               M, as one block                           r^2
    block_diagonal     M = diag(M_1, ..., M_b)                   r^2 / b, b = inner_blocks
    diagonal           M = diag(d_1, ..., d_r)                   r
    symmetric          M = B' A' + A'^T B'^T                     2 r inner_r
    antisymmetric      M = B' A' - A'^T B'^T                     2 r inner_r
    sparse_low_rank    M = B' A' + a sparse matrix               2 r inner_r + sparse_entries

With num_subspaces K > 1, the r directions are K slices of r / K, M keeps only its K diagonal blocks, one for each slice, and
every token x has a gate for each slice, with K r more parameters in C (K, r):

    g(x) = K softmax(C A x),    change of the output = s B diag(g_1(x) I, ..., g_K(x) I) M A x.

For the serial form this is a sum of K NoRAs on disjoint subspaces, s sum_k g_k(x) B_k B'_k A'_k A_k x, with 2 r inner_r + K r
parameters; for the block-diagonal one, r^2 / b + K r.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch

InnerInit = Literal["zero", "gaussian", "uniform", "orthogonal", "singular_values"]
InnerFormName = Literal[
    "serial", "parallel", "a_side", "b_side", "full", "block_diagonal", "diagonal", "symmetric", "antisymmetric",
    "sparse_low_rank",
]  # fmt: skip
# The attributes of a layer with the trained tensors of its adapters, and those with the frozen start of some of them.
INNER_A, INNER_B, INNER_M, SPARSE, GATE = "nora_inner_A", "nora_inner_B", "nora_inner_M", "nora_inner_sparse", "nora_gate"
TRAINED = (INNER_A, INNER_B, INNER_M, SPARSE, GATE)
FROZEN_STARTS = {INNER_A: "nora_inner_A0", INNER_B: "nora_inner_B0", INNER_M: "nora_inner_M0"}

Tensors = Mapping[str, torch.Tensor]
Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class InnerForm:
    """The form of one layer's core M; subclasses define it. `make_inner_form` makes one from its name.

    Args:
        r, inner_r: outer and inner rank.
        inner_blocks: number of blocks of a block-diagonal M.
        sparse_entries: number of trained entries of the sparse matrix.
        sparse_seed: determines their positions.
        num_subspaces: number of gated slices of the r directions; 1 for no gates.
        inner_std: standard deviation of random starts, of all trained matrices but the A' of a product.
    """

    r: int
    inner_r: int
    inner_blocks: int = 1
    sparse_entries: int = 0
    sparse_seed: int = 0
    num_subspaces: int = 1
    inner_std: float = 0.02

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the trained tensors, by their names in a layer."""
        gate = {GATE: (self.num_subspaces, self.r)} if self.num_subspaces > 1 else {}
        return self._shapes() | gate

    def start_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the frozen start that preserve_output subtracts; the sparse matrix and the gates start at zero."""
        return {FROZEN_STARTS[name]: shape for name, shape in self.shapes().items() if name in FROZEN_STARTS}

    def num_parameters(self) -> int:
        """The number of trained parameters of one layer."""
        return sum(math.prod(shape) for shape in self.shapes().values())

    def factors(self, tensors: Tensors) -> Pair:
        """`up` (r, k) and `down` (k, r) with up @ down = M, or M - M_0 if `tensors` has the frozen start too."""
        raise NotImplementedError

    def start(
        self, inner_init: InnerInit, coefficients: torch.Tensor | None, generator: torch.Generator | None
    ) -> dict[str, torch.Tensor]:
        """The initial values of the trained tensors, on the CPU; the sparse matrix and the gates start at zero.

        zero:               M = 0: of a product A' is Gaussian and B' zero, every other matrix is zero
        gaussian, uniform:  independent entries with mean zero
        orthogonal:         random orthonormal rows or columns, scaled to the same mean square
        singular_values:    M = diag(coefficients), as far as the inner rank allows; of a product A' and B' have the square roots

        Args:
            coefficients: (r,), see `outer.outer_coefficients`; only for "singular_values".
        """
        start = {name: torch.zeros(shape) for name, shape in self.shapes().items()}
        if inner_init == "singular_values":
            return start | self._diagonal(coefficients)
        return start | self._sampled(inner_init, generator)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        raise NotImplementedError

    def _sampled(self, inner_init: InnerInit, generator: torch.Generator | None) -> dict[str, torch.Tensor]:
        if inner_init == "zero":
            return {}
        return {name: _random(inner_init, shape, self.inner_std, generator) for name, shape in self._shapes().items()}

    def _diagonal(self, coefficients: torch.Tensor) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def _leading(self, like: torch.Tensor | None = None) -> torch.Tensor:
        """P (inner_r, r), in each slice of the directions."""
        device, dtype = (None, None) if like is None else (like.device, like.dtype)
        return torch.eye(self.inner_r, self.r // self.num_subspaces, device=device, dtype=dtype).repeat(1, self.num_subspaces)

    def _at_most_r(self, up: torch.Tensor, down: torch.Tensor) -> Pair:
        """Equal factors with k at most r: for a larger k, the product and the identity."""
        return (up, down) if up.shape[1] <= self.r else (up @ down, torch.eye(self.r, device=up.device, dtype=up.dtype))


class Serial(InnerForm):
    """M = B' A'."""

    # How often B' A' occurs in the diagonal of M.
    copies: ClassVar[int] = 1

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {INNER_A: (self.inner_r, self.r), INNER_B: (self.r, self.inner_r)}

    def factors(self, tensors: Tensors) -> Pair:
        """B' and A'; with a frozen start see `_product`, with several subspaces their K slices."""
        up, down = self._product(tensors)
        return self._in_slices(up, down) if self.num_subspaces > 1 else (up, down)

    def _product(self, tensors: Tensors) -> Pair:
        up, down = tensors[INNER_B], tensors[INNER_A]
        if FROZEN_STARTS[INNER_A] in tensors:
            up_0, down_0 = tensors[FROZEN_STARTS[INNER_B]], tensors[FROZEN_STARTS[INNER_A]]
            # B'A' - B'_0 A'_0 written as (B' - B'_0) A' + B'_0 (A' - A'_0): every term is an exact zero at step 0.
            up, down = torch.cat([up - up_0, up_0], dim=1), torch.cat([down, down - down_0], dim=0)
        return up, down

    def _sampled(self, inner_init: InnerInit, generator: torch.Generator | None) -> dict[str, torch.Tensor]:
        kind = "gaussian" if inner_init == "zero" else inner_init
        start = {INNER_A: _random(kind, (self.inner_r, self.r), self.r**-0.5, generator)}
        if inner_init != "zero":
            start[INNER_B] = _random(kind, (self.r, self.inner_r), self.inner_std, generator)
        return start

    def _diagonal(self, coefficients: torch.Tensor) -> dict[str, torch.Tensor]:
        values = coefficients / self.copies
        down = self._leading() * values.abs().sqrt()
        return {INNER_A: down, INNER_B: down.T * values.sign()[:, None]}

    def _in_slices(self, up: torch.Tensor, down: torch.Tensor) -> Pair:
        """Factors (r, K k) and (K k, r) of the diagonal blocks of up @ down, one for each slice."""
        slices = self.num_subspaces
        mask = torch.eye(slices, device=up.device, dtype=up.dtype).repeat_interleave(self.r // slices, dim=0)
        up = (mask[:, :, None] * up[:, None, :]).flatten(1)
        down = (mask.T[:, None, :] * down[None, :, :]).flatten(0, 1)
        return up, down


class Symmetric(Serial):
    """M = B' A' + A'^T B'^T."""

    copies = 2
    sign: ClassVar[float] = 1.0

    def factors(self, tensors: Tensors) -> Pair:
        """The product and its transpose beside each other."""
        up, down = self._product(tensors)
        return self._at_most_r(torch.cat([up, self.sign * down.T], dim=1), torch.cat([down, up.T]))


class Antisymmetric(Symmetric):
    """M = B' A' - A'^T B'^T."""

    sign = -1.0


class SparseLowRank(Serial):
    """M = B' A' + a sparse matrix, whose `sparse_entries` trained entries have fixed positions."""

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return super()._shapes() | {SPARSE: (self.sparse_entries,)}

    def factors(self, tensors: Tensors) -> Pair:
        """M and the identity, since M has any rank."""
        up, down = self._product(tensors)
        values = tensors[SPARSE]
        positions = sparse_positions(self.r, self.sparse_entries, self.sparse_seed, values.device)
        sparse = values.new_zeros(self.r * self.r).index_copy(0, positions, values).unflatten(0, (self.r, self.r))
        return up @ down + sparse, torch.eye(self.r, device=up.device, dtype=up.dtype)


class LinearForm(InnerForm):
    """A form whose M is linear in the trained tensors, so that M - M_0 has the same form."""

    def factors(self, tensors: Tensors) -> Pair:
        """The factors for the trained tensors less their frozen start."""
        changes = {}
        for name in self._shapes():
            start = tensors.get(FROZEN_STARTS[name])
            changes[name] = tensors[name] if start is None else tensors[name] - start
        return self._linear_factors(changes)

    def _linear_factors(self, tensors: Tensors) -> Pair:
        raise NotImplementedError


class Parallel(LinearForm):
    """M = B' P + P^T A'."""

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {INNER_A: (self.inner_r, self.r), INNER_B: (self.r, self.inner_r)}

    def _linear_factors(self, tensors: Tensors) -> Pair:
        leading = self._leading(like=tensors[INNER_A])
        return self._at_most_r(torch.cat([tensors[INNER_B], leading.T], dim=1), torch.cat([leading, tensors[INNER_A]]))

    def _diagonal(self, coefficients: torch.Tensor) -> dict[str, torch.Tensor]:
        half = self._leading() * coefficients / 2
        return {INNER_A: half, INNER_B: half.T}


class ASide(LinearForm):
    """M = P^T A'."""

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {INNER_A: (self.inner_r, self.r)}

    def _linear_factors(self, tensors: Tensors) -> Pair:
        return self._leading(like=tensors[INNER_A]).T, tensors[INNER_A]

    def _diagonal(self, coefficients: torch.Tensor) -> dict[str, torch.Tensor]:
        return {INNER_A: self._leading() * coefficients}


class BSide(LinearForm):
    """M = B' P."""

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {INNER_B: (self.r, self.inner_r)}

    def _linear_factors(self, tensors: Tensors) -> Pair:
        return tensors[INNER_B], self._leading(like=tensors[INNER_B])

    def _diagonal(self, coefficients: torch.Tensor) -> dict[str, torch.Tensor]:
        return {INNER_B: (self._leading() * coefficients).T}


class BlockDiagonal(LinearForm):
    """M = diag(M_1, ..., M_b); one block is a full M."""

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        size = self.r // self.inner_blocks
        return {INNER_M: (self.inner_blocks, size, size)}

    def _linear_factors(self, tensors: Tensors) -> Pair:
        blocks = tensors[INNER_M]
        return torch.block_diag(*blocks), torch.eye(self.r, device=blocks.device, dtype=blocks.dtype)

    def _sampled(self, inner_init: InnerInit, generator: torch.Generator | None) -> dict[str, torch.Tensor]:
        if inner_init == "zero":
            return {}
        blocks, *size = self._shapes()[INNER_M]
        return {INNER_M: torch.stack([_random(inner_init, tuple(size), self.inner_std, generator) for _ in range(blocks)])}

    def _diagonal(self, coefficients: torch.Tensor) -> dict[str, torch.Tensor]:
        return {INNER_M: coefficients.unflatten(0, (self.inner_blocks, -1)).diag_embed()}


class Diagonal(BlockDiagonal):
    """M = diag(d_1, ..., d_r), as r blocks of one entry."""

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {INNER_M: (self.r, 1, 1)}

    def _linear_factors(self, tensors: Tensors) -> Pair:
        entries = tensors[INNER_M].flatten()
        return entries.diag(), torch.eye(self.r, device=entries.device, dtype=entries.dtype)

    def _diagonal(self, coefficients: torch.Tensor) -> dict[str, torch.Tensor]:
        return {INNER_M: coefficients[:, None, None]}


FORMS: dict[str, type[InnerForm]] = {
    "serial": Serial,
    "parallel": Parallel,
    "a_side": ASide,
    "b_side": BSide,
    "full": BlockDiagonal,
    "block_diagonal": BlockDiagonal,
    "diagonal": Diagonal,
    "symmetric": Symmetric,
    "antisymmetric": Antisymmetric,
    "sparse_low_rank": SparseLowRank,
}


def make_inner_form(name: InnerFormName, r: int, inner_r: int, **values: Any) -> InnerForm:
    """The form called `name` with the fields `values` of `InnerForm`; `check_inner_form` checks it."""
    return FORMS[name](r, inner_r, **values)


def gated(subject: str) -> str:
    """The sentence, which begins with `subject`, for what cannot be done with a mixture of subspaces."""
    return (
        f"{subject} a mixture of subspaces, whose gates depend on the input, so that it is no change of weights: it cannot be "
        "merged, added to other adapters or exported as LoRA. Use it unmerged, from its native files, or train with "
        "num_subspaces=1."
    )


@lru_cache(maxsize=64)
def sparse_positions(r: int, entries: int, seed: int, device: torch.device) -> torch.Tensor:
    """(entries,): distinct positions in a flattened (r, r) matrix, in ascending order.

    They are the first in the order of an integer hash (splitmix64) of position and seed: the same on every machine and in every
    version, so that files need not contain them.
    """
    # A tensor that was made in inference mode could not be saved for backward later.
    with torch.inference_mode(False):
        state = (torch.arange(r * r, dtype=torch.int64) + (seed << 32)) * -0x61C8864680B583EB
        for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
            state = (state ^ ((state >> shift) & ((1 << (64 - shift)) - 1))) * factor
        return state.argsort(stable=True)[:entries].sort().values.to(device)


def _random(kind: InnerInit, shape: tuple[int, ...], std: float, generator: torch.Generator | None) -> torch.Tensor:
    """A matrix on the CPU with mean square std^2; sampled there, every device starts from the same values."""
    if kind == "uniform":
        return std * math.sqrt(3) * (2 * torch.rand(shape, generator=generator) - 1)
    normal = torch.randn(shape, generator=generator)
    if kind == "gaussian":
        return std * normal
    is_wide = shape[0] < shape[1]
    orthonormal = torch.linalg.qr(normal.T if is_wide else normal).Q
    return std * math.sqrt(max(shape)) * (orthonormal.T if is_wide else orthonormal)
