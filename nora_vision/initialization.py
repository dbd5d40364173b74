"""Data-driven initialisation: outer factors by AwSVD from activation statistics."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import nn

from .calibration import ActivationStatistics, base_name, unwrapped
from .decomposition import reproducible_awsvd
from .layer import NoraLayer, nora_layers
from .outer import scaled_outer_factors
from .reproducible import record_reproducible

# Without a floor, inputs with tiny activations in the calibration would get huge factors.
SCALE_FLOOR = 1e-3


def initialize_nora_weights(
    model: nn.Module,
    stats: ActivationStatistics | None = None,
    adapter_name: str = "default",
    *,
    generator: torch.Generator | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Initialise the adapter: outer factors by AwSVD of each base weight, inner factors according to its configuration.

    Without statistics the outer factors are those of the plain SVD, with a warning. All layers are checked before any is changed.

    Args:
        model: with the adapter, added in any way.
        stats: the result of `calibrate` for this model.
        generator: of the inner factors, on the CPU; the outer factors depend only on weights and statistics.
        progress: called after each layer with the number of finished layers and their total.
    Raises: ValueError if there is no such adapter, it is merged, or the statistics are of another model.
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
        layer.set_outer_factors(adapter_name, *outer_factors(layer, adapter_name, name))
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
    layer: NoraLayer, adapter_name: str, layer_name: str, *, legacy: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """B (out, r) and A (r, in) of the adapter, which depend only on the base weight and the adapter's activation scale (in,).

    The scale is divided by its mean, which does not change B A and keeps both factors in the range of half precision, and
    floored. For a constant scale, and for a layer that saw only zeros, this is the plain SVD.

    Args:
        legacy: as in `reproducible_awsvd`.
    """
    weight, scale = layer.finite_weight_matrix(layer_name), layer.nora_activation_scale[adapter_name].float()
    relative = (scale / scale.mean()).clamp_min(SCALE_FLOOR) if scale.any() else None
    factors = reproducible_awsvd(weight, relative, layer.r[adapter_name], layer.outer_slice[adapter_name], legacy=legacy)
    return scaled_outer_factors(*factors, layer.outer_scaling[adapter_name])


def relative_scale(activation_scale: torch.Tensor) -> torch.Tensor:
    """`activation_scale` (in,) relative to its largest entry, rounded to bfloat16, as the layer stores it.

    A compact file stores it in two bytes per entry, and the outer factors are recomputed from it exactly.
    """
    largest = activation_scale.max()
    return activation_scale if largest == 0 else (activation_scale / largest).bfloat16().to(activation_scale.dtype)
