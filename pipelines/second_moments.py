"""The second moments of the inputs of adapted layers, for initialisations from activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pipelines.adapter_method import adapters_off

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


def second_moments(layers: Mapping[str, LoraLayer], forward: Callable[[], None]) -> dict[str, torch.Tensor]:
    """X^T X / count of each linear layer while `forward` runs the base model, (in, in) float32, over all processes.

    X stacks every token of every call, and count is their number.

    Raises: ValueError if `forward` is missing, or naming a layer that it does not reach or whose inputs are not finite.
    """
    if forward is None:
        raise ValueError("This method is initialised from activations of the base model, but no function to run it was given.")
    sums = {name: torch.zeros(layer.in_features + 1, layer.in_features) for name, layer in layers.items()}
    with ExitStack() as stack:
        stack.enter_context(adapters_off(layers.values()))
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(_adding_to(sums, name)).remove)
        stack.enter_context(torch.no_grad())
        forward()
    return {name: _mean(name, total) for name, total in sums.items()}


def _adding_to(sums: dict[str, torch.Tensor], name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def add(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0].detach().flatten(0, -2).float()
        total = sums[name] = sums[name].to(x.device)
        total[:-1] += x.T @ x
        total[-1, 0] += len(x)

    return add


def _mean(name: str, total: torch.Tensor) -> torch.Tensor:
    from accelerate.utils import reduce

    total = reduce(total, "sum")
    if total[-1, 0] == 0:
        raise ValueError(f"No input reached {name!r}: the function that runs the base model must call all adapted layers.")
    if not torch.isfinite(total).all():
        raise ValueError(f"The inputs of {name!r} must be finite, got NaN or infinite values.")
    return total[:-1] / total[-1, 0]
