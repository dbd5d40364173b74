"""Optimisers for adapters, with a learning rate for each kind of parameter, and their moving average (EMA)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.errors import InputError
from pipelines.lazy_modules import nn, timm_optim, torch
from pipelines.packages import installed

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel

logger = logging.getLogger(__name__)
ADAMW, MUON, PRODIGY = OPTIMIZERS = ("AdamW", "Muon", "Prodigy")
# Prodigy estimates its step size; the learning rate is a factor on the estimate.
PRODIGY_LEARNING_RATE = 1.0


@dataclass(frozen=True)
class Rates:
    """The peak learning rates.

    Args:
        unet: of the UNet's adapter.
        text_encoders: of the text encoders' adapters: one for each or one for both; empty for that of the UNet.
        factor: `factor(name)` multiplies the rate of the parameter `name`; see `AdapterMethod.learning_rate_factor`.
    """

    unet: float
    text_encoders: tuple[float, ...] = ()
    factor: Callable[[str], float] = lambda name: 1.0

    def of(self, name: str) -> float:
        """The rate of the parameter `name`: of a text encoder if it begins with `text_encoders.`, else of the UNet."""
        rate = self.unet
        if name.startswith("text_encoders.") and self.text_encoders:
            index = int(name.split(".")[1])
            rate = self.text_encoders[min(index, len(self.text_encoders) - 1)]
        return rate * self.factor(name)


def parameter_groups(module: nn.Module, rates: Rates) -> list[dict[str, Any]]:
    """The trainable parameters of `module`, in one group for each learning rate; that of the UNet comes first."""
    groups: dict[float, list[nn.Parameter]] = {rates.unet: []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(rates.of(name), []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items() if parameters]


def optimizer_named(name: str, names: Sequence[str] = OPTIMIZERS) -> str:
    """The one of `names` that `name` is, in any case. Raises: InputError for another name."""
    spelled = {each.lower(): each for each in names}
    if name.lower() not in spelled:
        raise InputError(f"optimizer must be one of {', '.join(names)}, got {name!r}.")
    return spelled[name.lower()]


@dataclass(frozen=True)
class OptimizerSettings:
    """The settings of an optimiser; the defaults are those of diffusers' training scripts.

    Args:
        name: one of `OPTIMIZERS`. Prodigy estimates its step size  [Mishchenko and Defazio 2023]. Muon's step on a matrix is the
            momentum of its gradient with all singular values made equal  [Jordan et al. 2024], as large as AdamW's
            [Liu et al. 2025]. A parameter of three dimensions is a stack of matrices, one of four the weight of a convolution,
            whose matrix has a row for each output channel; vectors are trained by AdamW.
        eight_bit: store AdamW's moments in 8 bits, for parameters of 4,096 entries or more.
        paged: keep AdamW's moments in memory that moves to the CPU when a GPU has too little  [QLoRA, Dettmers et al. 2023]; no
            effect on CPUs.
        betas: decay rates of the first and the second moment of the gradient; Muon has the first alone.
        epsilon: added to the denominator of AdamW and Prodigy.
        weight_decay: decoupled.
    """

    name: str = ADAMW
    eight_bit: bool = False
    paged: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 1e-4

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimiser for parameter groups with their learning rates.

        Raises: InputError naming the package to install if it is missing.
        """
        shared = {"lr": groups[0]["lr"], "betas": self.betas, "eps": self.epsilon, "weight_decay": self.weight_decay}
        if self.name == MUON:
            return self._muon(groups)
        if self.name == PRODIGY:
            prodigy = installed("prodigyopt", "--optimizer prodigy").Prodigy
            return prodigy(groups, decouple=True, use_bias_correction=True, safeguard_warmup=True, **shared)
        on_cpu = all(parameter.device.type == "cpu" for group in groups for parameter in group["params"])
        if self.paged and not on_cpu:
            optim = installed("bitsandbytes", "--quantize nf4").optim
            return (optim.PagedAdamW8bit if self.eight_bit else optim.PagedAdamW)(groups, **shared)
        if self.eight_bit:
            return installed("bitsandbytes", "--use_8bit_adam").optim.AdamW8bit(groups, **shared)
        # On the CPU, torch's default loops over the parameters in Python; on a GPU, the default is fast.
        return torch.optim.AdamW(groups, fused=on_cpu or None, **shared)

    def _muon(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Muon for the matrices of each group, of whatever shape, and AdamW for its vectors, which are counted in the log."""
        parts, stacks = [], []
        for group in groups:
            dimensions: dict[int, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                dimensions.setdefault(parameter.ndim, []).append(parameter)
            for number, parameters in dimensions.items():
                muon = {"use_muon": True, "nesterov": True, "conv_mode": "batched" if number == 3 else "flatten"}
                parts.append(group | (muon if number > 1 else {"use_muon": False, "eps": self.epsilon}) | {"params": parameters})
            stacks += dimensions.get(3, [])
        if others := sum(each.numel() for part in parts for each in part["params"] if not part["use_muon"]):
            logger.warning("Muon trains matrices alone. AdamW trains the other %d parameters.", others)
        betas = {"momentum": self.betas[0], "betas": self.betas}
        optimizer = timm_optim.Muon(parts, weight_decay=self.weight_decay, normalize_spatial=False, **betas)
        # timm's Muon takes a parameter of three dimensions for a convolution, with the matrices in the first two of them.
        optimizer.register_step_pre_hook(_permuting(stacks, (1, 2, 0)))
        optimizer.register_step_post_hook(_permuting(stacks, (2, 0, 1)))
        return optimizer


def _permuting(parameters: Sequence[nn.Parameter], dimensions: Sequence[int]) -> Callable[..., None]:
    """A hook of an optimiser that permutes the dimensions of `parameters` and of their gradients, without a copy."""

    def permute(*_: Any) -> None:
        for parameter in parameters:
            gradient, parameter.grad = parameter.grad, None
            parameter.data = parameter.data.permute(*dimensions)
            if gradient is not None:
                parameter.grad = gradient.permute(*dimensions)

    return permute


def trainable_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters of an optimiser in its order, which is also that of the moving average."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@contextmanager
def averaged(ema: EMAModel | None, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Replace the trained parameters by their moving average within the context; None changes nothing."""
    if ema is None:
        yield
        return
    parameters = trainable_parameters(optimizer)
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)
