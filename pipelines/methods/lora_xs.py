"""LoRA-XS: h = W x + s B R A x,  B = U_r diag(sigma_r) and A = V_r^T from the SVD of W are frozen, R (r x r) is trained
[Bałazy et al. 2024]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pipelines.adapter_method import AdapterMethod, LowRankOptions, MethodTraining, Probe, TaskDefaults
from pipelines.inner_forms import check_scaling
from pipelines.lazy_modules import nn
from pipelines.methods.nora import Nora
from pipelines.run_options import Task

if TYPE_CHECKING:
    from peft import PeftConfig


class LoraXsOptions(LowRankOptions):
    """Options of LoRA-XS."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scaling(self.alpha)


class LoraXs(Nora):
    """LoRA-XS: NoRA with one full r x r matrix, and the plain singular value decomposition. R starts at zero.

    The paper starts R at 1e-5 times a Gaussian, which is not distinguishable from zero.
    """

    name = "lora_xs"
    title = "LoRA-XS"
    reference = "Bałazy et al. 2024, LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters"
    samples_start = False
    needs_quantization = False
    without_effect: frozenset[str] = frozenset()
    parameters = "rank * rank"
    Options = LoraXsOptions
    # The same for all ranks, unlike NoRA's.
    learning_rate = AdapterMethod.learning_rate

    @classmethod
    def defaults(cls, task: Task, built_in: bool) -> TaskDefaults:
        """About NoRA's parameters on the same layers."""
        return TaskDefaults(3e-4, {"rank": 22}) if task == "subject" else TaskDefaults(1e-3, {"rank": 16})

    def config(self, target_modules: list[str], exclude_modules: str | None = None) -> PeftConfig:
        """NoRA's configuration with a full core; the outer factors are computed on injection."""
        from nora_vision import NoraConfig

        options = self.options
        return NoraConfig(
            r=options.rank,
            inner_r=options.rank,
            alpha=options.rank if options.alpha is None else options.alpha,
            dropout=options.dropout,
            inner_form="full",
            outer_init="svd",
            weighting="none",
            target_modules=target_modules,
            exclude_modules=exclude_modules,
        )

    def start(self, model: nn.Module, probe: Probe, adapter_name: str) -> None:
        """On a quantised model, take the outer factors from the unquantised weights; else they are those of injection."""
        from nora_vision import CheckpointWeights, initialize_nora_weights

        if probe.unquantized is not None:
            initialize_nora_weights(model, None, adapter_name, unquantized=CheckpointWeights(probe.unquantized))

    def prepare_start(self, components: Mapping[str, nn.Module], probes: Mapping[str, Probe], adapter_name: str) -> None:
        """Nothing: all layers have the same rank."""

    def prepare_dry_run(self, model: nn.Module, adapter_name: str) -> bool:
        """False: `start` changes only the adapters of quantised models."""
        return False

    def training(self, models: Sequence[nn.Module], total_steps: int) -> MethodTraining:
        """No hooks."""
        return MethodTraining(models, total_steps)

    def learning_rate_factor(self, parameter_name: str) -> float:
        """1 for R."""
        return 1.0


METHOD = LoraXs
