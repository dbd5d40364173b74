"""The data-driven start: outer factors by AwSVD from activation statistics."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import nn

from .calibration import ActivationStatistics, base_name, unwrapped
from .decomposition import reproducible_awsvd
from .layer import NoraLayer, nora_layers
from .reproducible import record_reproducible

# Inputs that calibration hardly saw would otherwise get factors as large as their scale is small.
SCALE_FLOOR = 1e-3


def initialize_nora_weights(
    model: nn.Module,
    stats: ActivationStatistics | None = None,
    adapter_name: str = "default",
    *,
    generator: torch.Generator | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Start the adapter afresh: outer factors by AwSVD of each base weight, inner factors as its configuration says.

    Without statistics the outer factors come from the plain SVD, with a warning. All layers are checked before any is changed.

    Args:
        model: holds the adapter, in whatever way it was added.
        stats: what `calibrate` returned for this model.
        generator: draws the inner factors, on the CPU; the outer factors depend on weights and statistics alone.
        progress: called with the number of layers done and their total after each layer.
    Raises: ValueError if there is no such adapter, it is merged, or the statistics are not of this model.
    """
    layers = {base_name(name): layer for name, layer in nora_layers(unwrapped(model)).items() if adapter_name in layer.r}
    if not layers:
        raise ValueError(f"The model has no NoRA adapter {adapter_name!r}. Add it first, for example with get_peft_model.")
    for name, layer in layers.items():
        _check_can_start(layer, name, stats)
    if stats is None:
        warnings.warn(
            f"No activation statistics: NoRA adapter {adapter_name!r} starts from the plain SVD of the weights. "
            "For AwSVD pass calibrate(model, run_model).",
            stacklevel=2,
        )
    config = model.peft_config[adapter_name]
    for done, (name, layer) in enumerate(layers.items(), start=1):
        stored_scale = layer.nora_activation_scale[adapter_name]
        stored_scale.copy_(torch.ones_like(stored_scale) if stats is None else relative_scale(stats[name]))
        layer.set_outer_factors(adapter_name, *outer_factors(layer, name, layer.r[adapter_name], stored_scale))
        record_reproducible(layer, adapter_name)
        layer.reset_inner_factors(adapter_name, config, generator)
        if progress is not None:
            progress(done, len(layers))
    config.outer_init = "svd" if stats is None else "awsvd"


def _check_can_start(layer: NoraLayer, name: str, stats: ActivationStatistics | None) -> None:
    if layer.merged:
        raise ValueError(f"Cannot initialize {name!r} while {layer.merged_adapters} are merged into it. Unmerge them first.")
    if stats is not None:
        stats.check_layer(name, layer.get_base_layer())
    layer.finite_weight_matrix(name)


def outer_factors(
    layer: NoraLayer, layer_name: str, rank: int, activation_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """B (out, rank) and A (rank, in) for `layer`, functions of its base weight and `activation_scale` (in,) alone.

    The scale is floored at a fraction of its mean and divided by its mean, which leaves B A as it is and keeps both factors
    in the range of half precision. Where all of it is the same, and where the layer saw only zeros, this is the plain SVD.
    """
    weight = layer.finite_weight_matrix(layer_name)
    if not activation_scale.any():
        return reproducible_awsvd(weight, None, rank)
    activation_scale = activation_scale.float()
    return reproducible_awsvd(weight, (activation_scale / activation_scale.mean()).clamp_min(SCALE_FLOOR), rank)


def relative_scale(activation_scale: torch.Tensor) -> torch.Tensor:
    """`activation_scale` (in,) relative to its largest entry, in steps of bfloat16: what the layer keeps of it.

    Two bytes an entry hold it in a compact file, from which the outer factors must come out as they were.
    """
    largest = activation_scale.max()
    return activation_scale if largest == 0 else (activation_scale / largest).bfloat16().to(activation_scale.dtype)
