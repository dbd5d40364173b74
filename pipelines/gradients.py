"""Gradients of the training loss at the base model, a group of weights at a time, and a cache of factors."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.adapter_method import Losses, adapters_off
from pipelines.errors import InputError
from pipelines.lazy_modules import nn, torch

if TYPE_CHECKING:
    from nora_vision.factors import Factors

# Outer and inner rank, by component and layer.
Ranks = Mapping[str, Mapping[str, tuple[int, int]]]
# Metadata key of cached factors: a hash of what they were computed from.
ORIGIN = "gradient_factors_origin"
# Prevents underflow of float16 gradients; a power of two, so that scaling is exact.
LOSS_SCALE = 1024.0
# Bytes of float32 sums in memory at a time: all layers of the built-in models, about 160 attention layers of SDXL.
GROUP_BYTES = 2**30


def base_losses(losses: Losses, models: Iterable[nn.Module]) -> Losses:
    """`losses` with the adapters of `models` disabled until the last loss has been differentiated."""

    def of_base_model(count: int) -> Iterator[torch.Tensor]:
        with adapters_off(models):
            yield from losses(count)

    return of_base_model


def mean_gradients(
    layers: Mapping[str, nn.Module], losses: Losses, count: int, group_bytes: int = GROUP_BYTES
) -> Iterator[tuple[str, torch.Tensor]]:
    """The mean gradient of `count` losses with respect to the weight of each of `layers`, over all processes, in their order.

    The losses are computed once for each group of layers: the sums of one group, and one gradient beside them, are in memory.
    After each group, even after an error, the weights have no gradient and their former `requires_grad`.

    Args:
        layers: by name; a weight is (out, in) or (out, in, kh, kw), and may be quantised in linear layers.
        losses: yields the same scalars on each call.
        count: of batches; 0 for those of one epoch.
        group_bytes: bytes of the sums of one group, which has at least one layer.
    Returns: name and gradient, (out, in) or (out, in * kh * kw) float32.
    Raises: ValueError naming a weight whose gradient is not finite.
    """
    from nora_vision.moment_groups import grouped

    # Sums are float32.
    for names in grouped({name: 4 * math.prod(_weight_shape(layer)) for name, layer in layers.items()}, group_bytes):
        group = {name: layers[name] for name in names}
        sums = _mean_gradients(group, losses, count)
        for name in group:
            gradient = sums.pop(name).flatten(1)
            if not torch.isfinite(gradient).all():
                raise ValueError(
                    f"The gradient of {name!r} at the pretrained weights is not finite. Train in bf16, or in full precision."
                )
            yield name, gradient


def _weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """The shape of the layer's weight before quantisation."""
    weight = layer.weight
    return tuple(weight.shape) if weight.is_floating_point() else (layer.out_features, layer.in_features)


def _mean_gradients(layers: Mapping[str, nn.Module], losses: Losses, count: int) -> dict[str, torch.Tensor]:
    """The mean gradient with respect to the weight of each of `layers`, in its shape, float32."""
    from accelerate.utils import reduce

    sums = {name: torch.zeros(_weight_shape(layer), device=layer.weight.device) for name, layer in layers.items()}
    number = 0
    with ExitStack() as stack:
        for name, layer in layers.items():
            weight = layer.weight
            if weight.is_floating_point():
                stack.callback(setattr, weight, "grad", None)
                stack.callback(weight.requires_grad_, weight.requires_grad)
                weight.requires_grad_(True)
                stack.callback(weight.register_post_accumulate_grad_hook(_adding_to(sums[name])).remove)
            else:
                stack.callback(layer.register_forward_hook(_adding_products_to(sums[name])).remove)
        for loss in stack.enter_context(closing(losses(count))):
            (LOSS_SCALE * loss).backward()
            number += 1
    return {name: reduce(total, "mean").div_(LOSS_SCALE * number) for name, total in sums.items()}


def _adding_to(total: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """A hook that adds a parameter's gradient to `total`, of the parameter's shape, and frees it."""

    def add(parameter: torch.Tensor) -> None:
        total.add_(parameter.grad)
        parameter.grad = None

    return add


def _adding_products_to(total: torch.Tensor) -> Callable[..., torch.Tensor]:
    """A forward hook that adds dL/dW = sum over tokens of (dL/dy) x^T to `total` (out, in), for a linear layer y = W x + b."""

    def hook(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        x = inputs[0].detach().flatten(0, -2)

        def add(gradient: torch.Tensor) -> None:
            total.add_(gradient.flatten(0, -2).T.float() @ x.float())

        # So that there is a gradient of the output even if nothing before it has one.
        output = output + output.new_zeros(()).requires_grad_()
        output.register_hook(add)
        return output

    return hook


def check_no_groups(base_layers: Mapping[str, nn.Module], title: str) -> None:
    """Check that no layer is a convolution with groups, whose gradient is no matrix that the method called `title` can use.

    Raises: InputError naming the first convolution that has groups.
    """
    for name, base in base_layers.items():
        if getattr(base, "groups", 1) != 1:
            raise InputError(
                f"{title} cannot adapt {name!r}, a convolution with {base.groups} groups. Remove it from the target modules."
            )


def origin_of(weights: Mapping[str, torch.Tensor], values: Sequence[object]) -> str:
    """A hash of the layers' weights and of other values, which determine factors together with the data."""
    from nora_vision.calibration import fingerprint

    stated = [*values, {name: fingerprint(weight) for name, weight in weights.items()}]
    return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()


def cached_ranks(file: Path, origin: str, compute: Callable[[], Ranks]) -> Ranks:
    """The ranks in `file`, or those that `compute` returns, which are written to it.

    Args:
        origin: a hash of the weights and options. Ranks of another origin are computed again.
    Raises: InputError if `compute` raises ValueError.
    """
    from nora_vision.files import read_json, write_json

    if not file.exists() or read_json(file).get("origin") != origin:
        try:
            ranks = compute()
        except ValueError as error:
            raise InputError(str(error)) from error
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"origin": origin, "ranks": ranks})
    return read_json(file)["ranks"]


def cached_factors(file: Path, origin: str, compute: Callable[[], Iterable[tuple[str, Factors]]]) -> dict[str, Factors]:
    """The factors in `file`, or those that `compute` yields, which are written to it.

    Args:
        origin: a hash of the weights and options. Factors of another origin are computed again.
        compute: yields the layer's name, and its factors up (out, k) and down (k, in).
    Raises: AdapterFileError if the file is damaged.
    """
    from nora_vision.factors import Factors
    from nora_vision.files import read_header, read_tensors, write_tensors

    if not file.exists() or read_header(file).metadata.get(ORIGIN) != origin:
        factors = dict(compute())
        tensors = {f"{name}.{part}": getattr(pair, part) for name, pair in factors.items() for part in ("up", "down")}
        write_tensors(file, tensors, {ORIGIN: origin}, digest=True)
        return factors
    tensors = read_tensors(file)
    names = [name.removesuffix(".up") for name in tensors if name.endswith(".up")]
    return {name: Factors(tensors[f"{name}.up"], tensors[f"{name}.down"]) for name in names}
