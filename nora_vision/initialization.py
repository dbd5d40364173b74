"""Data-driven initialisation: outer factors by AwSVD from activation statistics, or from gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from .calibration import ActivationStatistics, base_name, unwrapped
from .compensation import nearest_inner_factors
from .config import Calibration, NoraConfig
from .decomposition import CURRENT, EARLIER, reproducible_awsvd
from .factors import Factors
from .layer import NoraLayer, nora_layers
from .outer import scaled_outer_factors
from .quantization import UnquantizedWeights, dequantized_weight, is_quantized
from .reproducible import record_reproducible, weight_digest
from .rounding import rounded_outer_factors
from .scales import coarse_scale
from .weighting import NOT_DIAGONAL, SCALE_FLOOR, InputRoot, in_float64


def initialize_nora_weights(
    model: nn.Module,
    stats: ActivationStatistics | None = None,
    adapter_name: str = "default",
    *,
    factors: Mapping[str, Factors] | None = None,
    generator: torch.Generator | None = None,
    progress: Callable[[int, int], None] | None = None,
    unquantized: UnquantizedWeights | None = None,
    loftq_start: bool = False,
    calibration: Calibration = "data",
) -> None:
    """Initialise the adapter: outer factors by AwSVD of each base weight, inner factors according to its configuration.

    Without statistics this is the plain SVD, with a warning unless the configured weighting is "none".

    Args:
        model: with the adapter, added in any way.
        stats: the result of `calibrate` for this model and the configuration's weighting.
        factors: for a basis other than "weight": B (out, r) and A (r, in) by layer name, from `gradient_factors`.
        generator: of the inner factors, on the CPU; the outer factors depend only on weights and statistics.
        progress: called after each layer with the number of finished layers and their total.
        unquantized: reads the weights before quantisation, such as `CheckpointWeights(folder)`; the outer factors are theirs.
        loftq_start: start each inner pair where the change is nearest to what quantisation removed, W - Q(W), in the norm of
            the activations  [LoftQ, Li et al. 2023, within NoRA's outer factors]. Needs `unquantized`.
        calibration: "base" for statistics that can be computed again: the scale is rounded, and compact files leave it out.
    Raises: ValueError if an argument does not fit the adapter, its configuration or the model; nothing is changed then.
    """
    config = _checked_config(model, adapter_name, unquantized, loftq_start)
    stats = None if config.weighting == "none" else stats
    layers = _checked_layers(model, adapter_name, stats, factors)
    for done, (name, layer) in enumerate(layers.items(), start=1):
        _set_scale(layer, name, adapter_name, config, stats if factors is None else None, calibration)
        with _unquantized_weight(layer, name, unquantized):
            _set_outer_factors(layer, name, adapter_name, config, stats, factors)
            _start_inner_factors(layer, adapter_name, config, generator, loftq_start)
        if progress is not None:
            progress(done, len(layers))
    config.outer_init, config.calibration = ("svd", "data") if stats is None else ("awsvd", calibration)
    config.nora_vision_decomposition = CURRENT


def decomposition_of(model: nn.Module, adapter_name: str) -> str:
    """The algorithm that gave the adapter's outer factors: `CURRENT`, or `EARLIER` after `use_decomposition`."""
    return getattr(model.peft_config[adapter_name], "nora_vision_decomposition", CURRENT)


@torch.no_grad()
def use_decomposition(model: nn.Module, adapter_name: str, decomposition: str) -> None:
    """Compute the outer factors again if they are not those of `decomposition`; the inner ones stay.

    Earlier versions also took the outer factors of a quantised layer from its quantised weight.

    Args:
        decomposition: as `decomposition_of` returned it when the inner factors were trained.
    Raises: ValueError if this version has no such algorithm, or the adapter's outer factors are not those of its weights.
    """
    config, before = model.peft_config[adapter_name], decomposition_of(model, adapter_name)
    if decomposition == before:
        return
    if decomposition not in (CURRENT, EARLIER) or before != CURRENT:
        raise ValueError(f"they were computed by {decomposition!r}, but here by {before!r}.")
    if not config.is_recomputable:
        raise ValueError(f"no earlier version had the weighting {config.weighting!r} and the basis {config.basis!r}.")
    for name, layer in nora_layers(unwrapped(model)).items():
        if adapter_name in layer.r:
            layer.unquantized_digest = None
            layer.set_outer_factors(adapter_name, *outer_factors(layer, adapter_name, base_name(name), legacy=True))
            record_reproducible(layer, adapter_name)
    # Not a field, because files need none: readers try both algorithms.
    config.nora_vision_decomposition = decomposition


def _start_inner_factors(
    layer: NoraLayer, adapter_name: str, config: NoraConfig, generator: torch.Generator | None, loftq_start: bool
) -> None:
    layer.reset_inner_factors(adapter_name, config, generator)
    if loftq_start and layer.unquantized is not None:
        _start_at_residual(layer, adapter_name)


def _set_scale(
    layer: NoraLayer,
    name: str,
    adapter_name: str,
    config: NoraConfig,
    stats: ActivationStatistics | None,
    calibration: Calibration,
) -> None:
    """Set the activation scale of the adapter from the statistics of the layer `name`; ones without any, as for given factors."""
    scale = layer.nora_activation_scale[adapter_name]
    rounded = coarse_scale if calibration == "base" else relative_scale
    scale.copy_(torch.ones_like(scale) if stats is None else rounded(stats.scale(name, config.weighting)))


def _set_outer_factors(
    layer: NoraLayer,
    name: str,
    adapter_name: str,
    config: NoraConfig,
    stats: ActivationStatistics | None,
    factors: Mapping[str, Factors] | None,
) -> None:
    """Set the layer's outer factors to those in `factors`, or to those from its weight and activation scale."""
    if factors is not None:
        scaled = scaled_outer_factors(factors[name].up.double(), factors[name].down.double(), config.outer_scaling)
        _set_stored_outer_factors(layer, name, adapter_name, config, *scaled)
    elif stats is not None and config.weighting in NOT_DIAGONAL:
        weighted = weighted_factors(layer, adapter_name, name, stats.root(name, config.weighting))
        _set_stored_outer_factors(layer, name, adapter_name, config, *weighted)
    else:
        layer.set_outer_factors(adapter_name, *outer_factors(layer, adapter_name, name))
        record_reproducible(layer, adapter_name)


def _set_stored_outer_factors(
    layer: NoraLayer, name: str, adapter_name: str, config: NoraConfig, B: torch.Tensor, A: torch.Tensor
) -> None:
    """Set outer factors that files must contain, rounded to the configured precision."""
    rounded = rounded_outer_factors(B, A, config.outer_dtype)
    layer.set_outer_factors(adapter_name, *rounded)
    stored = layer.nora_B[adapter_name], layer.nora_A[adapter_name]
    if config.outer_dtype == "int4" and not all(torch.equal(a.to(b), b) for a, b in zip(stored, rounded, strict=True)):
        raise ValueError(
            f"The outer factors of {name!r} must be at least {torch.finfo(stored[0].dtype).smallest_normal:.1g} or 0 in "
            f"{stored[0].dtype} to be exact in 4 bits, but some are smaller. Use bfloat16 or float32 weights, or "
            "outer_dtype='base'."
        )


def _checked_layers(
    model: nn.Module,
    adapter_name: str,
    stats: ActivationStatistics | None,
    factors: Mapping[str, Factors] | None,
) -> dict[str, NoraLayer]:
    """The adapter's layers by name, after checking that each can be initialised.

    Warns if the outer factors will be those of the plain SVD although a weighting is configured.

    Raises: ValueError if a layer cannot be initialised.
    """
    layers = {base_name(name): layer for name, layer in nora_layers(unwrapped(model)).items() if adapter_name in layer.r}
    config = model.peft_config[adapter_name]
    _check_factors(config, layers, factors)
    for name, layer in layers.items():
        _check_can_start(layer, name, stats)
    if stats is None and factors is None and config.weighting != "none":
        warnings.warn(
            f"No activation statistics: NoRA adapter {adapter_name!r} starts from the plain SVD of the weights. "
            "For AwSVD pass calibrate(model, run_model).",
            stacklevel=3,
        )
    return layers


@contextmanager
def _unquantized_weight(layer: NoraLayer, name: str, unquantized: UnquantizedWeights | None) -> Iterator[None]:
    """A context in which the layer has its unquantised weight, which is released afterwards.

    Raises: ValueError if it has another shape than the base layer's.
    """
    layer.unquantized_digest = None
    if unquantized is None or not is_quantized(layer.get_base_layer()):
        yield
        return
    weight, shape = unquantized(name), dequantized_weight(layer.get_base_layer()).shape
    if weight.shape != shape:
        raise ValueError(
            f"The unquantised weight of {name!r} must have the shape {tuple(shape)} of the quantised one, got "
            f"{tuple(weight.shape)}. Read it from the checkpoint that the model was loaded from."
        )
    layer.unquantized_digest = weight_digest(weight)
    layer.unquantized = weight.to(layer.get_base_layer().weight.device)
    del weight
    try:
        yield
    finally:
        layer.unquantized = None


def _checked_config(model: nn.Module, adapter_name: str, unquantized: UnquantizedWeights | None, loftq_start: bool) -> NoraConfig:
    """The adapter's configuration.

    Raises: ValueError if there is none, or the start from the residual of quantisation cannot be used with it.
    """
    layers = [layer for layer in nora_layers(unwrapped(model)).values() if adapter_name in layer.r]
    if not layers:
        raise ValueError(f"The model has no NoRA adapter {adapter_name!r}. Add it first, for example with get_peft_model.")
    if unquantized is not None and not any(is_quantized(layer.get_base_layer()) for layer in layers):
        raise ValueError(f"`unquantized` is for quantised models, but no layer of {adapter_name!r} is quantised. Leave it out.")
    config = model.peft_config[adapter_name]
    if loftq_start:
        _check_loftq_start(config, unquantized)
    return config


def _check_loftq_start(config: NoraConfig, unquantized: UnquantizedWeights | None) -> None:
    if unquantized is None:
        raise ValueError("loftq_start needs the unquantised weights. Give `unquantized`, such as CheckpointWeights(folder).")
    if config.preserve_output:
        raise ValueError(
            "loftq_start cannot be used with preserve_output, which subtracts the start of the change. Leave one of them out."
        )
    if config.inner_form != "serial" or config.num_subspaces != 1:
        raise ValueError(
            f"loftq_start needs inner_form='serial' and num_subspaces=1, got {config.inner_form!r} and {config.num_subspaces}."
        )


def _check_can_start(layer: NoraLayer, name: str, stats: ActivationStatistics | None) -> None:
    if layer.merged:
        raise ValueError(f"Cannot initialize {name!r} while {layer.merged_adapters} are merged into it. Unmerge them first.")
    if stats is not None:
        stats.check_layer(name, layer.get_base_layer())
    layer.finite_weight_matrix(name)


def _check_factors(config: NoraConfig, names: Collection[str], factors: Mapping[str, object] | None) -> None:
    if (factors is not None) != (config.basis != "weight"):
        raise ValueError(
            f"The basis {config.basis!r} needs {'no ' if config.basis == 'weight' else ''}factors. Give factors for the bases "
            "'gradient' and 'mixed', computed by gradient_factors, and none for 'weight'."
        )
    missing = sorted(set(names) - factors.keys()) if factors is not None else []
    if missing:
        raise ValueError(f"factors must name every adapted layer, but {missing[0]!r} is missing ({len(missing)} in all).")


def weighted_factors(layer: NoraLayer, adapter_name: str, layer_name: str, root: InputRoot) -> tuple[torch.Tensor, torch.Tensor]:
    """B = U_r S_r (out, r) and A = V_r^T F^-1 (r, in) of the adapter, float64, with W F = U S V^T."""
    weight = in_float64(layer.finite_weight_matrix(layer_name))
    root = root.to(weight.device)
    B, A = reproducible_awsvd(root.weigh(weight), None, layer.r[adapter_name], layer.outer_slice[adapter_name])
    return scaled_outer_factors(B, root.unweigh(A), layer.outer_scaling[adapter_name])


def outer_factors(
    layer: NoraLayer, adapter_name: str, layer_name: str, *, legacy: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """B (out, r) and A (r, in) of the adapter, which depend only on the base weight and the adapter's activation scale (in,).

    The scale is divided by its mean, which does not change B A and keeps both factors in the range of half precision, and
    floored. For a constant scale, and for a layer that saw only zeros, this is the plain SVD.

    Args:
        legacy: as in `reproducible_awsvd`.
    """
    weight, relative = layer.finite_weight_matrix(layer_name), _column_weights(layer, adapter_name)
    factors = reproducible_awsvd(weight, relative, layer.r[adapter_name], layer.outer_slice[adapter_name], legacy=legacy)
    return scaled_outer_factors(*factors, layer.outer_scaling[adapter_name])


def _column_weights(layer: NoraLayer, adapter_name: str) -> torch.Tensor | None:
    """The diagonal (in,) of AwSVD's norm; None for the plain norm of a layer that saw only zeros."""
    scale = layer.nora_activation_scale[adapter_name].float()
    return (scale / scale.mean()).clamp_min(SCALE_FLOOR) if scale.any() else None


@torch.no_grad()
def _start_at_residual(layer: NoraLayer, adapter_name: str) -> None:
    """Set the adapter's inner factors so that its change is nearest to W - Q(W)."""
    residual = layer.base_weight().float() - dequantized_weight(layer.get_base_layer()).float()
    factors = layer.nora_B[adapter_name], layer.nora_A[adapter_name]
    up, down = nearest_inner_factors(
        layer._as_matrix(residual), *factors, _column_weights(layer, adapter_name), layer.inner_r[adapter_name]
    )
    factor = layer.scaling[adapter_name] ** -0.5
    layer.nora_inner_B[adapter_name].copy_(factor * up)
    layer.nora_inner_A[adapter_name].copy_(factor * down)


def relative_scale(activation_scale: torch.Tensor) -> torch.Tensor:
    """`activation_scale` (in,) relative to its largest entry, rounded to bfloat16, as the layer stores it.

    A compact file stores it in two bytes per entry, and the outer factors are recomputed from it exactly.
    """
    largest = activation_scale.max()
    return activation_scale if largest == 0 else (activation_scale / largest).bfloat16().to(activation_scale.dtype)
