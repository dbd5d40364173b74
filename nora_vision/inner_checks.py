"""Which forms of the core M, ranks and starts fit together."""

from __future__ import annotations

from .inner import InnerForm, InnerFormName, InnerInit


def check_inner_form(name: InnerFormName, form: InnerForm, inner_init: InnerInit, layer_name: str | None = None) -> None:
    """Check that the values of `form`, called `name`, fit together for the layer `layer_name`, or for all with these ranks.

    Raises: ValueError naming the value, its range and the layer.
    """
    where = "" if layer_name is None else f" for {layer_name!r}"
    for wrong, sentence in (*_form_errors(name, form, inner_init, where), *_subspace_errors(name, form, where)):
        if wrong:
            raise ValueError(sentence)


def _form_errors(name: InnerFormName, form: InnerForm, inner_init: InnerInit, where: str) -> list[tuple[bool, str]]:
    """Whether each condition is violated, and the sentence for it."""
    r, blocks, entries, seed = form.r, form.inner_blocks, form.sparse_entries, form.sparse_seed
    in_blocks, is_sparse = name == "block_diagonal", name == "sparse_low_rank"
    return [
        (
            name == "antisymmetric" and inner_init == "singular_values",
            "inner_init must not be 'singular_values' for inner_form='antisymmetric', whose diagonal is zero.",
        ),
        (name == "antisymmetric" and r < 2, f"r must be at least 2{where} for inner_form='antisymmetric', got {r}."),
        (
            in_blocks and (blocks < 2 or r % blocks != 0),
            f"inner_blocks must be at least 2 and divide r={r}{where}, got {blocks}. For one block use inner_form='full'.",
        ),
        (
            is_sparse and (type(entries) is not int or not 1 <= entries <= r * r),
            f"sparse_entries must be an integer in [1, r^2={r * r}]{where}, got {entries!r}.",
        ),
        (not in_blocks and blocks != 1, f"inner_blocks needs inner_form='block_diagonal', got {blocks} with {name!r}."),
        (not is_sparse and entries != 0, f"sparse_entries needs inner_form='sparse_low_rank', got {entries} with {name!r}."),
        (type(seed) is not int or not 0 <= seed < 2**31, f"sparse_seed must be an integer in [0, 2^31), got {seed!r}."),
    ]


def _subspace_errors(name: InnerFormName, form: InnerForm, where: str) -> list[tuple[bool, str]]:
    r, subspaces, inner_r = form.r, form.num_subspaces, form.inner_r
    if subspaces == 1:
        return []
    in_slices = name == "serial" or (name == "block_diagonal" and form.inner_blocks % subspaces == 0)
    return [
        (r % subspaces != 0, f"num_subspaces must divide r={r}{where}, got {subspaces}."),
        (
            not in_slices,
            f"num_subspaces={subspaces} needs inner_form='serial', or 'block_diagonal' with inner_blocks a multiple of it, got "
            f"{name!r} with inner_blocks={form.inner_blocks}.",
        ),
        (
            name == "serial" and inner_r * subspaces > r,
            f"inner_r must be in [1, r / num_subspaces = {r // subspaces}]{where}, got {inner_r}. Lower it or num_subspaces, or "
            "raise r.",
        ),
    ]
