"""The NoRA layer classes and the layers that they adapt."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D as TransformersConv1D

from .config import NoraConfig
from .layer import NoraLayer


class Linear(NoraLayer):
    """NoRA on `nn.Linear`."""

    @staticmethod
    def matrix_shape(base_layer: nn.Module) -> tuple[int, int]:
        """(out_features, in_features)."""
        return base_layer.out_features, base_layer.in_features


class Conv1D(NoraLayer):
    """NoRA on transformers' `Conv1D`, a linear layer whose weight is stored as (in, out)."""

    @staticmethod
    def matrix_shape(base_layer: nn.Module) -> tuple[int, int]:
        """(out, in): the stored shape, transposed."""
        return base_layer.weight.shape[1], base_layer.weight.shape[0]

    def _as_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.T

    def _as_weight(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix.T


class Conv2d(NoraLayer):
    """NoRA on `nn.Conv2d` without groups. The matrix is the flattened kernel (out_channels, in_channels * kh * kw)."""

    # Read by PEFT's LoRA if it wraps this layer.
    groups = 1
    feature_axis = 1

    @staticmethod
    def matrix_shape(base_layer: nn.Module) -> tuple[int, int]:
        """(out_channels, in_channels * kh * kw)."""
        return base_layer.out_channels, base_layer.in_channels * math.prod(base_layer.kernel_size)

    def _as_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.flatten(1)

    def _as_weight(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix.unflatten(1, self.get_base_layer().weight.shape[1:])

    @staticmethod
    def input_squares(base_layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """(in_channels * kh * kw,): squares of `x` (batch, in_channels, h, w) summed over all positions of the kernel."""
        squares = x.square().sum(dim=0, keepdim=True)
        mode = "constant" if base_layer.padding_mode == "zeros" else base_layer.padding_mode
        squares = F.pad(squares, base_layer._reversed_padding_repeated_twice, mode)
        # One kernel offset at a time: all at once would need kh * kw times the memory of an input.
        geometry = (squares.shape[2:], base_layer.kernel_size, base_layer.dilation, base_layer.stride)
        rows, columns = (_kernel_slices(*sizes) for sizes in zip(*geometry, strict=True))
        sums = [squares[0, :, row, column].sum(dim=(1, 2)) for row in rows for column in columns]
        return torch.stack(sums, dim=1).flatten()

    @staticmethod
    def input_rows(base_layer: nn.Module, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """The patches (positions, in_channels * kh * kw) of each of the images `x` (batch, in_channels, h, w)."""
        mode = "constant" if base_layer.padding_mode == "zeros" else base_layer.padding_mode
        # One image at a time: the patches need kh * kw times the memory of the input.
        for image in x:
            padded = F.pad(image[None], base_layer._reversed_padding_repeated_twice, mode)
            yield F.unfold(padded, base_layer.kernel_size, base_layer.dilation, stride=base_layer.stride)[0].T

    def _project_input(self, x: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        # Uses the stride, dilation and padding mode of the base layer.
        return self.get_base_layer()._conv_forward(x, self._as_weight(A), None)

    def _nested_product(self, x: torch.Tensor, A: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        return self._multiply(self._project_input(x, A).to(down.dtype), down)

    def _multiply(self, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, matrix[:, :, None, None])


def _kernel_slices(side: int, kernel: int, dilation: int, stride: int) -> list[slice]:
    """For each offset in a kernel along one axis, the slice of a padded input of length `side` that it is applied to."""
    covered = side - dilation * (kernel - 1)
    return [slice(first, first + covered, stride) for first in range(0, dilation * kernel, dilation)]


def find_layer_class(base_layer: nn.Module) -> type[NoraLayer] | None:
    """The NoRA layer that adapts `base_layer`, or None if there is none."""
    if isinstance(base_layer, NonDynamicallyQuantizableLinear) or getattr(base_layer, "groups", 1) != 1:
        return None
    classes = {nn.Linear: Linear, nn.Conv2d: Conv2d, TransformersConv1D: Conv1D}
    return next((adapting for adapted, adapting in classes.items() if isinstance(base_layer, adapted)), None)


def layer_class_for(base_layer: nn.Module, layer_name: str) -> type[NoraLayer]:
    """The NoRA layer that adapts `base_layer`, the layer called `layer_name`.

    Raises: ValueError naming the layer if there is none.
    """
    layer_class = find_layer_class(base_layer)
    if layer_class is not None:
        return layer_class
    if isinstance(base_layer, NonDynamicallyQuantizableLinear):
        raise ValueError(
            f"Cannot adapt {layer_name!r}: nn.MultiheadAttention reads the weight of its out_proj without calling it, so an "
            "adapter there would have no effect. Swap the attention for one with separate q, k, v and out nn.Linear layers."
        )
    if getattr(base_layer, "groups", 1) != 1:
        raise ValueError(f"Cannot adapt {layer_name!r}: groups must be 1, got {base_layer.groups}. Add it to exclude_modules.")
    raise ValueError(
        f"Cannot adapt {layer_name!r}: NoRA supports nn.Linear, nn.Conv2d and transformers' Conv1D, got "
        f"{type(base_layer).__name__}. Narrow target_modules or add it to exclude_modules."
    )


def check_layer(base_layer: nn.Module, config: NoraConfig, layer_name: str) -> None:
    """Check that `config` fits `base_layer`, the layer called `layer_name`.

    Raises: ValueError naming the layer if its kind is not supported or if a rank is out of range.
    """
    config.check_rank(layer_class_for(base_layer, layer_name).matrix_shape(base_layer), layer_name)
