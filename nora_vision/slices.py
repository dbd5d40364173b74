"""Adapters in disjoint slices of one basis, whose weight changes are orthogonal by construction.

With W S = U Sigma V^T, slice i has B_i = U_i Sigma_i and A_i = V_i^T S^-1 for its own r of n r singular triples. So
B_i^T B_j = 0 and A_i S^2 A_j^T = 0 for i != j, and <D_i S, D_j S> = 0 for any inner factors of the changes D = s B B' A' A.
This needs the same n, r and S.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import nn

from .layer import NoraLayer, nora_layers


def overlapping_slices(model: nn.Module, adapter_names: Sequence[str]) -> list[str]:
    """One sentence for each pair of the adapters that are both in slices (`outer_slice`) which are not disjoint."""
    layers = nora_layers(model)
    sentences = []
    for first, second in combinations(adapter_names, 2):
        reasons = {name: _overlap(layer, first, second) for name, layer in layers.items()}
        overlap = next(((name, reason) for name, reason in reasons.items() if reason), None)
        if overlap is not None:
            sentences.append(
                f"The NoRA adapters {first!r} and {second!r} are in slices that overlap: at {overlap[0]!r}, {overlap[1]}. Each "
                "changes the results of the other. Train both with the same rank, number of slices and activation statistics, "
                "and with different slices."
            )
    return sentences


def _overlap(layer: NoraLayer, first: str, second: str) -> str:
    """Why the slices of two adapters of a layer are not disjoint; empty if they are, or if one of them is no slice."""
    if first not in layer.r or second not in layer.r:
        return ""
    (number, count), (other_number, other_count) = layer.outer_slice[first], layer.outer_slice[second]
    if count == 1 or other_count == 1:
        return ""
    if (count, layer.r[first]) != (other_count, layer.r[second]):
        return f"one is 1 of {count} slices of rank {layer.r[first]}, the other 1 of {other_count} of rank {layer.r[second]}"
    if number == other_number:
        return f"both are slice {number}/{count}"
    scales = layer.nora_activation_scale
    return "" if torch.equal(scales[first], scales[second]) else "their activation statistics differ"
