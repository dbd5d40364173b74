"""NoRA: h = W x + alpha / inner_r B B' A' A x, the outer factors from activation-weighted SVD."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from pipelines import inner_forms as allowed
from pipelines.adapter_method import ADAPTER_NAME, AdapterMethod, MethodTraining, Probe, TaskDefaults, option, tuner_layers
from pipelines.errors import InputError
from pipelines.inner_forms import WITHOUT_INNER_RANK, check_combinations, check_inner_form, check_scaling, check_slice
from pipelines.lazy_modules import nn, torch
from pipelines.native_files import COMPACT, FULL
from pipelines.optimizers import ADAMW, MUON
from pipelines.option_checks import above_zero, at_least, below_one, check_choices, one_of, within
from pipelines.outer_factors import GradientBasis, cached_statistics, set_ranks_under_budget
from pipelines.progress import shown_by
from pipelines.run_options import Task

if TYPE_CHECKING:
    from peft import PeftConfig

    from nora_vision.calibration import BaseCalibration

logger = logging.getLogger(__name__)


# In the state of a checkpoint.
DECOMPOSITION = "decomposition"
# Options that are fields of `NoraConfig` too.
CONFIG_FIELDS = (
    "dropout", "inner_init", "inner_form", "inner_blocks", "sparse_entries", "num_subspaces", "outer_scaling", "preserve_output",
    "outer_slice", "weighting", "basis",
)  # fmt: skip


@dataclass
class NoraOptions:
    """Options of NoRA."""

    rank: int | None = option(None, "outer rank")
    inner_r: int = option(
        8,
        "inner rank, at most the outer rank, for 2 * rank * inner_r trained parameters a layer",
        "NoRA inner_r (inner rank)",
    )
    alpha: float | None = option(None, "numerator of the scaling alpha / inner_r (default: the scaling is 1)")
    dropout: float = option(0.0, "dropout probability within the adapter")
    inner_init: str = option(
        "zero",
        "initialisation of the inner factors: zero, gaussian, uniform, orthogonal, or singular_values (those that the outer "
        "factors do not contain)",
        "NoRA inner_init (initialisation of the inner factors)",
        choices=allowed.INNER_INITS,
    )
    inner_form: str = option(
        "serial",
        "form of the trained r x r matrix M between the outer factors: serial (B' A'), parallel (B' P + P^T A'), a_side, b_side, "
        "full, block_diagonal, diagonal, symmetric, antisymmetric or sparse_low_rank; see docs/nora-forms.md for the equations",
        "NoRA inner_form (form of the trained matrix)",
        choices=allowed.INNER_FORMS,
    )
    inner_blocks: int = option(
        1,
        "number of blocks of inner_form block_diagonal, for rank^2 / inner_blocks parameters",
        "NoRA inner_blocks (number of blocks on the diagonal)",
    )
    sparse_entries: int = option(
        0,
        "number of entries of the sparse matrix of inner_form sparse_low_rank, so many more parameters",
        "NoRA sparse_entries (entries of the sparse matrix)",
    )
    num_subspaces: int = option(
        1,
        "above 1, the outer directions are so many slices with a gate each that depends on the input, for num_subspaces * rank "
        "more parameters; such a mixture of subspaces cannot be merged or exported as LoRA",
        "NoRA num_subspaces (gated subspaces; above 1 there is no export as LoRA)",
    )
    outer_scaling: str = option(
        "B",
        "place of the weight's singular values in the outer factors: B, A, split (square roots on both), mean (only their mean, "
        "on B) or none; none with inner_init singular_values is the form of the preprint, arXiv 2408.10280",
        "NoRA outer_scaling (place of the singular values)",
        choices=allowed.OUTER_SCALINGS,
    )
    preserve_output: bool = option(
        False,
        "subtract the initial weight change, so that training starts at the base model with inner_init gaussian too",
        "NoRA preserve_output (start at the base model)",
    )
    outer_slice: str = option(
        "1/1",
        "i/n for the i-th of n slices of the weight's singular directions: adapters in other slices with the same n, rank and "
        "activation statistics have orthogonal weight changes",
        "NoRA outer_slice (i/n; adapters in other slices do not overlap)",
    )
    calibration: str = option(
        "data",
        "inputs of the activation scale: the training data, or base for fixed ones, without any of yours; the compact file is "
        "then smaller, and the scale is computed again on loading",
        "NoRA calibration (inputs of the activation scale)",
        choices=allowed.CALIBRATIONS,
    )
    inner_dtype: str = option(
        "float32",
        "dtype of the trained factors in the compact file: float32, float16 or int8 with one step for each factor; they are "
        "rounded before they are measured and exported",
        "NoRA inner_dtype (of the trained factors in the compact file)",
        choices=allowed.INNER_DTYPES,
    )
    outer_dtype: str = option(
        "int4",
        "precision of outer factors that the base weights do not determine, such as those of basis gradient: int4, rounded to 4 "
        "bits before the training, so that the compact file can contain them, or base, that of the base weights",
        "NoRA outer_dtype (of stored outer factors)",
        choices=allowed.OUTER_DTYPES,
        before_it_existed="base",
    )
    weighting: str = option(
        "diagonal",
        "weighting of the outer factors by each layer's inputs: none, diagonal (root mean square), quantile, trimmed or huber "
        "(diagonals that few large values do not change), diagonal_low_rank, or covariance (8 n^2 bytes per layer of n inputs)",
        "NoRA weighting (of the outer factors)",
        choices=allowed.WEIGHTINGS,
    )
    basis: str = option(
        "weight",
        "what the outer factors are taken from: weight, gradient (of the training loss at the base model), or mixed",
        "NoRA basis (of the outer factors)",
        choices=allowed.BASES,
        before_it_existed="weight",
    )
    gradient_batches: int = option(
        0, "batches for the mean gradient of the bases gradient and mixed; 0 for those of one epoch", "Gradient batches"
    )
    gradient_share: float = option(0.5, "share of the directions that basis mixed takes from the gradient", "NoRA gradient share")
    gradient_scale: str = option(
        "mean",
        "size of the gradient's directions: mean (of the weight's leading singular values) or gradient (its singular values)",
        "NoRA gradient scale",
        choices=allowed.GRADIENT_SCALES,
    )
    loftq_start: bool = option(
        False,
        "with --quantize, start the inner factors from the part of the quantisation error that the outer factors contain, as "
        "LoftQ does with LoRA's",
        "NoRA loftq_start (compensate for quantisation)",
    )
    parameter_budget: int | None = option(
        None,
        "number of trained parameters of all layers together; each layer then has an outer rank from the energy of its weight, "
        "instead of --rank, and an inner rank from its gradient",
        "NoRA parameter_budget (chooses the ranks of each layer)",
    )
    lora_plus_ratio: float = option(1.0, "LoRA+ ratio of the learning rates of B and A", "LoRA+ ratio")

    def __post_init__(self) -> None:
        check_choices(self)
        at_least(self, 1, "rank", "inner_r", "inner_blocks", "num_subspaces", "parameter_budget")
        below_one(self, "dropout")
        check_scaling(self.alpha)
        check_slice(self.outer_slice, self.basis)
        check_inner_form(self)
        at_least(self, 0, "gradient_batches")
        above_zero(self, "lora_plus_ratio")
        within(self, 0, 1, "gradient_share")
        # The base calibration has the diagonal scale alone.
        one_of(self, ("diagonal",) if self.calibration == "base" else allowed.WEIGHTINGS, "weighting")
        check_combinations(self)


class NoraTraining(MethodTraining):
    """A training of NoRA whose trained factors are in `inner_dtype` in the compact file.

    A checkpoint holds the trained factors alone, and the outer ones are computed again from the weights. So it also names the
    algorithm that gave them: with those of another one, the same trained factors are another change.
    """

    def __init__(self, models: Sequence[nn.Module], total_steps: int, inner_dtype: str) -> None:
        super().__init__(models, total_steps)
        self.inner_dtype = inner_dtype

    def round_trained(self) -> None:
        """Round the trained factors to `inner_dtype`."""
        from nora_vision.rounding import round_inner_factors

        for model in self.models:
            round_inner_factors(model, self.inner_dtype, ADAPTER_NAME)

    def state_dict(self) -> dict[str, Any]:
        """The algorithm of the outer factors of each model."""
        from nora_vision.initialization import decomposition_of

        return {DECOMPOSITION: [decomposition_of(model, ADAPTER_NAME) for model in self.models]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compute the outer factors again by the algorithm in `state`; without one, by that of earlier versions.

        Raises: InputError if this version cannot do that.
        """
        from nora_vision.decomposition import EARLIER
        from nora_vision.initialization import use_decomposition

        for model, decomposition in zip(self.models, state.get(DECOMPOSITION, [EARLIER] * len(self.models)), strict=True):
            try:
                use_decomposition(model, ADAPTER_NAME, decomposition)
            except ValueError as error:
                raise InputError(
                    f"The checkpoint does not fit the outer factors: {error} Resume the run with the version of nora_vision that "
                    "began it, or start again in another --output_dir."
                ) from error


class Nora(AdapterMethod):
    """NoRA, initialised from the base model's activations on the training data."""

    name = "nora"
    title = "NoRA"
    reference = "NoRA: Nested Low-Rank Adaptation for Efficient Fine-Tuning Large Models, ICCV 2025"
    parameters = "2 * rank * inner_r"
    Options = NoraOptions
    rank_option = None
    uses_unquantized_weights = True

    @property
    def needs_quantization(self) -> bool:
        """Whether the start is the residual of quantisation."""
        return self.options.loftq_start

    @property
    def without_effect(self) -> frozenset[str]:
        """Options of gradients that are not computed, a rank that `parameter_budget` chooses, and those of factors not there."""
        has_budget, basis = self.options.parameter_budget is not None, self.options.basis
        unused = {
            "rank": has_budget,
            "inner_r": self.options.inner_form in WITHOUT_INNER_RANK and self.options.alpha is None,
            "lora_plus_ratio": self.options.inner_form in (*WITHOUT_INNER_RANK, "a_side"),
            "gradient_batches": basis == "weight" and not has_budget,
            "gradient_share": basis != "mixed",
            "gradient_scale": basis == "weight",
            "outer_dtype": self._is_recomputable,
        }
        return frozenset(name for name, is_unused in unused.items() if is_unused)

    @property
    def _is_recomputable(self) -> bool:
        """As `NoraConfig.is_recomputable`."""
        return self.options.basis == "weight" and self.options.weighting not in allowed.NOT_DIAGONAL

    @classmethod
    def defaults(cls, task: Task, built_in: bool) -> TaskDefaults:
        """For classification, v alone, in the gradient's directions; the file is smaller than that of LoRA at rank 2.

        NoRA's parameters do not grow with a layer's width, so few of them are best spent on the most important layers. Muon's
        steps use all directions of the inner factors alike, which AdamW's do not; this has been measured on the built-in model.
        """
        if task == "subject":
            return TaskDefaults(1e-4, {"rank": 32, "gradient_batches": 32})
        ranks = {"rank": 32, "inner_r": 8} if built_in else {"rank": 24, "inner_r": 16}
        return TaskDefaults(1e-3, {**ranks, "basis": "gradient"}, ["v"], MUON if built_in else ADAMW)

    def learning_rate(self, task: Task, built_in: bool, optimizer: str) -> float:
        """Except with Muon, lower for inner ranks above the default: a step changes B' A' by a sum over the inner rank.

        The sum times the scaling alpha / inner_r grows with alpha, which is the inner rank unless it is given.
        """
        defaults, alpha = self.defaults(task, built_in), self.options.alpha or self.options.inner_r
        if optimizer == MUON or self.options.inner_form in WITHOUT_INNER_RANK:
            return defaults.learning_rate
        return defaults.learning_rate * min(1.0, defaults.options.get("inner_r", NoraOptions.inner_r) / alpha)

    def config(self, target_modules: list[str], exclude_modules: str | None = None) -> PeftConfig:
        """The configuration; the scaling is 1 unless alpha is given. `start` computes the outer factors."""
        # Imported here, as `--help` needs only the options above.
        from nora_vision import NoraConfig

        options = self.options
        return NoraConfig(
            r=options.rank,
            inner_r=options.inner_r,
            alpha=options.alpha or options.inner_r,
            outer_init="awsvd",
            **{name: getattr(options, name) for name in CONFIG_FIELDS},
            outer_dtype="base" if self._is_recomputable else options.outer_dtype,
            target_modules=target_modules,
            exclude_modules=exclude_modules,
        )

    def prepare_dry_run(self, model: nn.Module, adapter_name: str) -> bool:
        """True: the calibration is a forward pass in batches no larger than a step's. Outer factors are zero until then.

        False for gradients of the weights, and for weightings that sum more than a vector for each layer, which need more memory.
        """
        forward_only = self.options.basis == "weight" and self.options.weighting in ("none", "diagonal")
        if not forward_only or self.options.parameter_budget is not None:
            return False
        for layer in tuner_layers(model).values():
            B, A = layer.nora_B[adapter_name], layer.nora_A[adapter_name]
            layer.set_outer_factors(adapter_name, torch.zeros_like(B), torch.zeros_like(A))
        return True

    def start(self, model: nn.Module, probe: Probe, adapter_name: str) -> None:
        """Compute the outer factors from the base model's activations, and gradients if needed, and sample the inner factors.

        What was computed is cached. On a quantised model the outer factors are those of the unquantised weights.

        Raises: InputError if the basis is from gradients and a layer is a convolution with groups; no loss is computed then.
        """
        from nora_vision import CheckpointWeights, initialize_nora_weights

        options = self.options
        statistics = cached_statistics(model, probe, adapter_name, options.weighting, options.calibration)
        factors = None
        if options.basis != "weight":
            basis = GradientBasis(
                self.title,
                options.weighting,
                1.0 if options.basis == "gradient" else options.gradient_share,
                options.gradient_scale,
                options.gradient_batches,
            )
            cache = probe.cache.with_name(f"{probe.cache.stem}-{self.name}-gradient.safetensors")
            factors = basis.cached(model, statistics, probe.losses, adapter_name, cache)
        with tqdm(desc="initialising NoRA layers", leave=False) as bar:
            more = {"generator": probe.generator, "progress": shown_by(bar), "calibration": options.calibration}
            if probe.unquantized is not None:
                more |= {"unquantized": CheckpointWeights(probe.unquantized), "loftq_start": options.loftq_start}
            initialize_nora_weights(model, statistics, adapter_name, factors=factors, **more)

    def training(self, models: Sequence[nn.Module], total_steps: int) -> MethodTraining:
        """A training whose factors are measured and saved as `inner_dtype` holds them."""
        return NoraTraining(models, total_steps, self.options.inner_dtype)

    def prepare_start(self, components: Mapping[str, nn.Module], probes: Mapping[str, Probe], adapter_name: str) -> None:
        """With `parameter_budget`, set the ranks of all layers. Raises: InputError if it is below rank 1 in every layer."""
        if self.options.parameter_budget is None:
            return

        def start(name: str) -> None:
            self.start(components[name], replace(probes[name], generator=torch.Generator()), adapter_name)

        set_ranks_under_budget(components, probes, adapter_name, self.options, start)

    def learning_rate_factor(self, parameter_name: str) -> float:
        """`lora_plus_ratio` for B', 1 for A'."""
        return self.options.lora_plus_ratio if ".nora_inner_B." in parameter_name else 1.0

    @classmethod
    def save(cls, components: Mapping[str, nn.Module], folder: Path, adapter_name: str) -> None:
        """Write the layouts `full` and, unless there are outer factors that it can neither leave out nor contain, `compact`."""
        from nora_vision.compact import not_recomputable
        from nora_vision.saving import save_adapter

        for name, model in components.items():
            save_adapter(model, folder / FULL / name, adapter_name)
            config = model.peft_config[adapter_name]
            if config.has_compact_layout:
                save_adapter(model, folder / COMPACT / name, adapter_name, compact=True)
            elif not getattr(config, "full_only_logged", False):
                config.full_only_logged = True
                logger.info(not_recomputable(config, f"The adapter of {name}"))

    @classmethod
    def load(cls, components: Mapping[str, nn.Module], folder: Path, adapter_name: str) -> None:
        """Load the adapter in `folder/<component>`, full or compact, onto each of `components`."""
        cls.load_calibrated(components, folder, adapter_name, {})

    @classmethod
    def load_calibrated(
        cls,
        components: Mapping[str, nn.Module],
        folder: Path,
        adapter_name: str,
        base_calibration: Mapping[str, BaseCalibration],
    ) -> None:
        """As `load`; compact files of `--calibration base` need the base calibration."""
        from nora_vision.loading import load_adapter

        for name, model in components.items():
            load_adapter(model, folder / name, adapter_name, base_calibration.get(name))

    @classmethod
    def conflicts(cls, model: nn.Module, adapter_name: str) -> list[str]:
        """A sentence for each adapter in a slice (`outer_slice`) that overlaps with this one's."""
        from nora_vision.slices import overlapping_slices

        pairs = ([other, adapter_name] for other in model.peft_config if other != adapter_name)
        return [sentence for pair in pairs for sentence in overlapping_slices(model, pair)]


METHOD = Nora
