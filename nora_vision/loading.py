"""Load native adapters. Files are checked before anything is applied, and an error leaves the model unchanged."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import inject_adapter_in_model, set_peft_model_state_dict
from peft.functional import delete_adapter
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .base_calibration import sdxl_calibration
from .calibration import BaseCalibration, base_name
from .compact import recomputed_outer_factors
from .components import COMPONENTS, adapters_by_component
from .files import AdapterFileError
from .layer import NoraLayer, nora_layers
from .packing import PROBE
from .reading import AdapterFile, component_folders, read_adapter
from .reproducible import record_reproducible

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline


def load_nora(
    pipe: StableDiffusionXLPipeline,
    path: str | os.PathLike,
    adapter_name: str | None = None,
    base_calibration: Mapping[str, BaseCalibration] | None = None,
) -> str:
    """Load a full or compact NoRA adapter into the pipeline, make it the active one, and return its name.

    `set_adapters`, `fuse_lora`, `unfuse_lora`, `disable_lora`, `enable_lora` and `delete_adapters` then work as for LoRA.

    Args:
        path: the folder that `save_nora` wrote.
        adapter_name: name of the adapter; by default the first free of "default_0", "default_1", ...
        base_calibration: for each component, the calibration that compact files need if their scales are not stored; by default
            `sdxl_calibration(pipe)`.
    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the name is in use or not valid, or the weights are offloaded layer by layer.
        AdapterFileError: a file must not be used (pickle, damaged, changed after it was saved, not finite) or does not fit
            this model; the message names the file and the layer or value. The pipeline stays unchanged in all of these cases.
    """
    path = Path(path)
    adapter_name = _free_name(pipe, adapter_name)
    folders = component_folders(path, COMPONENTS)
    absent = [name for name in folders if getattr(pipe, name, None) is None]
    if absent:
        raise AdapterFileError(f"{path} adapts {', '.join(absent)}, which this pipeline does not have.")
    for name in folders:
        if any(parameter.is_meta for parameter in getattr(pipe, name).parameters()):
            raise ValueError(f"The weights of {name} are offloaded. Load adapters before enable_sequential_cpu_offload().")
    given = sdxl_calibration(pipe) if base_calibration is None else base_calibration
    adapters = {name: read_adapter(getattr(pipe, name), folder, given.get(name)) for name, folder in folders.items()}
    with ExitStack() as on_failure:
        for name, adapter in adapters.items():
            on_failure.callback(apply_adapter(getattr(pipe, name), adapter, adapter_name))
        on_failure.pop_all()
    return adapter_name


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike,
    adapter_name: str = "default",
    base_calibration: BaseCalibration | None = None,
) -> None:
    """Load the NoRA adapter of one model from `folder`; see `load_nora`.

    Args:
        base_calibration: needed only by compact files whose scales are not stored.
    """
    if adapter_name in (getattr(model, "peft_config", None) or {}):
        raise ValueError(f"The model already has an adapter {adapter_name!r}. Delete it first or choose another name.")
    apply_adapter(model, read_adapter(model, Path(folder), base_calibration), adapter_name)


def apply_adapter(model: nn.Module, adapter: AdapterFile, adapter_name: str) -> Callable[[], None]:
    """Add a checked adapter to `model` and return a function that removes it.

    Raises: AdapterFileError if the outer factors of a compact adapter cannot be recomputed; the model stays unchanged then.
    """
    undo = _restoring(model, adapter_name)
    with ExitStack() as on_failure:
        on_failure.callback(undo)
        device = next(model.parameters()).device
        # The initial factors that injection samples are overwritten, so sampling must not change the user's random state.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            inject_adapter_in_model(adapter.config, model, adapter_name)
        model._hf_peft_config_loaded = True
        probes = {name.removesuffix(f".{PROBE}"): t for name, t in adapter.tensors.items() if name.endswith(f".{PROBE}")}
        state = {name: tensor for name, tensor in adapter.tensors.items() if not name.endswith(f".{PROBE}")}
        set_peft_model_state_dict(model, state, adapter_name)
        if adapter.recomputed:
            for name, layer in nora_layers(model).items():
                if adapter_name in layer.r:
                    _complete(layer, adapter_name, probes[base_name(name)], f"{adapter.folder}, layer {base_name(name)}")
        on_failure.pop_all()
    return undo


def _complete(layer: NoraLayer, adapter_name: str, probe: torch.Tensor, where: str) -> None:
    """Set the outer factors of a layer of a compact adapter, checked with the probe."""
    layer.set_outer_factors(adapter_name, *recomputed_outer_factors(layer, adapter_name, probe, where))
    record_reproducible(layer, adapter_name)


def _restoring(model: nn.Module, adapter_name: str) -> Callable[[], None]:
    """A function that restores the current state of `model` after the adapter, or a part of it, was added."""
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    modules = set(model.modules())
    active = {layer: layer.active_adapters[:] for layer in modules if isinstance(layer, BaseTunerLayer)}
    # Adding an adapter unmerges fused ones, for which NoRA replaces the weight and does not change this tensor.
    fused = {
        layer: (layer.get_base_layer().weight.data, layer.merged_adapters[:], dict(layer._merged_scaling))
        for layer in modules
        if isinstance(layer, NoraLayer) and layer.merged
    }
    had_adapters = getattr(model, "_hf_peft_config_loaded", False)

    def restore() -> None:
        """Remove the adapter and restore everything else."""
        configs = getattr(model, "peft_config", {})
        configs.pop(adapter_name, None)
        delete_adapter(model, adapter_name, prefix="nora_", layer_cls=NoraLayer)
        _unwrap_all_but(model, modules)
        for layer, names in active.items():
            layer.set_adapter(names)
        for layer, (weight, names, scaling) in fused.items():
            layer.get_base_layer().weight.data, layer.merged_adapters, layer._merged_scaling = weight, names, scaling
        for parameter, requires_grad in trained.items():
            parameter.requires_grad_(requires_grad)
        model._hf_peft_config_loaded = had_adapters
        if not configs and hasattr(model, "peft_config"):
            del model.peft_config

    return restore


def _unwrap_all_but(model: nn.Module, modules: Collection[nn.Module]) -> None:
    """Replace PEFT's wrappers by the modules that they wrap, except for wrappers in `modules`."""
    for name, module in list(model.named_modules()):
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and module not in modules:
            parent, _, child = name.rpartition(".")
            original = module.base_layer if isinstance(module, BaseTunerLayer) else module.original_module
            setattr(model.get_submodule(parent), child, original)


def _free_name(pipe: StableDiffusionXLPipeline, adapter_name: str | None) -> str:
    taken = {name for names in adapters_by_component(pipe).values() for name in names}
    if adapter_name is None:
        return next(name for name in (f"default_{i}" for i in range(len(taken) + 1)) if name not in taken)
    if adapter_name in taken:
        raise ValueError(f"The pipeline already has an adapter {adapter_name!r}. Delete it first or choose another name.")
    if not adapter_name or "." in adapter_name:
        raise ValueError(f"An adapter's name must not be empty or contain a dot, got {adapter_name!r}.")
    return adapter_name
