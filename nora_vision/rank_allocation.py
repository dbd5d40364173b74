"""Outer and inner ranks of all layers under one budget of trained parameters, 2 r inner_r for each layer.

Outer ranks: in every layer the smallest r that retains the same share of the energy sum_i sigma_i^2, sigma_i the singular values
of W F; the share is the largest for which the budget suffices at the configured inner rank. Inner ranks: one direction at a time
to the layer in which it captures most of the squared norm of B^T G A^T, the gradient of the core, for each parameter it costs.
What is left then goes to the layers that retain least, until no direction fits.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import nn

from .calibration import ActivationStatistics, base_name, unwrapped
from .layer import NoraLayer, nora_layers
from .weighting import in_float64

Layer = TypeVar("Layer", bound=Hashable)
Value = TypeVar("Value")
Ranks = dict[Layer, tuple[int, int]]

logger = logging.getLogger(__name__)


def num_parameters(ranks: Mapping[Layer, tuple[int, int]]) -> int:
    """The trained parameters of layers with these outer and inner ranks."""
    return sum(2 * r * inner_r for r, inner_r in ranks.values())


def outer_ranks(energies: Mapping[Layer, torch.Tensor], inner_r: int, budget: int) -> dict[Layer, int]:
    """The outer rank of each layer: the smallest that retains a share of the energy, the largest share that `budget` pays for.

    Args:
        energies: by layer, the squared singular values of W F in descending order, as many as the largest rank.
        inner_r: inner rank of the layers, or the outer rank where that is smaller.
        budget: trained parameters of all layers.
    Raises: ValueError if the budget is below that of rank 1 in every layer.
    """
    if budget < 2 * len(energies):
        raise ValueError(
            f"parameter_budget must be at least {2 * len(energies)}, for rank 1 in each of {len(energies)} layers, got {budget}."
        )
    ranks = dict.fromkeys(energies, 1)
    spent = 2 * len(ranks)
    # By the share that is retained without the next direction; the index makes the order of equal shares that of the layers.
    shares = {layer: _retained(values) for layer, values in energies.items()}
    steps = [(share, index, layer) for index, layer in enumerate(ranks) for share in shares[layer][:-1]]
    for _, _, layer in sorted(steps, key=lambda step: step[:2]):
        r = ranks[layer]
        cost = 2 * ((r + 1) * min(inner_r, r + 1) - r * min(inner_r, r))
        if spent + cost > budget:
            break
        ranks[layer], spent = r + 1, spent + cost
    return ranks


def inner_ranks(
    outer: Mapping[Layer, int],
    gradients: Mapping[Layer, torch.Tensor],
    energies: Mapping[Layer, torch.Tensor],
    budget: int,
) -> Ranks:
    """Outer and inner ranks whose parameters are at most `budget`, and within one direction of any layer of it.

    Args:
        outer: the outer ranks, of which some are raised if the budget leaves parameters over.
        gradients: by layer, the squared singular values of B^T G A^T in descending order.
        energies: as in `outer_ranks`.
    Raises: ValueError if the budget is below that of inner rank 1.
    """
    ranks: Ranks = {layer: (r, 1) for layer, r in outer.items()}
    if num_parameters(ranks) > budget:
        raise ValueError(f"parameter_budget must be at least {num_parameters(ranks)} for these outer ranks, got {budget}.")
    shares = {layer: _retained(values) for layer, values in energies.items()}
    left = budget - num_parameters(ranks)
    while True:
        left = _raise_inner(ranks, gradients, left)
        layer = _least_retaining(ranks, shares, left)
        if layer is None:
            return ranks
        r, inner_r = ranks[layer]
        ranks[layer], left = (r + 1, inner_r), left - 2 * inner_r


def _raise_inner(ranks: Ranks, gradients: Mapping[Layer, torch.Tensor], left: int) -> int:
    """Raise inner ranks in `ranks` by the gain of the next direction for each parameter; returns what is left of `left`."""
    order = {layer: index for index, layer in enumerate(ranks)}

    def next_step(layer: Layer) -> tuple[float, int, int, Layer]:
        r, inner_r = ranks[layer]
        values = gradients[layer]
        gain = values[inner_r].item() / (2 * r) if inner_r < len(values) else 0.0
        return -gain, inner_r, order[layer], layer

    heap = [next_step(layer) for layer, (r, inner_r) in ranks.items() if inner_r < r]
    heapq.heapify(heap)
    while heap:
        *_, layer = heapq.heappop(heap)
        r, inner_r = ranks[layer]
        # A layer whose next direction does not fit now never has one that fits: it keeps its cost, and less is left.
        if 2 * r <= left:
            ranks[layer], left = (r, inner_r + 1), left - 2 * r
            if inner_r + 1 < r:
                heapq.heappush(heap, next_step(layer))
    return left


def _least_retaining(ranks: Ranks, shares: Mapping[Layer, list[float]], left: int) -> Layer | None:
    """The layer that retains least among those whose next outer direction costs at most `left`; None if there is none."""
    fitting = [layer for layer, (r, inner_r) in ranks.items() if r < len(shares[layer]) and 2 * inner_r <= left]
    return min(fitting, key=lambda layer: shares[layer][ranks[layer][0] - 1], default=None)


def _retained(energies: torch.Tensor) -> list[float]:
    """The share of the energy in the first 1, 2, ... directions; ones if there is no energy."""
    total = energies.sum()
    return (energies.cumsum(0) / total if total > 0 else torch.ones_like(energies)).tolist()


def summary(ranks: Mapping[Layer, tuple[int, int]], budget: int) -> str:
    """A sentence about the ranks of all layers."""
    outer, inner = zip(*ranks.values(), strict=True)
    return (
        f"Ranks of {len(ranks)} layers for {num_parameters(ranks):,} of {budget:,} parameters: outer {min(outer)} to "
        f"{max(outer)}, inner {min(inner)} to {max(inner)}."
    )


# On models


def allocated_ranks(
    models: Mapping[str, nn.Module],
    adapter_name: str,
    statistics: Mapping[str, ActivationStatistics | None],
    gradients: Callable[[str], Iterable[tuple[str, torch.Tensor]]],
    budget: int,
) -> dict[str, dict[str, tuple[int, int]]]:
    """Outer and inner rank of each layer, by the name of its model and its own. The models get the outer ranks.

    Args:
        models: by name, with the adapter.
        statistics: for the adapter's weighting, by the model's name.
        gradients: `gradients(name)` initialises the adapter of a model and yields the gradients of its weights, (out, in).
        budget: trained parameters of all layers.
    Raises: ValueError if the budget is below that of rank 1 in every layer.
    """
    by_model = {name: weighted_energies(model, adapter_name, statistics[name]) for name, model in models.items()}
    energies = {(name, layer): values for name, each in by_model.items() for layer, values in each}
    inner_r = next(iter(models.values())).peft_config[adapter_name].inner_r
    outer = outer_ranks(energies, inner_r, budget)
    of_cores: dict[tuple[str, str], torch.Tensor] = {}
    for name, model in models.items():
        set_ranks(model, adapter_name, {layer: (r, min(r, inner_r)) for layer, r in _of_model(outer, name).items()})
        of_cores |= {(name, layer): values for layer, values in core_energies(model, adapter_name, gradients(name))}
    ranks = inner_ranks(outer, of_cores, energies, budget)
    logger.info(summary(ranks, budget))
    return {name: _of_model(ranks, name) for name in models}


def _of_model(values: Mapping[tuple[str, str], Value], name: str) -> dict[str, Value]:
    """The values of the layers of the model `name`, by layer."""
    return {layer: value for (model, layer), value in values.items() if model == name}


def adapter_layers(model: nn.Module, adapter_name: str) -> dict[str, NoraLayer]:
    """The layers with the adapter, by name without wrappers."""
    layers = nora_layers(unwrapped(model)).items()
    return {base_name(name): layer for name, layer in layers if adapter_name in layer.r}


@torch.no_grad()
def weighted_energies(
    model: nn.Module, adapter_name: str, stats: ActivationStatistics | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The squared singular values of W F of each layer, descending, float64 on the CPU, up to the largest rank of a slice.

    Args:
        stats: the statistics for the weighting of the adapter; None for F = I.
    """
    weighting = model.peft_config[adapter_name].weighting
    for name, layer in adapter_layers(model, adapter_name).items():
        weight = in_float64(layer.finite_weight_matrix(name))
        if stats is not None:
            weight = stats.root(name, weighting).to(weight.device).weigh(weight)
        smaller = weight if len(weight) <= weight.shape[1] else weight.T
        values = torch.linalg.eigvalsh(smaller @ smaller.T).flip(0).clamp_min(0)
        yield name, values[: len(values) // layer.outer_slice[adapter_name][1]].cpu()


def core_energies(
    model: nn.Module, adapter_name: str, gradients: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The squared singular values of B^T G A^T of each layer, descending, float64 on the CPU.

    Args:
        gradients: G (out, in) of the layers' weights.
    """
    layers = adapter_layers(model, adapter_name)
    for name, gradient in gradients:
        # Not around the loop, which computes the gradients.
        with torch.no_grad():
            B, A = (in_float64(part[adapter_name]) for part in (layers[name].nora_B, layers[name].nora_A))
            core = B.T @ layers[name]._as_matrix(gradient).to(B) @ A.T
            values = torch.linalg.svdvals(core).square().cpu()
        yield name, values


def set_ranks(model: nn.Module, adapter_name: str, ranks: Mapping[str, tuple[int, int]]) -> None:
    """Give the layers of the adapter these outer and inner ranks, and its configuration the patterns for them.

    The factors are those of an adapter that was just added: `initialize_nora_weights` sets them.
    """
    config = model.peft_config[adapter_name]
    config.rank_pattern = {f"^{name}": r for name, (r, _) in ranks.items()}
    config.inner_rank_pattern = {f"^{name}": inner_r for name, (_, inner_r) in ranks.items()}
    # The inner factors are sampled later, so this must not change the user's random state.
    with torch.random.fork_rng(devices=[]):
        for name, layer in adapter_layers(model, adapter_name).items():
            layer.update_layer(adapter_name, config, name)
