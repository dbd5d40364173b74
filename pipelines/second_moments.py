"""The mean and the second moments of the inputs of adapted layers, for initialisations from activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from pipelines.adapter_method import adapters_off

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

# Bytes of sums in memory at a time: all layers of the built-in models, about 80 attention layers of SDXL.
GROUP_BYTES = 2**30


class Moments(NamedTuple):
    """Over all N inputs x of a layer: the mean (in,) of x, and the mean (in, in) of x x^T, float64."""

    mean: torch.Tensor
    second: torch.Tensor

    @property
    def covariance(self) -> torch.Tensor:
        """(in, in): the mean of x x^T after subtracting the mean of x."""
        return self.second - torch.outer(self.mean, self.mean)


def second_moments(
    layers: Mapping[str, LoraLayer], forward: Callable[[], None] | None, group_bytes: int = GROUP_BYTES
) -> Iterator[tuple[str, Moments]]:
    """The moments of each layer's inputs while `forward` runs the base model, over all processes and in the order of `layers`.

    The inputs are all tokens of every call, or all patches of a convolution. `forward` is called once for each group of layers:
    the sums of one group are in memory.

    Args:
        group_bytes: bytes of the sums of one group, which has at least one layer.
    Raises: ValueError if `forward` is missing, or naming a layer that it does not reach or whose inputs are not finite.
    """
    from nora_vision.moment_groups import grouped

    if forward is None:
        raise ValueError("This method is initialised from activations of the base model, but no function to run it was given.")
    for names in grouped({name: 8 * _inputs(layer) ** 2 for name, layer in layers.items()}, group_bytes):
        sums = {name: _Sums(layers[name]) for name in names}
        with ExitStack() as stack:
            stack.enter_context(adapters_off(layers.values()))
            for name in names:
                stack.callback(layers[name].register_forward_pre_hook(sums[name].add).remove)
            stack.enter_context(torch.no_grad())
            forward()
        for name in names:
            yield name, sums.pop(name).moments(name)


def _inputs(layer: LoraLayer) -> int:
    return layer.in_features * math.prod(getattr(layer.get_base_layer(), "kernel_size", ()))


class _Sums:
    """Running sums over the inputs of one layer."""

    def __init__(self, layer: LoraLayer) -> None:
        self.base = layer.get_base_layer()
        device = self.base.weight.device
        # MPS has no float64.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        size = _inputs(layer)
        # Below x x^T: x, and the number of inputs.
        self.sums = torch.zeros(size + 2, size, dtype=dtype, device=device)

    def add(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Add the input of one call; a forward pre-hook."""
        with torch.autocast(self.sums.device.type, enabled=False):
            for rows in input_rows(self.base, inputs[0].detach().float()):
                self.sums[:-2] += rows.T @ rows
                self.sums[-2] += rows.sum(dim=0)
                self.sums[-1] += len(rows)

    def moments(self, name: str) -> Moments:
        """The moments over all processes; see `second_moments`."""
        total = self.sums
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
        if total[-1, 0] == 0:
            raise ValueError(f"No input reached {name!r}: the function that runs the base model must call all adapted layers.")
        if not torch.isfinite(total).all():
            raise ValueError(f"The inputs of {name!r} must be finite, got NaN or infinite values.")
        count = total[-1, 0]
        return Moments(total[-2] / count, total[:-2] / count)


def input_rows(base: nn.Module, x: torch.Tensor) -> Iterator[torch.Tensor]:
    """The inputs of one call as rows (tokens, in); a convolution has one batch of (positions, in * kh * kw) for each image.

    Args:
        x: (..., in), or (batch, in, h, w) for a convolution.
    """
    if not isinstance(base, nn.Conv2d):
        yield x.flatten(0, -2)
        return
    mode = "constant" if base.padding_mode == "zeros" else base.padding_mode
    padded = F.pad(x, base._reversed_padding_repeated_twice, mode)
    for image in padded:
        yield F.unfold(image[None], base.kernel_size, base.dilation, stride=base.stride)[0].T
