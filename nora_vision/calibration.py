"""Activation statistics: the magnitude of each input of each layer over calibration inputs, and moments that weightings need."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .config import NoraConfig
from .files import DTYPES as FILE_DTYPES
from .files import AdapterFileError, read_header, read_tensors, tensor_bytes, write_tensors
from .layer import NoraLayer
from .layer_types import find_layer_class, layer_class_for
from .moments import KINDS, add_moments, empty_moments
from .quantization import keep_differentiable
from .weighting import LOW_RANK, MOMENTS, ROBUST, InputRoot, covariance_root, diagonal_low_rank_root, robust_scale

# Keys of the header's metadata: the fingerprints of the layers' weights, and the kind of moments in tensors `<layer>:<kind>`.
STATISTICS, MOMENTS_KIND = "nora_activation_statistics", "nora_activation_moments"
DTYPES = FILE_DTYPES | {"F64": torch.float64, "I32": torch.int32}


class ActivationStatistics(Mapping[str, torch.Tensor]):
    """S = sqrt(diag(X^T X)) of every calibrated layer, by layer name: (in,) float32, with `in` as in `NoraLayer`.

    Statistics do not depend on the rank of an adapter. They store a fingerprint of each layer's weight and are refused for other
    weights. For weightings other than `none` and `diagonal` they also hold moments of one kind; see `nora_vision.moments`.

    Args:
        scales: S by layer name.
        fingerprints: of the weights, by layer name.
        kind: of the moments; empty for none.
        moments: by layer name.
    """

    def __init__(
        self,
        scales: Mapping[str, torch.Tensor],
        fingerprints: Mapping[str, str],
        kind: str = "",
        moments: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self._scales = dict(scales)
        self.fingerprints = dict(fingerprints)
        self.kind: str = kind
        self.moments: Mapping[str, torch.Tensor] = {} if moments is None else moments

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._scales[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._scales)

    def __len__(self) -> int:
        return len(self._scales)

    def check_layer(self, name: str, base_layer: nn.Module) -> None:
        """Check that these statistics were collected at `base_layer`, the layer called `name`.

        Raises: ValueError naming the layer if it was not calibrated or has another weight.
        """
        if name not in self:
            raise ValueError(f"There are no activation statistics of {name!r}. Call calibrate with inputs that reach this layer.")
        if self.fingerprints[name] != fingerprint(base_layer.weight):
            raise ValueError(
                f"The activation statistics belong to another model: the weight of {name!r} differs from the one calibrated. "
                "Call calibrate on this model."
            )

    def supports(self, weighting: str) -> bool:
        """Whether `calibrate` collected what `weighting` needs."""
        return MOMENTS.get(weighting, self.kind) == self.kind

    def scale(self, name: str, weighting: str = "diagonal") -> torch.Tensor:
        """The scale of each input of the layer `name`, (in,) float32: robust for robust weightings, S for the others but `none`.

        Raises: ValueError if the statistics lack what `weighting` needs.
        """
        self._check_supports(weighting)
        if weighting == "none":
            return torch.ones_like(self[name])
        if weighting in ROBUST:
            return robust_scale(self.moments[name], weighting)
        return self[name]

    def root(self, name: str, weighting: str = "diagonal", low_rank: int = LOW_RANK) -> InputRoot:
        """F of the layer `name` under `weighting`, on the CPU.

        Args:
            low_rank: rank of the part of low rank of `diagonal_low_rank`.
        Raises: ValueError if the statistics lack what `weighting` needs.
        """
        self._check_supports(weighting)
        if weighting == "covariance":
            return covariance_root(self.moments[name])
        if weighting == "diagonal_low_rank":
            return diagonal_low_rank_root(self.moments[name], self[name].double().square(), low_rank)
        return InputRoot.diagonal(self.scale(name, weighting))

    def condition_number(self, name: str, weighting: str = "diagonal", low_rank: int = LOW_RANK) -> float:
        """The largest singular value of F divided by the smallest, which is floored; see `root`."""
        return self.root(name, weighting, low_rank).condition_number

    def summary(self, weighting: str = "diagonal") -> str:
        """A sentence about the condition numbers of F over all layers."""
        numbers = {name: self.condition_number(name, weighting) for name in self}
        worst = max(numbers, key=numbers.__getitem__)
        return (
            f"Condition number of the weighting {weighting} over {len(numbers)} layers: median {median(numbers.values()):.3g}, "
            f"largest {numbers[worst]:.3g} ({worst})."
        )

    def _check_supports(self, weighting: str) -> None:
        if not self.supports(weighting):
            raise ValueError(
                f"The weighting {weighting!r} needs activation statistics with the {MOMENTS[weighting]} of the inputs, but these "
                f"have {f'the {self.kind}' if self.kind else 'only their squares'}. Call calibrate with weighting={weighting!r}."
            )

    def save(self, path: str | os.PathLike) -> None:
        """Write the statistics and fingerprints to a .safetensors file."""
        metadata = {STATISTICS: json.dumps(self.fingerprints, sort_keys=True)}
        tensors = dict(self._scales)
        if self.kind:
            metadata[MOMENTS_KIND] = self.kind
            tensors |= {f"{name}:{self.kind}": moments for name, moments in self.moments.items()}
        write_tensors(path, tensors, metadata, digest=True)

    @classmethod
    def load(cls, path: str | os.PathLike) -> ActivationStatistics:
        """Read the file that `save` wrote.

        Raises: AdapterFileError naming the file if it is damaged or contains something else.
        """
        metadata, scales = read_header(path, DTYPES).metadata, read_tensors(path, dtypes=DTYPES)
        kind = metadata.get(MOMENTS_KIND, "")
        moments = {name: scales.pop(f"{name}:{kind}") for name in list(scales) if f"{name}:{kind}" in scales}
        refusal = AdapterFileError(f"{path} does not contain activation statistics. Write them with ActivationStatistics.save.")
        try:
            fingerprints = json.loads(metadata.get(STATISTICS, ""))
        except (ValueError, RecursionError) as error:
            raise refusal from error
        if not isinstance(fingerprints, dict) or fingerprints.keys() != scales.keys() or kind not in ("", *KINDS):
            raise refusal
        _check_tensors(path, scales, kind, moments)
        return cls({name: scale.float() for name, scale in scales.items()}, fingerprints, kind, moments)


def _check_tensors(
    path: str | os.PathLike, scales: Mapping[str, torch.Tensor], kind: str, moments: Mapping[str, torch.Tensor]
) -> None:
    """Check that every layer has a vector of scales and, if `kind` is not empty, moments of the right shape.

    Raises: AdapterFileError naming the file and the layer.
    """
    for name, scale in scales.items():
        if scale.ndim != 1 or (scale < 0).any():
            raise AdapterFileError(f"{path}: the statistics of {name!r} must be one vector without negative entries.")
        if not kind:
            continue
        shape = empty_moments(kind, len(scale), torch.device("meta")).shape
        if name not in moments or moments[name].shape != shape:
            raise AdapterFileError(f"{path}: the {kind} of {name!r} must be a matrix {tuple(shape)}.")


# Computes the statistics of a base calibration at the layers of these names.
BaseCalibration = Callable[[list[str]], ActivationStatistics]


def calibrate(
    model: nn.Module,
    run_model: Callable[[], Any],
    target_modules: list[str] | str | None = None,
    *,
    weighting: str = "diagonal",
    layers: Collection[str] | None = None,
) -> ActivationStatistics:
    """Collect S = sqrt(diag(X^T X)) at the input of each layer while `run_model()` calls `model`.

    X stacks every token (or output position) of every call. Sums are float64 and are reduced over all ranks if torch.distributed
    is initialised. NoRA adapters are disabled during calibration, so that the base model is measured.

    Args:
        model: with or without adapters. Its NoRA layers are calibrated or, if it has none, all supported layers.
        run_model: called once without arguments, under no_grad, to run `model` on the calibration inputs.
        target_modules: restricts the layers of a model without adapters, as in `NoraConfig`.
        weighting: of the outer factors. Robust ones add a histogram of |x| for each input (1,032 bytes), `diagonal_low_rank` a
            sketch of X^T X (512 bytes for each input), and `covariance` X^T X (8 bytes for each pair of inputs of a layer).
        layers: the names of those to calibrate; by default all.
    Raises: ValueError if nothing was calibrated, an input was not finite, or an adapter is merged.
    """
    candidates = _layers_to_calibrate(model, target_modules)
    keep_differentiable(model)
    chosen = candidates if layers is None else {name: candidates[name] for name in layers}
    with _adapters_off(candidates):
        return _collected(chosen, run_model, over_ranks=True, kind=MOMENTS.get(weighting, ""))


def calibrate_layers(model: nn.Module, names: Collection[str], run_model: Callable[[], Any]) -> ActivationStatistics:
    """As `calibrate`, at the layers of these names, and of this process alone.

    Raises: ValueError also if `model` lacks one of the layers, or `run_model` does not call it.
    """
    layers = {base_name(name): module for name, module in unwrapped(model).named_modules() if not name.endswith(".base_layer")}
    missing = sorted(set(names) - layers.keys())
    if missing:
        raise ValueError(f"The layers to calibrate must be layers of {type(model).__name__}, which has no {missing[0]!r}.")
    statistics = _collected({name: layers[name] for name in sorted(names)}, run_model, over_ranks=False)
    if unused := sorted(set(names) - statistics.keys()):
        raise ValueError(f"The calibration did not call {unused[0]!r}. Adapt only layers that the model uses.")
    return statistics


def _collected(
    layers: dict[str, nn.Module], run_model: Callable[[], Any], over_ranks: bool, kind: str = ""
) -> ActivationStatistics:
    """The statistics of `layers` by name, whose sums are over all ranks or of this one, with moments of the kind `kind`."""
    totals = {name: _Total(_base(module), name, kind) for name, module in layers.items()}
    with ExitStack() as stack:
        stack.enter_context(_adapters_off(layers))
        for name, module in layers.items():
            stack.callback(module.register_forward_pre_hook(totals[name].add, with_kwargs=True).remove)
        stack.enter_context(torch.no_grad())
        run_model()
    if over_ranks:
        _sum_over_ranks(list(totals.values()))
    scales = {name: total.squares.sqrt().float().cpu() for name, total in totals.items() if total.calls > 0}
    if not scales:
        raise ValueError(f"run_model called none of the {len(layers)} layers to calibrate. It must run `model`.")
    for name, scale in scales.items():
        if not torch.isfinite(scale).all():
            raise ValueError(f"The inputs of {name!r} must be finite, got NaN or infinite values during calibration.")
    moments = {name: totals[name].moments.cpu() for name in scales if kind}
    return ActivationStatistics(scales, {name: fingerprint(_base(layers[name]).weight) for name in scales}, kind, moments)


def fingerprint(weight: torch.Tensor) -> str:
    """The hash of the dtype, shape and bytes of `weight`, of any shape."""
    digest = hashlib.blake2b(f"{weight.dtype} {tuple(weight.shape)}".encode(), digest_size=16)
    digest.update(tensor_bytes(weight))
    return digest.hexdigest()


def base_name(name: str) -> str:
    """The name of a module before adapters wrapped it."""
    return name.replace(".base_layer", "")


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the model by name, without itself and without the wrappers of adapters."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or name.startswith(inside or "\0"):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            inside += (f"{name}.",)
            module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
        yield name, module


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a PeftModel or tuner, whose module names are those of the base model."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return model.model if isinstance(model, BaseTuner) else model


def _layers_to_calibrate(model: nn.Module, target_modules: list[str] | str | None) -> dict[str, nn.Module]:
    modules = {name: module for name, module in unwrapped(model).named_modules() if name}
    layers = {base_name(name): module for name, module in modules.items() if isinstance(module, NoraLayer)}
    if not layers:
        matching = NoraConfig(target_modules=target_modules)
        layers = {
            base_name(name): module
            for name, module in modules.items()
            if find_layer_class(module) and (target_modules is None or check_target_module_exists(matching, base_name(name)))
        }
    if not layers:
        raise ValueError(f"No layer to calibrate: target_modules {target_modules!r} match none of {type(model).__name__}.")
    return layers


def _base(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


class _Total:
    """Running sums of squares and of moments of the kind `kind` at the input of one layer."""

    def __init__(self, base_layer: nn.Module, layer_name: str, kind: str = "") -> None:
        self.layer_class, self.base_layer = layer_class_for(base_layer, layer_name), base_layer
        device = base_layer.weight.device
        # MPS has no float64.
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        in_features = self.layer_class.matrix_shape(base_layer)[1]
        # The last entry counts calls, to distinguish a layer that never ran from one with inputs of zero.
        self.sums = torch.zeros(in_features + 1, dtype=self.dtype, device=device)
        self.kind = kind
        self.moments = empty_moments(kind, in_features, device) if kind else self.sums.new_zeros(0)

    @property
    def squares(self) -> torch.Tensor:
        """(in,)"""
        return self.sums[:-1]

    @property
    def calls(self) -> torch.Tensor:
        """()"""
        return self.sums[-1]

    def add(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Add the input of one call; a forward pre-hook."""
        x = next(iter((*args, *kwargs.values())))
        x = x.to(self.dtype)
        self.squares.add_(self.layer_class.input_squares(self.base_layer, x))
        self.calls.add_(1)
        if self.kind:
            for rows in self.layer_class.input_rows(self.base_layer, x):
                add_moments(self.kind, self.moments, rows)


def _sum_over_ranks(totals: list[_Total]) -> None:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    for total in totals:
        torch.distributed.all_reduce(total.sums)
        if total.kind:
            torch.distributed.all_reduce(total.moments)


@contextmanager
def _adapters_off(layers: dict[str, nn.Module]) -> Iterator[None]:
    """Disable the adapters of the NoRA layers among `layers`."""
    adapted = {name: layer for name, layer in layers.items() if isinstance(layer, NoraLayer)}
    for name, layer in adapted.items():
        if layer.merged:
            raise ValueError(f"Cannot calibrate while {layer.merged_adapters} are merged into {name!r}. Unmerge them first.")
    before = {layer: layer.disable_adapters for layer in adapted.values()}
    for layer in adapted.values():
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, disabled in before.items():
            layer._disable_adapters = disabled
