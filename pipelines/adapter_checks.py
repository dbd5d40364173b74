"""Checks of an adapter's configuration against a model, before anything is added to the model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from pipelines.lazy_modules import nn, torch

if TYPE_CHECKING:
    from peft import PeftConfig

# What PEFT raises for the values of a configuration.
PEFT_ERRORS = (ArithmeticError, NotImplementedError, TypeError, ValueError, re.error)


def targeted_layers(model: nn.Module, config: PeftConfig) -> Iterator[tuple[str, nn.Module]]:
    """The layers of `model` that `config` names, without the adapters around them."""
    from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists

    for name, layer in model.named_modules():
        if not name.endswith(".base_layer") and check_target_module_exists(config, name):
            yield name, layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


def matrix_size(layer: nn.Module | None) -> tuple[int, int] | None:
    """(out, in) of a layer's weight as a matrix, also of a quantised one; None if it is no linear layer or convolution."""
    if isinstance(layer, nn.Conv2d):
        return layer.out_channels, layer.weight[0].numel()
    return (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else None


def check_targets(model: nn.Module, config: PeftConfig) -> None:
    """Check that every entry of target_modules is the name of a module of `model`, or its end; PEFT ignores others.

    Raises: ValueError naming those that are not.
    """
    endings = set()
    for name, _ in model.named_modules():
        parts = name.split(".")
        endings |= {".".join(parts[start:]) for start in range(len(parts))}
    unknown = sorted(set(config.target_modules) - endings)
    if unknown:
        raise ValueError(
            f"target_modules {unknown} match no module of {type(model).__name__}. Remove them or correct the spelling."
        )


def check_rank(model: nn.Module, config: PeftConfig, option: str | None, rank: int | None) -> None:
    """Check that a weight change of an adapted layer can have the rank; higher ranks would take memory to no effect.

    Args:
        option: its name, for the error message.
        rank: None if the method has no such option.
    Raises: ValueError if `rank` exceeds the smaller side of the weight of every layer.
    """
    if rank is None:
        return
    sizes = [size for _, layer in targeted_layers(model, config) if (size := matrix_size(layer)) is not None]
    largest = max(map(min, sizes), default=rank)
    if rank > largest:
        raise ValueError(
            f"{option} must be in [1, {largest}], the largest rank of an adapted weight, got {rank}. Lower {option}."
        )


def check_ranks_of_file(model: nn.Module, config: PeftConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    """Check the ranks in a file's configuration, before memory is allocated for them.

    PEFT itself refuses those that are too low; some configurations have an unused rank of 0.

    Raises: ValueError if one is not an integer, or exceeds all sizes of the file's tensors and of the adapted layers.
    """
    sizes = [side for tensor in tensors.values() for side in tensor.shape]
    sizes += [side for _, layer in targeted_layers(model, config) for side in matrix_size(layer) or ()]
    largest = max(sizes, default=1)
    for rank in (
        getattr(config, "r", 1),
        getattr(config, "hybrid_r", 0),
        *(getattr(config, "rank_pattern", None) or {}).values(),
    ):
        if type(rank) is not int or rank > largest:
            raise ValueError(f"its ranks must be integers up to {largest}, the largest side of its tensors, got {rank!r}.")


def check_tensors(tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Check that a file's tensors have the names and shapes that the adapter has on the model; PEFT ignores other names.

    Raises: ValueError naming the first tensor that differs.
    """
    unmatched = sorted(tensors.keys() ^ expected.keys())
    if unmatched:
        raise ValueError(f"only one of the two has {unmatched[0]!r} ({len(unmatched)} such tensors in all).")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(f"{name!r} must have the shape {tuple(expected[name].shape)}, got {tuple(tensor.shape)}.")
