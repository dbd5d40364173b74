"""How much of an adapter's weight change an exported LoRA is expected to leave out, before the adapter is trained."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torch import nn

from nora_vision.factors import has_adapter, is_weight_change, low_rank_factors
from nora_vision.lycoris import lycoris_form
from nora_vision.weight_change import EXPORT_RANK
from pipelines.adapter_checks import matrix_size
from pipelines.adapter_method import ADAPTER_NAME, tuner_layers

# Standard deviation of the random values that stand for training. The share that is left out hardly depends on it.
STEP = 0.01


@torch.no_grad()
def expected_left_out(components: Mapping[str, nn.Module]) -> float:
    """The norm of what the export of the largest adapted layer leaves out, relative to the norm of its weight change.

    Trained values are replaced by the initial ones plus Gaussian noise. 0 for an exact export, and for an adapter that is no
    change of weights and is not exported.
    """
    if not all(is_weight_change(model, ADAPTER_NAME) for model in components.values()):
        return 0.0
    layers = [layer for model in components.values() for layer in tuner_layers(model).values()]
    layers = [layer for layer in layers if has_adapter(layer, ADAPTER_NAME)]
    layer = copy.deepcopy(max(layers, key=lambda layer: math.prod(matrix_size(layer.get_base_layer()))))
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        if parameter.requires_grad:
            parameter += STEP * torch.randn(parameter.shape, generator=generator).to(parameter)
    return low_rank_factors(layer, ADAPTER_NAME).relative_error


def has_lycoris_form(components: Mapping[str, nn.Module]) -> bool:
    """Whether a kohya file holds the adapter exactly, in a form of LyCORIS."""
    layers = [layer for model in components.values() for layer in tuner_layers(model).values()]
    return any(lycoris_form(layer, ADAPTER_NAME) is not None for layer in layers)


def left_out_sentence(share: float, lycoris: bool = False) -> str:
    """What users should know about exports that are expected to leave out `share` of the weight change.

    Args:
        lycoris: whether there is a kohya file that is exact.
    """
    return (
        f"Files of plain LoRA cannot hold this adapter: they will hold the best approximation of rank {EXPORT_RANK} or less, "
        f"which is expected to leave out about {share:.0%} of the weight change (Frobenius norm; random values, largest layer). "
        + ("The kohya file will be exact, in the form of LyCORIS. " if lycoris else "")
        + "The native files are always exact."
    )
