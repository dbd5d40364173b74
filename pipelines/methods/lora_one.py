"""LoRA-One: h = (W + s B A) x,  s = alpha / sqrt(r),  B and A from the first singular triples of -G  [Zhang et al. 2025].

    G: mean gradient of the loss at the pretrained W over a few batches;  -G = U diag(sigma) V^T
    B_0 = U_r diag(sqrt sigma) / sqrt(sigma_1 gamma),  A_0 = diag(sqrt sigma) V_r^T / sqrt(sigma_1 gamma)

so that s B_0 A_0 = (s / gamma) [-G]_r / ||G||_2: training starts one gradient step away from the base model. W is unchanged, and
the files are those of plain LoRA.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from pipelines.adapter_method import (
    ADAPTER_NAME,
    Losses,
    LowRankOptions,
    MethodTraining,
    Probe,
    TaskDefaults,
    adapters_off,
    option,
    tuner_layers,
)
from pipelines.gradients import cached_factors, check_no_groups, mean_gradients, origin_of
from pipelines.lazy_modules import nn, no_grad, torch
from pipelines.methods.lora import Lora, lora_config
from pipelines.option_checks import above_zero, at_least
from pipelines.run_options import Task

if TYPE_CHECKING:
    from peft import PeftConfig
    from peft.tuners.lora import LoraLayer

    from nora_vision.factors import Factors


@dataclass
class LoraOneOptions(LowRankOptions):
    """Options of LoRA-One."""

    alpha: float | None = option(None, "numerator of the scaling alpha / sqrt(rank)")
    gradient_batches: int = option(8, "batches for the mean gradient of the initialisation", "Gradient batches")
    gamma: float = option(
        128.0,
        "divisor of the initial weight change, whose largest singular value is scaling / gamma in every layer",
        "LoRA-One gamma (divisor of the initial change)",
    )

    precondition: bool = option(
        False,
        "precondition the gradients of A and B by each other's Gram matrices in each step",
        "LoRA-One precondition (precondition gradients)",
    )
    damping: float = option(
        1e-6, "added to the diagonals of the Gram matrices of precondition", "LoRA-One damping (of the preconditioner)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "gradient_batches")
        above_zero(self, "gamma", "damping")


class LoraOne(Lora):
    """LoRA that is initialised along the gradient of the training loss."""

    name = "lora_one"
    title = "LoRA-One"
    reference = "Zhang et al. 2025, LoRA-One: One-Step Full Gradient Could Suffice for Fine-Tuning Large Language Models"
    parameters = "rank * (m + n)"
    Options = LoraOneOptions
    starts_at_base = False

    @classmethod
    def defaults(cls, task: Task, built_in: bool) -> TaskDefaults:
        """The ranks of LoRA and the paper's alpha."""
        overrides = {"alpha": 16.0}
        return TaskDefaults(1e-4, {"rank": 4, **overrides}) if task == "subject" else TaskDefaults(2e-4, {"rank": 2, **overrides})

    def config(self, target_modules: list[str], exclude_modules: str | None = None) -> PeftConfig:
        """PEFT's configuration of plain LoRA with the scaling alpha / sqrt(r)."""
        return lora_config(self.options, target_modules, exclude_modules, use_rslora=True)

    def __init__(self, options: LoraOneOptions) -> None:
        super().__init__(options)
        # Gram matrices need whole factors, which FSDP would split.
        self.can_be_sharded = not options.precondition

    @property
    def without_effect(self) -> frozenset[str]:
        """The damping, without the preconditioner."""
        return frozenset() if self.options.precondition else frozenset({"damping"})

    def training(self, models: Sequence[nn.Module], total_steps: int) -> MethodTraining:
        """With `precondition`, the preconditioner."""
        if not self.options.precondition:
            return super().training(models, total_steps)
        return Preconditioning(models, total_steps, self.options.damping)

    def start(self, model: nn.Module, probe: Probe, adapter_name: str) -> None:
        """Initialise A and B from the gradients of the probe's losses, or from its cache.

        If a gradient has a rank below r, or is zero, the other rows of A and columns of B are initialised as in LoRA.

        Raises:
            InputError: a layer cannot be adapted; no loss is computed then.
            ValueError: a gradient is not finite.
        """
        from accelerate.logging import get_logger
        from peft.tuners.lora import LoraLayer

        options = self.options
        layers = {name: layer for name, layer in tuner_layers(model).items() if isinstance(layer, LoraLayer)}
        base_layers = {name: layer.get_base_layer() for name, layer in layers.items()}
        check_no_groups(base_layers, self.title)
        super().start(model, probe, adapter_name)
        weights = {name: base.weight for name, base in base_layers.items()}
        # A separate file, as other methods cache other tensors for the same data.
        cache = probe.cache.with_name(f"{probe.cache.stem}-{self.name}.safetensors")
        with adapters_off([model]):
            origin = origin_of(weights, [options.rank, options.gamma, options.gradient_batches])
            factors = cached_factors(cache, origin, partial(self._factors, base_layers, probe.losses))
        for name, layer in layers.items():
            if name in factors:
                copy_factors(factors[name], layer, adapter_name)
        without = [name for name in layers if name not in factors]
        if without:
            get_logger(__name__).warning(
                f"The gradient of {len(without)} of {len(layers)} layers is zero; they are initialised as in LoRA: "
                f"{', '.join(without)}."
            )

    def learning_rate_factor(self, parameter_name: str) -> float:
        """1 for both, as A and B are initialised at the same size."""
        return 1.0

    def _factors(self, base_layers: Mapping[str, nn.Module], losses: Losses) -> Iterator[tuple[str, Factors]]:
        """B_0 and A_0 of every layer whose gradient is not zero."""
        for name, gradient in mean_gradients(base_layers, losses, self.options.gradient_batches):
            if gradient.any():
                yield name, starting_factors(gradient, self.options.rank, self.options.gamma)


def starting_factors(gradient: torch.Tensor, rank: int, gamma: float) -> Factors:
    """B_0 = U_r diag(sqrt sigma) / sqrt(sigma_1 gamma) and A_0 = diag(sqrt sigma) V_r^T / sqrt(sigma_1 gamma).

    Args:
        gradient: (out, in) float32, not all zero;  -gradient = U diag(sigma) V^T.
    Returns: up (out, k) and down (k, in), where k is the rank of the gradient in float32, or `rank` if that is smaller. Each
        row of A_0 has its sign chosen so that its entry of largest magnitude is positive.
    """
    from nora_vision.decomposition import awsvd
    from nora_vision.factors import Factors

    # With an activation scale of 1, this is the plain singular value decomposition.
    weighted, rows = awsvd(-gradient, torch.ones_like(gradient[0]), min(rank, *gradient.shape))
    sigma = weighted.norm(dim=0)
    above_rounding = sigma > max(gradient.shape) * torch.finfo(sigma.dtype).eps * sigma[0]
    weighted, rows, sigma = weighted[:, above_rounding], rows[above_rounding], sigma[above_rounding]
    size = (sigma[0] * gamma).sqrt()
    return Factors((weighted / sigma.sqrt() / size).cpu(), (rows * sigma.sqrt()[:, None] / size).cpu())


class Preconditioning(MethodTraining):
    """Preconditions the gradients of every step, before AdamW  [LoRA-One, alg. 1; Zhang and Pilanci 2024].

        g_A <- (B^T B + damping I)^-1 g_A,  g_B <- g_B (A A^T + damping I)^-1

    Both use the factors of the same step, as PEFT's `create_riemannian_optimizer` does: one step of the optimiser updates both.
    In the paper, the second uses A after its update.
    """

    def __init__(self, models: Sequence[nn.Module], total_steps: int, damping: float) -> None:
        super().__init__(models, total_steps)
        self.damping = damping

    @no_grad
    def after_backward(self, step: int) -> None:
        """Replace the gradients of A (r, n) and B (m, r)."""
        for layer in (layer for model in self.models for layer in tuner_layers(model).values()):
            A, B = layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight
            # A text encoder that is no longer trained has no gradients.
            if A.grad is None or B.grad is None:
                continue
            rows, columns = A.flatten(1), B.flatten(1)
            identity = self.damping * torch.eye(len(rows), device=rows.device, dtype=rows.dtype)
            of_A = torch.linalg.solve(columns.T @ columns + identity, A.grad.flatten(1))
            of_B = torch.linalg.solve(rows @ rows.T + identity, B.grad.flatten(1), left=False)
            A.grad.copy_(of_A.view_as(A))
            B.grad.copy_(of_B.view_as(B))


@no_grad
def copy_factors(factors: Factors, layer: LoraLayer, adapter_name: str) -> None:
    """Copy the factors into the first rows of A and columns of B; the others are unchanged."""
    A, B = layer.lora_A[adapter_name].weight.flatten(1), layer.lora_B[adapter_name].weight.flatten(1)
    count = len(factors.down)
    A[:count] = factors.down.to(A)
    B[:, :count] = factors.up.to(B)


METHOD = LoraOne
