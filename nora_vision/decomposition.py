"""Activation-weighted singular value decomposition, which gives NoRA's frozen outer factors."""

from __future__ import annotations

from typing import Literal, get_args

import torch

Method = Literal["auto", "exact", "krylov", "subspace"]
# The algorithm of `reproducible_awsvd`, and that of earlier versions (`legacy`).
CURRENT, EARLIER = "block Krylov", "subspace iteration"
POWER_ITERATIONS = 2
MIN_BLOCK = 8
# The last block of the Krylov space is left out if the one before has less energy than this, relative to its predecessor.
DECAY = 0.35
# Groups of rows of a Gram matrix. Only its lower triangle is computed, but for the squares on the diagonal.
GRAM_PARTS = 4


@torch.no_grad()
def awsvd(
    weight: torch.Tensor,
    activation_scale: torch.Tensor,
    rank: int,
    *,
    method: Method = "auto",
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Best rank-`rank` factors of `weight` in the activation-weighted norm.

    W diag(s) = U S V^T;  B = U_r S_r,  A = V_r^T diag(1/s)      [NoRA, AwSVD, eqs. 1-5]

    Args:
        weight: (..., out_features, in_features); leading dimensions are a batch.
        activation_scale: (..., in_features), strictly positive.
        rank: number of singular triples kept.
        method: "exact" decomposes in full. "krylov" uses a block Krylov space [Musco, Musco 2015, alg. 2], whose error is within
            1% of optimal even on a flat spectrum. "subspace" uses subspace iteration [Halko, Martinsson, Tropp 2011, alg. 4.4],
            which is slower; "krylov" falls back to it where its Gram matrices are ill-conditioned, for example for repeated
            singular values. "auto" is "krylov" if that is cheaper than "exact".
        generator: for the random start of "krylov" and "subspace", on the CPU; a fixed seed if None.
    Returns: B (..., out_features, rank), A (..., rank, in_features), float32 (float64 for a float64 weight). The sign of
        each singular vector is chosen so that the entry of V of largest magnitude is positive.
    Raises: ValueError if `rank` exceeds min(out_features, in_features), a shape does not fit, or a value is not finite or not
        positive.
    """
    _check(weight, activation_scale, rank, method)
    # Apple's GPUs have no float64, in which the small matrices of "krylov" are factorised.
    device = torch.device("cpu") if weight.device.type == "mps" else weight.device
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    matrix, scale = weight.to(device, dtype), activation_scale.to(device, dtype).unsqueeze(-2)
    left, right = _decomposed(matrix, scale, rank, method, generator)
    largest = right.gather(-1, right.abs().argmax(dim=-1, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(dtype)
    return (left * signs.mT).to(weight.device), (right * signs / scale).to(weight.device)


def reproducible_awsvd(
    weight: torch.Tensor,
    activation_scale: torch.Tensor | None,
    rank: int,
    outer_slice: tuple[int, int] = (1, 1),
    *,
    legacy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`awsvd` in float64, which gives the same factors on every machine: compact files leave them out and recompute them.

    In float32, another number of threads changes B C A by about 1e-4 of its norm, because close singular vectors rotate; in
    float64 by about 1e-12, and 3e-10 for singular values i^-2.

    Args:
        weight: (out_features, in_features), of any dtype.
        activation_scale: (in_features,), strictly positive, or None for the plain SVD.
        outer_slice: (i, n) decomposes at rank n * rank and returns the i-th of n slices. With S = diag(activation_scale), two
            slices i != j have B_i^T B_j = 0 and A_i S^2 A_j^T = 0.
        legacy: use subspace iteration for all but small matrices, as earlier versions did: their compact files need it.
    Returns: B (out_features, rank), A (rank, in_features), float64.
    """
    # Apple's GPUs have no float64.
    weight = (weight.cpu() if weight.device.type == "mps" else weight).double()
    scale = weight.new_ones(weight.shape[1]) if activation_scale is None else activation_scale.to(weight)
    number, count = outer_slice
    method: Method = "auto"
    if legacy:
        method = "subspace" if 3 * _subspace_size(weight, count * rank) <= min(weight.shape) else "exact"
    B, A = awsvd(weight, scale, count * rank, method=method)
    # Every n-th direction, so that all slices have similar singular values.
    return B[:, number - 1 :: count].contiguous(), A[number - 1 :: count].contiguous()


def _decomposed(
    weight: torch.Tensor, scale: torch.Tensor, rank: int, method: Method, generator: torch.Generator | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """U_r S_r (..., m, rank) and V_r^T (..., rank, n) of W diag(s), with W (..., m, n) and s (..., 1, n)."""
    if method == "auto":
        width, blocks = _krylov_size(weight, rank)
        method = "krylov" if 3 * width * blocks <= 2 * min(weight.shape[-2:]) else "exact"
    if method == "krylov":
        left, right, reliable = _block_krylov(weight, scale, rank, generator)
        if reliable.all():
            return left, right
    # Not before, for speed: one NaN or infinite entry makes Gram matrices of the Krylov space NaN, and it unreliable.
    if not is_finite(weight):
        raise ValueError("weight must be finite, got NaN or infinite entries.")
    if method == "exact":
        return _exact(weight * scale, rank)
    if method == "subspace":
        return _subspace_iteration(weight * scale, rank, generator)
    left[~reliable], right[~reliable] = _subspace_iteration((weight * scale)[~reliable], rank, generator)
    return left, right


def _exact(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """U_r S_r (..., m, rank) and V_r^T (..., rank, n) of `matrix` (..., m, n)."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[..., :rank] * S[..., None, :rank], Vh[..., :rank, :]


def _subspace_size(matrix: torch.Tensor, rank: int) -> int:
    # With oversampling by half of the rank, two power iterations leave an error of about 1% above the optimum on a flat spectrum.
    return min(rank + max(rank // 2, 16), *matrix.shape[-2:])


def _subspace_iteration(matrix: torch.Tensor, rank: int, generator: torch.Generator | None) -> tuple[torch.Tensor, torch.Tensor]:
    """U_r S_r (..., m, rank) and V_r^T (..., rank, n) of `matrix` (..., m, n), approximately."""
    # Sampled on the CPU, so that every device starts from the same subspace.
    generator = generator or torch.Generator().manual_seed(0)
    size = _subspace_size(matrix, rank)
    start = torch.randn(matrix.shape[-1], size, generator=generator, dtype=matrix.dtype).to(matrix.device)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix.mT @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    # The SVD of the tall matrix is twice as fast as that of the wide one.
    V, S, Uh = torch.linalg.svd(matrix.mT @ basis, full_matrices=False)
    return (basis @ Uh.mT)[..., :rank] * S[..., None, :rank], V.mT[..., :rank, :]


def _krylov_size(matrix: torch.Tensor, rank: int) -> tuple[int, int]:
    """Rows of a block, and blocks at most. With these the error is within 1% of optimal on every spectrum of the benchmark.

    A flat spectrum needs most; its tail weighs less if `rank` is not small relative to the matrix.
    """
    return max(-(-rank // 2), MIN_BLOCK), 5 if min(matrix.shape[-2:]) >= 20 * rank else 6


def _block_krylov(
    weight: torch.Tensor, scale: torch.Tensor, rank: int, generator: torch.Generator | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U_r S_r (..., m, rank) and V_r^T (..., rank, n) of M = W diag(s), approximately, and where they are reliable (...).

    The rows of V span Omega M, Omega M (M^T M), Omega M (M^T M)^2, ... for random signs Omega. Of all rank-r matrices with these
    rows the best is (V M^T)^T E E^T V, where the columns of E are the leading eigenvectors of (V M^T) (V M^T)^T.

    Args:
        weight: W (..., m, n).
        scale: s (..., 1, n), by which the small blocks are multiplied instead of W.
    """
    # Integers sampled on the CPU: every machine and device starts from exactly the same block.
    generator = generator or torch.Generator().manual_seed(0)
    width, blocks = _krylov_size(weight, rank)
    *batch, m, n = weight.shape
    basis, product = (weight.new_empty(*batch, blocks * width, size) for size in (n, m))
    block = (2 * torch.randint(2, (width, m), generator=generator) - 1).to(weight)
    conditions = []
    for start in range(0, blocks * width, width):
        if start == (blocks - 1) * width and _decays(product[..., :start, :], width):
            basis, product = basis[..., :start, :], product[..., :start, :]
            break
        if start:
            block, condition = _orthonormal_rows(block, block[..., :0, :])
            conditions.append(condition)
        block, condition = _orthonormal_rows(block @ weight * scale, basis[..., :start, :])
        conditions.append(condition)
        basis[..., start : start + width, :] = block
        block = (block * scale) @ weight.mT
        product[..., start : start + width, :] = block
    reliable = (torch.stack(conditions) > _tolerance(weight)).all(dim=0)
    E, accurate = _leading_eigenvectors(product, rank)
    return (E @ product).mT, E @ basis, reliable & accurate


def _decays(product: torch.Tensor, width: int) -> bool:
    """Whether the last block of rows of `product` (..., k, m), of `width` rows, has far less energy than the one before.

    The singular values then decay so fast that one more block lowers the error by less than 1%. In a batch, of all matrices.
    """
    before, last = product[..., -2 * width :, :].square().unflatten(-2, (2, width)).sum(dim=(-2, -1)).unbind(dim=-1)
    return bool((last < DECAY * before).all())


def _leading_eigenvectors(product: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The leading eigenvectors of Y Y^T, as rows (..., rank, k), for Y (..., k, m), and whether they are accurate (...).

    The eigenvalues are squares of singular values. Where rounding errors of the first would hide the last, float64 is used.
    """
    lengths = product.square().sum(dim=-1)
    # The squared length of the rank-th longest row is about the rank-th eigenvalue. If float32 would hide it, float64 is used.
    graded = (lengths.topk(rank).values[..., -1] < _tolerance(product) * lengths.amax(dim=-1)).any()
    for dtype in dict.fromkeys((torch.float64 if graded else product.dtype, torch.float64)):
        gram = _lower_gram(product.to(dtype))
        finite = gram.isfinite().all(dim=-1, keepdim=True).all(dim=-2, keepdim=True)
        values, vectors = torch.linalg.eigh(torch.where(finite, gram, torch.eye(gram.shape[-1]).to(gram)))
        accurate = finite[..., 0, 0] & (values[..., -rank] > _tolerance(gram) * values[..., -1])
        if accurate.all():
            break
    return vectors[..., -rank:].flip(-1).mT.to(product.dtype), accurate


def _lower_gram(rows: torch.Tensor) -> torch.Tensor:
    """The lower triangle of Y Y^T for `rows` Y (..., k, m), with zeros in most of the upper one, which `eigh` does not read."""
    size = rows.shape[-2]
    gram, step = rows.new_zeros(*rows.shape[:-1], size), -(-size // GRAM_PARTS)
    for start in range(0, size, step):
        stop = min(start + step, size)
        gram[..., start:stop, :stop] = rows[..., start:stop, :] @ rows[..., :stop, :].mT
    return gram


def _orthonormal_rows(block: torch.Tensor, basis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal rows (..., k, n) that span those of `block` less their part in `basis` (..., j, n), and their condition (...).

    By Cholesky QR in mixed precision [Yamazaki, Tomov, Dongarra 2015], which needs a well-conditioned Gram matrix. The condition
    is the smallest diagonal entry of its Cholesky factor relative to the rows of `block`, and NaN or 0 if it has none. Where the
    basis takes most of a row, a second pass removes what rounding left of it.
    """
    identity = torch.eye(block.shape[-2], dtype=torch.float64, device=block.device)
    alone, conditions = basis.shape[-2] == 0, []
    for last in (alone, True):
        removed = 0.0
        if not alone:
            components = block @ basis.mT
            block = block - components @ basis
            removed = components.square().sum(dim=(-2, -1), dtype=torch.float64)
        rows = block.double()
        gram = rows @ rows.mT
        factor, info = torch.linalg.cholesky_ex(gram)
        # The mean squared length of the rows before, by Pythagoras.
        squared = (gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1) + removed) / block.shape[-2]
        smallest = factor.diagonal(dim1=-2, dim2=-1).amin(dim=-1)
        conditions.append(torch.where(info == 0, smallest / squared.sqrt(), 0.0))
        block = torch.linalg.solve_triangular(factor, identity, upper=False).to(block.dtype) @ block
        if last or (conditions[0] > 0.01).all():
            break
    return block, torch.stack(conditions).amin(dim=0)


def _tolerance(matrix: torch.Tensor) -> float:
    """The smallest size, relative to the largest, that rounding errors leave meaningful."""
    return torch.finfo(matrix.dtype).eps ** (2 / 3)


def _check(weight: torch.Tensor, activation_scale: torch.Tensor, rank: int, method: str) -> None:
    if weight.ndim < 2:
        raise ValueError(f"weight must be a matrix (..., out_features, in_features), got shape {tuple(weight.shape)}.")
    *batch, out_features, in_features = weight.shape
    expected = (*batch, in_features)
    if activation_scale.shape != expected:
        raise ValueError(f"activation_scale must have shape {expected}, got {tuple(activation_scale.shape)}.")
    if not 1 <= rank <= min(out_features, in_features):
        allowed = f"[1, {min(out_features, in_features)}] for a {out_features} x {in_features} weight"
        raise ValueError(f"rank must be in {allowed}, got {rank}.")
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}.")
    if not (torch.isfinite(activation_scale) & (activation_scale > 0)).all():
        raise ValueError(f"activation_scale must be finite and above 0, got a smallest entry of {activation_scale.min().item()}.")


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all entries of a tensor (...), which must have at least one, are finite.

    One pass without a temporary tensor, and so ten times as fast as `torch.isfinite(tensor).all()`.
    """
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())
