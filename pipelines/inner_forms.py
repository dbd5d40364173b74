"""The forms of NoRA and their checks, before the adapter library is imported."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pipelines.errors import InputError

LARGEST_FLOAT32 = 3.4028234663852886e38
# As in `nora_vision`, which is not imported here.
INNER_FORMS = (
    "serial", "parallel", "a_side", "b_side", "full", "block_diagonal", "diagonal", "symmetric", "antisymmetric",
    "sparse_low_rank",
)  # fmt: skip
INNER_INITS = ("zero", "gaussian", "uniform", "orthogonal", "singular_values")
OUTER_SCALINGS = ("B", "A", "split", "mean", "none")
CALIBRATIONS, INNER_DTYPES, OUTER_DTYPES = ("data", "base"), ("float32", "float16", "int8"), ("base", "int4")
WEIGHTINGS = ("none", "diagonal", "quantile", "trimmed", "huber", "diagonal_low_rank", "covariance")
GRADIENT_SCALES = ("mean", "gradient")
BASES = ("weight", "gradient", "mixed")
NOT_DIAGONAL = ("diagonal_low_rank", "covariance")
# Those whose size does not depend on the inner rank.
WITHOUT_INNER_RANK = ("full", "block_diagonal", "diagonal")
DIVIDED, SPARSE = "block_diagonal", "sparse_low_rank"


def check_scaling(alpha: float | None) -> None:
    """Raises: InputError unless alpha divided by a rank is finite in float32; None is allowed."""
    if alpha is not None and not 0 < alpha <= LARGEST_FLOAT32:
        raise InputError(f"alpha must be above 0 and finite in float32, got {alpha}.")


def check_slice(text: str, basis: str) -> None:
    """Raises: InputError unless `text` is i/n with i in [1, n], and 1/1 for another basis than the weight."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise InputError(f"outer_slice must be i/n with i in [1, n], such as 2/4 for the second of four, got {text!r}.")
    if int(match[2]) > 1 and basis != "weight":
        raise InputError(f"outer_slice must be 1/1 for the basis {basis!r}, got {text}. Set basis to weight.")


def check_inner_form(options: Any) -> None:
    """Check that the fields of a form of `options` fit together; without a rank nothing is checked.

    Raises: InputError naming the value and its range.
    """
    if options.rank is None:
        return
    for sentence, is_wrong in (*_rank_errors(options), *_form_errors(options), *_subspace_errors(options)):
        if is_wrong:
            raise InputError(sentence)


def check_combinations(options: Any) -> None:
    """Raises: InputError if fields of NoRA's `options` that need others do not have them."""
    is_plain = options.inner_form == "serial" and options.num_subspaces == 1
    if options.preserve_output and options.inner_dtype != "float32":
        raise InputError(
            "inner_dtype must be float32 with preserve_output, whose weight change is the small difference of two products, got "
            f"{options.inner_dtype!r}. Leave out preserve_output."
        )
    if options.parameter_budget is not None and not is_plain:
        raise InputError("parameter_budget needs inner_form serial and num_subspaces 1. Leave parameter_budget out.")
    if options.loftq_start and (options.preserve_output or not is_plain):
        raise InputError(
            "loftq_start needs inner_form serial and num_subspaces 1, and cannot be used with preserve_output, which subtracts "
            "the start of the change. Leave it out, or the others."
        )


def _rank_errors(options: Any) -> Iterator[tuple[str, bool]]:
    rank, inner_r, is_antisymmetric = options.rank, options.inner_r, options.inner_form == "antisymmetric"
    yield f"inner_r must be in [1, r={rank}], got {inner_r}. Lower inner_r or raise rank.", inner_r > rank
    yield f"rank must be at least 2 for inner_form antisymmetric, got {rank}.", is_antisymmetric and rank < 2
    sentence = "inner_init must not be singular_values for inner_form antisymmetric, whose diagonal is zero."
    yield sentence, is_antisymmetric and options.inner_init == "singular_values"


def _form_errors(options: Any) -> Iterator[tuple[str, bool]]:
    form, rank, blocks, entries = options.inner_form, options.rank, options.inner_blocks, options.sparse_entries
    sentence = f"inner_blocks must be at least 2 and divide rank {rank}, got {blocks}. For one block use inner_form full."
    yield sentence, form == DIVIDED and (blocks < 2 or rank % blocks != 0)
    yield f"inner_blocks needs inner_form {DIVIDED}, got {blocks} with {form}.", form != DIVIDED and blocks != 1
    sentence = f"sparse_entries must be in [1, rank^2 = {rank * rank}], got {entries}."
    yield sentence, form == SPARSE and not 1 <= entries <= rank * rank
    yield f"sparse_entries needs inner_form {SPARSE}, got {entries} with {form}.", form != SPARSE and entries != 0


def _subspace_errors(options: Any) -> Iterator[tuple[str, bool]]:
    form, rank, count, blocks = options.inner_form, options.rank, options.num_subspaces, options.inner_blocks
    if count == 1:
        return
    yield f"num_subspaces must divide rank {rank}, got {count}.", rank % count != 0
    sentence = f"num_subspaces {count} needs inner_form serial, or {DIVIDED} with inner_blocks a multiple of it, got {form}"
    yield f"{sentence} with inner_blocks {blocks}.", form != "serial" and not (form == DIVIDED and blocks % count == 0)
    sentence = f"inner_r must be in [1, rank / num_subspaces = {rank // count}], got {options.inner_r}."
    yield f"{sentence} Lower it or num_subspaces, or raise rank.", form == "serial" and options.inner_r * count > rank
