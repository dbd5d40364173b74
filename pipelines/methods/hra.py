"""HRA: h = W H_1 ... H_r x,  H_i = I - 2 u_i u_i^T / ||u_i||^2, Householder reflections, by PEFT  [Yuan et al. 2024]."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from pipelines.adapter_method import TaskDefaults, option, tuner_layers
from pipelines.errors import InputError
from pipelines.lazy_modules import functional as F
from pipelines.lazy_modules import nn, torch
from pipelines.peft_method import PeftMethod
from pipelines.run_options import Task

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass
class HraOptions:
    """Options of HRA."""

    rank: int | None = option(None, "number of reflections, an even number", **{"few-shot": "lora_rank"})

    def __post_init__(self) -> None:
        if self.rank is not None and (self.rank < 2 or self.rank % 2):
            raise InputError(
                f"rank must be an even number of at least 2, got {self.rank}: pairs of equal reflections start at the base model."
            )


class Hra(PeftMethod):
    """HRA. The weight change, W (H_1 ... H_r - I), has rank r."""

    name = "hra"
    title = "HRA"
    reference = "Yuan et al. 2024, Bridging the Gap between Low-Rank and Orthogonal Adaptation via Householder Reflection"
    parameters = "rank * n"
    Options = HraOptions
    config_class = "HRAConfig"
    is_low_rank = True
    adapts_quantized_layers = True

    @classmethod
    def defaults(cls, task: Task, built_in: bool) -> TaskDefaults:
        """PEFT's rank."""
        return TaskDefaults(1e-3, {"rank": 8})

    def misfit(self, layer: nn.Module) -> str | None:
        """PEFT's reflections of convolutions are of square kernels without groups."""
        if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or len(set(layer.kernel_size)) != 1):
            return (
                f"it adapts convolutions with square kernels and without groups, got kernel_size={layer.kernel_size} and "
                f"groups={layer.groups}. Narrow target_modules."
            )
        return super().misfit(layer)

    @classmethod
    def inject(cls, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        """Add the adapter, whose linear layers do not multiply the reflections out as PEFT's do."""
        from peft.tuners.hra import HRALinear

        super().inject(model, config, adapter_name)
        for layer in tuner_layers(model).values():
            if type(layer) is HRALinear:
                layer.__class__ = _reflecting_linear()


class Reflecting:
    """A mixin in front of PEFT's layer:  h = W x - (W U) S^-1 U^T x,  U of unit columns u_i, S = I / 2 + triu(U^T U, 1).

    It is the compact form of the product of reflections  [Bischof and Van Loan 1987; Joffrain et al. 2006], which needs no (n, n)
    matrix and reads W only through the base layer.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x: (..., in_features), h: (..., out_features)."""
        active = [name for name in self.active_adapters if name in self.hra_u]
        if self.disable_adapters or self.merged or len(active) != 1 or self.hra_apply_GS[active[0]]:
            return super().forward(x, *args, **kwargs)
        U = F.normalize(self.hra_u[active[0]], dim=0)
        result = self.base_layer(x, *args, **kwargs)
        up = self.base_layer(U.T.to(x.dtype)).to(U.dtype)
        if self.base_layer.bias is not None:
            up = up - self.base_layer.bias
        identity = torch.eye(U.shape[1], dtype=U.dtype, device=U.device)
        S = torch.triu(U.T @ U, 1).to(U.dtype) + identity / 2
        T = torch.linalg.solve_triangular(S, identity, upper=True)
        return result - ((x.to(U.dtype) @ U) @ T.T @ up).to(result.dtype)


@cache
def _reflecting_linear() -> type[nn.Module]:
    """PEFT's linear layer in the compact form; its base takes seconds to import."""
    from peft.tuners.hra import HRALinear

    return type("ReflectingLinear", (Reflecting, HRALinear), {})


METHOD = Hra
