"""Save native adapters: a folder per component with PEFT's `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .calibration import base_name, unwrapped
from .compact import check_compact, reproducible_probe
from .components import COMPONENTS, adapted_components
from .config import NoraConfig
from .files import CONFIGURATION, check_finite, configuration_digest, write_json, write_tensors
from .layer import NoraLayer, nora_layers
from .packing import PROBE, pack

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
# The prefix of names inside PeftModel; load_nora accepts names with and without it.
PEFT_PREFIX = "base_model.model."
OUTER_FACTORS = (".nora_A", ".nora_B")
# Key of the header's metadata.
LAYOUT = "nora_layout"
# The field `compact` of a compact adapter's configuration; it is true in files of earlier versions, which were not packed.
PACKED = "packed"

Part = tuple[dict[str, torch.Tensor], dict[str, str], dict[str, Any]]


def save_nora(
    pipe: StableDiffusionXLPipeline, path: str | os.PathLike, adapter_name: str = "default", compact: bool = False
) -> Path:
    """Save the adapter of every component that has it, at scale 1, into the folder `path`, which is returned.

    Full adapters contain all factors in PEFT's format: `PeftModel.from_pretrained(unet, path / "unet")` reads them, without
    checking the digests of tensors and configuration as `load_nora` does.
    Compact adapters contain the inner factors, the activation scales and a probe, and need the same base weights on loading. With
    the base calibration, they contain only one bit for each entry of a scale, and need the calibration on loading, too.

    Raises:
        ValueError: no component has the adapter, it is not a NoRA adapter, or its outer factors are not set.
        AdapterFileError: a value is not finite, or `compact` is set and outer factors cannot be recomputed from the weights.
            Nothing is written in any of these cases.
    """
    path = Path(path)
    parts = {name: _collect(model, name, adapter_name, compact) for name, model in adapted_components(pipe, adapter_name).items()}
    for component in COMPONENTS:
        if component in parts:
            _write(path / component, parts[component])
        else:
            # Files of an earlier adapter in this folder must not be loaded with this one.
            for name in (CONFIG_NAME, WEIGHTS_NAME):
                (path / component / name).unlink(missing_ok=True)
    return path


def save_adapter(model: nn.Module, folder: str | os.PathLike, adapter_name: str = "default", compact: bool = False) -> Path:
    """Save the NoRA adapter of one model into `folder`; see `save_nora`."""
    _write(Path(folder), _collect(model, type(model).__name__, adapter_name, compact))
    return Path(folder)


def adapter_tensors(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """All tensors of the adapter in `model`, by names without the adapter's name, such as `<layer>.nora_A`.

    Shapes are those of `NoraLayer`; modules that are trained in full are included.
    """
    tensors = {}
    for name, module in unwrapped(model).named_modules():
        name = base_name(name)
        if isinstance(module, NoraLayer) and adapter_name in module.r:
            for kind, factors in module.named_children():
                if isinstance(factors, (BufferDict, nn.ParameterDict)) and adapter_name in factors:
                    tensors[f"{name}.{kind}"] = factors[adapter_name].detach()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            state = module.adapter_state_dict(adapter_name, module.state_dict())
            tensors |= {f"{name}.{key}": tensor for key, tensor in state.items()}
    return tensors


def _collect(model: nn.Module, where: str, adapter_name: str, compact: bool) -> Part:
    """Tensors, metadata and configuration to write for one component."""
    config = model.peft_config[adapter_name]
    if not isinstance(config, NoraConfig):
        raise ValueError(f"Adapter {adapter_name!r} of {where} is a {type(config).__name__}, not NoRA. Save it with diffusers.")
    layers = {base_name(n): layer for n, layer in nora_layers(unwrapped(model)).items() if adapter_name in layer.r}
    for layer in layers.values():
        # Raises where the outer factors are not set yet.
        layer._inner_factors(adapter_name, scaling=1.0)
    tensors = adapter_tensors(model, adapter_name)
    check_finite(tensors, f"Adapter {adapter_name!r} of {where} is not saved")
    metadata = {LAYOUT: PACKED if compact else "full"}
    fields = _portable_fields(config, layers, adapter_name)
    packed: dict[str, torch.Tensor] = {}
    if compact:
        check_compact(config, f"Adapter {adapter_name!r} of {where}")
        fields["compact"] = PACKED
        of_layers = {name: tensors.pop(name) for name in list(tensors) if name.rpartition(".")[0] in layers}
        packed, scales = _packed(of_layers, config, layers, adapter_name, where)
        metadata |= scales
    metadata[CONFIGURATION] = configuration_digest(fields)
    return packed | {PEFT_PREFIX + name: tensor for name, tensor in tensors.items()}, metadata, fields


def _packed(
    tensors: dict[str, torch.Tensor], config: NoraConfig, layers: dict[str, NoraLayer], adapter_name: str, where: str
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of all layers as in a compact file, and metadata of its header."""
    if not config.is_recomputable:
        return pack(tensors, base_calibration=False)
    probes = {f"{name}.{PROBE}": reproducible_probe(layer, adapter_name, f"{where}.{name}") for name, layer in layers.items()}
    recomputed = {name: tensor for name, tensor in tensors.items() if not name.endswith(OUTER_FACTORS)}
    return pack(recomputed | probes, base_calibration=config.calibration == "base")


def _write(folder: Path, part: Part) -> None:
    tensors, metadata, fields = part
    write_tensors(folder / WEIGHTS_NAME, tensors, metadata, digest=True)
    write_json(folder / CONFIG_NAME, fields)


def _portable_fields(config: NoraConfig, layers: dict[str, NoraLayer], adapter_name: str) -> dict[str, Any]:
    """The configuration with regular expressions replaced by the names that they match, since readers refuse them."""
    fields = config.to_dict() | {"inference_mode": True, "base_model_name_or_path": None}
    if isinstance(config.target_modules, str) or isinstance(config.exclude_modules, str):
        fields |= {"target_modules": sorted(layers), "exclude_modules": None}
    for pattern, default, ranks in (("rank_pattern", config.r, "r"), ("inner_rank_pattern", config.inner_r, "inner_r")):
        ranks_by_layer = {name: getattr(layer, ranks)[adapter_name] for name, layer in layers.items()}
        fields[pattern] = {f"^{name}": rank for name, rank in ranks_by_layer.items() if rank != default}
    return fields
