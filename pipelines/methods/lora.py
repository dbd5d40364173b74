"""LoRA: h = W x + s B A x,  s = alpha / r, or alpha / sqrt(r) with rsLoRA, by PEFT  [Hu et al. 2021; Kalajdzievski 2023]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.adapter_method import (
    ADAPTER_NAME,
    AdapterMethod,
    LowRankOptions,
    MethodTraining,
    Probe,
    TaskDefaults,
    option,
    tuner_layers,
)
from pipelines.lazy_modules import nn, no_grad, torch
from pipelines.option_checks import above_zero
from pipelines.run_options import Task

if TYPE_CHECKING:
    from peft import PeftConfig
    from peft.tuners.lora import LoraLayer

# Added to the diagonal of A A^T before it is inverted.
DAMPING = 1e-8
# PEFT's starts that leave the base weights as they are.
STARTS = (True, False, "gaussian", "orthogonal", "eva")


@dataclass
class LoraOptions(LowRankOptions):
    """Options of LoRA, and of methods that change its start or its forward pass."""

    use_rslora: bool = option(False, "scale by alpha / sqrt(rank) instead of alpha / rank, with alpha = rank by default")
    lora_plus_ratio: float = option(1.0, "LoRA+ ratio of the learning rates of B and A", "LoRA+ ratio")

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(self, "lora_plus_ratio")


@dataclass
class PlainLoraOptions(LoraOptions):
    """Options of LoRA alone."""

    lora_fa: bool = option(False, "LoRA-FA: only B is trained, and A keeps its start", "LoRA-FA (only B is trained)")


class Lora(AdapterMethod):
    """LoRA with a Gaussian A and a zero B.

    Options: the learning rates of LoRA+  [Hayou et al. 2024], the scaling of rsLoRA  [Kalajdzievski 2023], and LoRA-FA, which
    trains only B: m r parameters a layer, and A x is kept for the backward pass instead of x  [Zhang et al. 2023; see
    `ProjectedGradients`].
    """

    name = "lora"
    title = "LoRA"
    reference = "Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models"
    parameters = "rank * (m + n)"
    Options = PlainLoraOptions

    def __init__(self, options: LowRankOptions) -> None:
        super().__init__(options)
        # Subclasses have other options.
        self.freezes_A = getattr(options, "lora_fa", False)
        if self.freezes_A:
            self.parameters = "rank * m"
            # A is a whole tensor on every process.
            self.can_be_sharded = False

    @classmethod
    def defaults(cls, task: Task, built_in: bool) -> TaskDefaults:
        """The usual rank and learning rate of DreamBooth on SDXL, and those of CLIP-LoRA for classification."""
        return TaskDefaults(1e-4, {"rank": 4}) if task == "subject" else TaskDefaults(2e-4, {"rank": 2})

    def config(self, target_modules: list[str], exclude_modules: str | None = None) -> PeftConfig:
        """PEFT's configuration; the scaling is 1 unless alpha is given."""
        return lora_config(self.options, target_modules, exclude_modules, self.options.use_rslora)

    @classmethod
    def inject(cls, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        """Add the adapter.

        Raises: ValueError for a file of PEFT whose start PEFT would subtract from the base weights, for all other adapters too.
        """
        if config.init_lora_weights not in STARTS:
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} would change the base weights. Convert the adapter with PEFT's "
                "save_pretrained(..., path_initial_model_for_weight_conversion=...)."
            )
        super().inject(model, config, adapter_name)

    def attach(self, model: nn.Module, config: PeftConfig, adapter_name: str, generator: torch.Generator) -> None:
        """Add the adapter; with LoRA-FA, A is frozen."""
        super().attach(model, config, adapter_name, generator)
        if self.freezes_A:
            for layer in tuner_layers(model).values():
                freeze_A(layer, adapter_name)

    def start(self, model: nn.Module, probe: Probe, adapter_name: str) -> None:
        """Sample A from the probe's generator; LoRA needs neither activations nor losses."""
        from diffusers.training_utils import cast_training_params

        cast_training_params(model, dtype=torch.float32)
        for layer in tuner_layers(model).values():
            A = layer.lora_A[adapter_name].weight
            with torch.no_grad():
                A.copy_(torch.randn(A.shape, generator=probe.generator) / len(A))

    def training(self, models: Sequence[nn.Module], total_steps: int) -> MethodTraining:
        """With LoRA-FA, the projection of its gradients."""
        return (ProjectedGradients if self.freezes_A else MethodTraining)(models, total_steps)

    def learning_rate_factor(self, parameter_name: str) -> float:
        """`lora_plus_ratio` for B, 1 for A."""
        return self.options.lora_plus_ratio if ".lora_B." in parameter_name else 1.0

    @classmethod
    def allows_any_scale(cls, config: PeftConfig) -> bool:
        """True for LoRA. False for DoRA, whose row norms PEFT cannot scale."""
        return not config.use_dora


def lora_config(
    options: LowRankOptions, target_modules: list[str], exclude_modules: str | None, use_rslora: bool = False
) -> PeftConfig:
    """PEFT's configuration of plain LoRA; the scaling is 1 unless alpha is given."""
    # Imported here, as `--help` needs only the options above.
    from peft import LoraConfig

    return LoraConfig(
        r=options.rank,
        lora_alpha=options.rank if options.alpha is None else options.alpha,
        lora_dropout=options.dropout,
        use_rslora=use_rslora,
        init_lora_weights="gaussian",
        target_modules=target_modules,
        exclude_modules=exclude_modules,
    )


def freeze_A(layer: LoraLayer, adapter_name: str) -> None:
    """Make A of `layer` a float32 buffer: PEFT makes parameters trainable again whenever adapters are switched."""
    module = layer.lora_A[adapter_name]
    weight = module.weight.data.float()
    del module.weight
    module.register_buffer("weight", weight)


class ProjectedGradients(MethodTraining):
    """The gradients of LoRA-FA, with which a step of B comes closest to one of W  [PEFT's `create_lorafa_optimizer`].

        g_B <- g_B (A A^T + damping I)^-1 / s^2,   the minimum over g of || s g A - dL/dW ||_F,  since g_B = s dL/dW A^T

    Here it comes before the run's own optimiser, whichever that is; PEFT has an AdamW of its own, and inverts in bfloat16.
    """

    @no_grad
    def after_backward(self, step: int) -> None:
        """Replace the gradient of B (m, r) of every layer."""
        for layer in (layer for model in self.models for layer in tuner_layers(model).values()):
            B = layer.lora_B[ADAPTER_NAME].weight
            # A text encoder that is no longer trained has no gradients.
            if B.grad is None:
                continue
            A, scale = layer.lora_A[ADAPTER_NAME].weight.flatten(1), layer.scaling[ADAPTER_NAME]
            gram = A @ A.T + DAMPING * torch.eye(len(A), device=A.device)
            B.grad.copy_(torch.linalg.solve(gram, B.grad.flatten(1), left=False).view_as(B) / scale**2)


METHOD = Lora
