"""The configuration of a NoRA adapter."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any, Literal, get_args

import torch
from peft import PeftConfig
from peft.utils.other import get_pattern_key

from .files import PLAIN_NAME
from .inner import InnerForm, InnerFormName, InnerInit, make_inner_form
from .inner_checks import check_inner_form
from .outer import OuterScaling
from .weighting import NOT_DIAGONAL, Weighting

Basis = Literal["weight", "gradient", "mixed"]
OuterInit = Literal["svd", "awsvd"]
OuterDtype = Literal["base", "int4"]
Calibration = Literal["data", "base"]


class NoraPeftType(str, Enum):  # noqa: UP042 - PEFT expects str() to give "NoraPeftType.NORA", as of its own type
    """NoRA's adapter type; PEFT's own enum of types cannot be extended."""

    NORA = "NORA"


@dataclass
class NoraConfig(PeftConfig):
    """Configuration of NoRA:  h = W x + s B M A x,  M = B' A',  s = alpha / inner_r.

    The outer factors A (r, in) and B (out, r) are a weighted SVD of W and stay frozen; the inner factors
    A' (inner_r, r) and B' (r, inner_r) are trained: 2 r inner_r parameters per layer. `inner_form` has other forms of M.

    By default (`inner_init="zero"` without `preserve_output`) training starts exactly at the base model, as in LoRA, the
    weight change has rank inner_r, and files need no second pair of inner factors. Gaussian A' and B' change the output
    at step 0 unless `preserve_output` subtracts their frozen start.

    The form of the preprint (arXiv 2408.10280), with orthonormal outer factors and inner ones that start from the square roots of
    the leading singular values, is outer_scaling="none" with inner_init="singular_values". Without `preserve_output`, the weight
    change at step 0 is s times the best approximation of W of rank inner_r.

    Raises: ValueError if a field is out of range.
    """

    r: int = field(default=64, metadata={"help": "Outer rank: the number of directions of each weight that can change."})
    inner_r: int = field(default=16, metadata={"help": "Inner rank, 1 <= inner_r <= r: the rank of the weight change."})
    alpha: float = field(default=16.0, metadata={"help": "Numerator of the scaling s = alpha / inner_r."})
    target_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata={"help": "Name endings of the layers to adapt, a regular expression over full names, or 'all-linear'."},
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Name endings, or a regular expression, of layers not to adapt."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained in full and saved with the adapter, such as a classifier head."}
    )
    dropout: float = field(
        default=0.0, metadata={"help": "Probability of dropping an entry of A x, the r-dimensional projected input."}
    )
    inner_init: InnerInit = field(
        default="zero",
        metadata={
            "help": "Start of the inner factors: 'zero' (Gaussian A', zero B'); 'gaussian', 'uniform' or 'orthogonal' (both "
            "random); or 'singular_values' (the square roots of the leading singular values that B and A do not contain, on "
            "the diagonals of both). `nora_vision.inner` has the starts of other forms."
        },
    )
    inner_std: float = field(
        default=0.02,
        metadata={"help": "Standard deviation of B', or of M in other forms, under a random inner_init; A' has 1 / sqrt(r)."},
    )
    inner_form: InnerFormName = field(
        default="serial",
        metadata={
            "help": "Form of the trained M: 'serial' (B' A'), 'parallel', 'a_side', 'b_side', 'full' (r x r), 'block_diagonal', "
            "'diagonal', 'symmetric', 'antisymmetric' or 'sparse_low_rank'; `nora_vision.inner` has the equations."
        },
    )
    inner_blocks: int = field(default=1, metadata={"help": "Number of blocks of inner_form='block_diagonal'; it divides r."})
    sparse_entries: int = field(
        default=0, metadata={"help": "Number of trained entries of the sparse matrix of inner_form='sparse_low_rank'."}
    )
    sparse_seed: int = field(default=0, metadata={"help": "Determines the positions of these entries."})
    num_subspaces: int = field(
        default=1,
        metadata={
            "help": "Above 1, the r directions are so many slices, each with a gate that depends on the input (a mixture of "
            "subspaces). Such an adapter cannot be merged or exported as LoRA."
        },
    )
    preserve_output: bool = field(
        default=False,
        metadata={
            "help": "Subtract the frozen start, B'A' - B'_0 A'_0: step 0 is the base model, the weight change has rank 2 inner_r."
        },
    )
    outer_init: OuterInit = field(
        default="svd",
        metadata={
            "help": "Origin of the outer factors: 'svd' of the weights on injection, or 'awsvd', set later by "
            "initialize_nora_weights(model, calibrate(model, run_model))."
        },
    )
    calibration: Calibration = field(
        default="data",
        metadata={
            "help": "Inputs of the activation scale of 'awsvd', set with it: the 'data' of the training, or the fixed inputs of "
            "a 'base' calibration, which computes the same scale again on loading."
        },
    )
    outer_slice: str = field(
        default="1/1",
        metadata={
            "help": "Slice of the singular directions: 'i/n' decomposes the weight at rank n r and keeps every n-th of its "
            "directions from the i-th on, so that adapters of other slices, with the same n, r and activation scale, have "
            "orthogonal changes."
        },
    )
    outer_scaling: OuterScaling = field(
        default="B",
        metadata={
            "help": "Place of the singular values of W: on 'B', on 'A', 'split' (square roots on both), 'mean' (only their mean, "
            "on B), or 'none' (orthonormal outer factors)."
        },
    )
    weighting: Weighting = field(
        default="diagonal",
        metadata={
            "help": "Weighting of the singular value decomposition by the inputs, with outer_init='awsvd': none, diagonal "
            "(root mean square of each input), quantile, trimmed or huber (diagonals that few large values do not change), "
            "diagonal_low_rank, or covariance (the full second-moment matrix)."
        },
    )
    basis: Basis = field(
        default="weight",
        metadata={
            "help": "Origin of the outer factors' directions: the 'weight', the 'gradient' of the training loss with respect to "
            "it, or some of each, 'mixed'."
        },
    )
    outer_dtype: OuterDtype = field(
        default="base",
        metadata={
            "help": "Precision of outer factors that the base weights do not determine: 'base', that of the base weights, or "
            "'int4', each direction rounded to 4 bits before the training, so that a compact file can contain them."
        },
    )
    init_weights: bool = field(
        default=True, metadata={"help": "False samples all factors at random: fast, but step 0 is not the base model."}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={
            "help": "Outer ranks other than r, by layer name ending or regular expression, or by '^' and the full name, which "
            "wins; each must match an adapted layer."
        },
    )
    inner_rank_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={"help": "Inner ranks other than inner_r, in the same way."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = NoraPeftType.NORA
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        choices = {
            "inner_init": InnerInit, "inner_form": InnerFormName, "outer_init": OuterInit, "outer_scaling": OuterScaling,
            "calibration": Calibration, "weighting": Weighting, "basis": Basis, "outer_dtype": OuterDtype,
        }  # fmt: skip
        for choice, allowed in choices.items():
            if getattr(self, choice) not in get_args(allowed):
                raise ValueError(f"{choice} must be one of {get_args(allowed)}, got {getattr(self, choice)!r}.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}.")
        # Above this, alpha / inner_r would be infinite in float32.
        if not 0 < self.alpha <= torch.finfo(torch.float32).max:
            raise ValueError(f"alpha must be above 0 and finite in float32, got {self.alpha}.")
        if not self.inner_std > 0:
            raise ValueError(f"inner_std must be above 0, got {self.inner_std}.")
        self._check_ranks()
        self._check_outer_factors()
        check_inner_form(self.inner_form, self._inner_form(self.r, self.inner_r), self.inner_init)

    def _check_outer_factors(self) -> None:
        if parse_slice(self.outer_slice)[1] > 1 and self.basis != "weight":
            raise ValueError(f"outer_slice must be 1/1 for the basis {self.basis!r}, got {self.outer_slice}. Set basis='weight'.")
        if self.outer_dtype == "int4" and self.is_recomputable:
            raise ValueError(
                "outer_dtype must be 'base' for outer factors that are computed again from the base weights, got 'int4'. Leave "
                "it out, or set basis='gradient'."
            )

    def _check_ranks(self) -> None:
        ranks = {"r": self.r, "inner_r": self.inner_r, "inner_blocks": self.inner_blocks, "num_subspaces": self.num_subspaces}
        ranks |= {f"rank_pattern[{key!r}]": value for key, value in self.rank_pattern.items()}
        ranks |= {f"inner_rank_pattern[{key!r}]": value for key, value in self.inner_rank_pattern.items()}
        for name, rank in ranks.items():
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {rank!r}.")
        for pattern in (*self.rank_pattern, *self.inner_rank_pattern):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} must be a layer name ending or a regular expression: {error}.") from error
        if self.inner_r > self.r:
            raise ValueError(f"inner_r must be in [1, r={self.r}], got {self.inner_r}. Lower inner_r or raise r.")

    def ranks_for(self, layer_name: str) -> tuple[int, int]:
        """The outer and inner rank of the layer called `layer_name`.

        Raises: ValueError if the inner rank exceeds the outer rank.
        """
        r = _rank_for(layer_name, self.rank_pattern, self.r)
        inner_r = _rank_for(layer_name, self.inner_rank_pattern, self.inner_r)
        if inner_r > r:
            raise ValueError(f"inner_r must be in [1, r={r}] for {layer_name!r}, got {inner_r}. Lower inner_r or raise r.")
        return r, inner_r

    @property
    def slice_and_count(self) -> tuple[int, int]:
        """`outer_slice` as the number of the slice, from 1, and the number of slices."""
        return parse_slice(self.outer_slice)

    def inner_form_for(self, layer_name: str) -> InnerForm:
        """The form of M for the layer called `layer_name`.

        Raises: ValueError naming the layer if a value does not fit its ranks.
        """
        form = self._inner_form(*self.ranks_for(layer_name))
        check_inner_form(self.inner_form, form, self.inner_init, layer_name)
        return form

    def _inner_form(self, r: int, inner_r: int) -> InnerForm:
        return make_inner_form(
            self.inner_form,
            r,
            inner_r,
            inner_std=self.inner_std,
            inner_blocks=self.inner_blocks,
            sparse_entries=self.sparse_entries,
            sparse_seed=self.sparse_seed,
            num_subspaces=self.num_subspaces,
        )

    def check_rank(self, shape: tuple[int, int], layer_name: str) -> None:
        """Check that the ranks of the layer `layer_name` fit its weight of shape (out, in).

        Raises: ValueError naming the layer if a rank is out of range.
        """
        r = self.inner_form_for(layer_name).r
        _, count = self.slice_and_count
        largest = min(shape) // count
        if r > largest:
            slices = f" and outer_slice={self.outer_slice!r}, which needs {count} r directions" if count > 1 else ""
            raise ValueError(
                f"r must be in [1, {largest}] for {layer_name!r}, whose weight is {shape[0]} x {shape[1]}, got {r}{slices}. "
                "Lower r, set a rank for this layer in rank_pattern, or add it to exclude_modules."
            )

    @property
    def is_recomputable(self) -> bool:
        """Whether the base weight and one scale for each input determine the outer factors, as a compact file needs."""
        # The base calibration computes the diagonal scale.
        scale_is_known = self.calibration == "data" or self.weighting == "diagonal"
        return self.basis == "weight" and self.weighting not in NOT_DIAGONAL and scale_is_known

    @property
    def has_compact_layout(self) -> bool:
        """Whether a compact file can leave the outer factors out, or contain them in 4 bits."""
        return self.is_recomputable or self.outer_dtype == "int4"

    def check_modules(self, names: Collection[str], model_name: str) -> None:
        """Check that every entry of target_modules and modules_to_save matches one of the module names `names`.

        Raises: ValueError naming those that do not.
        """
        if isinstance(self.target_modules, set):
            unknown = sorted(t for t in self.target_modules if not any(f".{n}".endswith(f".{t}") for n in names))
            if unknown:
                raise ValueError(
                    f"target_modules {unknown} match no module of {model_name}. Remove them or correct the spelling."
                )
        missing = sorted(s for s in self.modules_to_save or () if not any(n.endswith(s) for n in names))
        # With a task type PEFT adds the usual names of a classifier head, whether the model has them or not.
        if missing and self.task_type is None:
            raise ValueError(f"modules_to_save {missing} match no module of {model_name}. Remove them or correct the spelling.")

    def check_patterns(self, layer_names: Collection[str], model_name: str) -> None:
        """Check that every key of rank_pattern and inner_rank_pattern matches one of the adapted layers `layer_names`.

        Raises: ValueError naming the keys that do not.
        """
        for name, patterns in (("rank_pattern", self.rank_pattern), ("inner_rank_pattern", self.inner_rank_pattern)):
            full_names = {f"^{name}" for name in layer_names}
            searched = [key for key in patterns if key not in full_names]
            unknown = [key for key in searched if not any(get_pattern_key([key], layer) == key for layer in layer_names)]
            if unknown:
                some = ", ".join(map(repr, list(layer_names)[:3]))
                raise ValueError(
                    f"{name} {unknown} match no adapted layer of {model_name}, which has {len(layer_names)}: {some}"
                    f"{', ...' if len(layer_names) > 3 else ''}. Remove them or correct the spelling; a key is the end of a "
                    "layer's name or a regular expression."
                )

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values with sorted sets, so that equal configurations are saved as equal bytes."""
        return {key: sorted(value) if isinstance(value, set) else value for key, value in asdict(self).items()}


def _rank_for(layer_name: str, patterns: Mapping[str, int], default: int) -> int:
    """The rank of a layer, from the key with its full name, the first other key that matches, or `default`."""
    if f"^{layer_name}" in patterns:
        return patterns[f"^{layer_name}"]
    # With full names for all 560 layers of SDXL, PEFT's search would take minutes: it compiles every key for every layer.
    searched = [key for key in patterns if not (key.startswith("^") and PLAIN_NAME.fullmatch(key))]
    return patterns.get(get_pattern_key(searched, layer_name), default)


def parse_slice(text: str) -> tuple[int, int]:
    """The numbers i and n of the slice 'i/n'.

    Raises: ValueError unless i is in [1, n].
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"outer_slice must be i/n with i in [1, n], such as 2/4 for the second of four, got {text!r}.")
    return int(match[1]), int(match[2])
