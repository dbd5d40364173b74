"""Loading a LoRA file onto a pipeline: the whole file is checked against the model before, and verified after loading."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from nora_vision.calibration import base_name
from nora_vision.components import COMPONENTS, adapters_by_component
from nora_vision.files import (
    FOREIGN_DTYPES,
    PICKLE_SUFFIXES,
    PLAIN_NAME,
    AdapterFileError,
    SafetensorsHeader,
    read_header,
    read_json,
    read_tensors,
)
from pipelines.adapter_method import add_adapter
from pipelines.errors import InputError
from pipelines.subject.lora_files import kinds
from pipelines.subject.lora_files.configuration import Settings, checked, settings_of_metadata
from pipelines.subject.lora_files.factors import Change, MisfitError, change_of
from pipelines.subject.lora_files.names import Layer, base_layers, spellings, split_name
from pipelines.subject.lora_files.offsets import OffsetLayer

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_CONFIG, PEFT_FILE = "adapter_config.json", "adapter_model.safetensors"
NORMS = (nn.GroupNorm, nn.LayerNorm)
Changes = dict[Layer, Change]
# The number of names in messages; further ones are counted.
LISTED = 3


def resolve(path: Path) -> tuple[Path, Path | None] | None:
    """The LoRA file at `path`, and PEFT's configuration beside it if there is one; None for a folder without a LoRA file.

    Args:
        path: a file, a folder that PEFT or diffusers saved, or a folder with one .safetensors file.
    Raises: AdapterFileError for a folder with only pickled weights, or with several files.
    """
    if path.is_file():
        beside = path.with_name(PEFT_CONFIG)
        return path, beside if path.name == PEFT_FILE and beside.is_file() else None
    if not path.is_dir():
        return None
    if (path / PEFT_CONFIG).is_file() and (path / PEFT_FILE).is_file():
        return path / PEFT_FILE, path / PEFT_CONFIG
    if (path / DIFFUSERS_FILE).is_file():
        return path / DIFFUSERS_FILE, None
    file = _only_file(path)
    return None if file is None else (file, None)


def _only_file(folder: Path) -> Path | None:
    """The only .safetensors file of a folder; None if there is none."""
    entries = sorted(folder.iterdir())
    files = [entry for entry in entries if entry.suffix.lower() == ".safetensors" and entry.is_file()]
    if len(files) > 1:
        raise AdapterFileError(f"{folder} holds {len(files)} .safetensors files, such as {files[0].name!r}. Give one of them.")
    pickles = [entry.name for entry in entries if entry.suffix.lower() in PICKLE_SUFFIXES]
    if not files and pickles:
        raise AdapterFileError(
            f"{folder} holds the pickle {pickles[0]!r}, which can run code when opened. Only .safetensors files are read."
        )
    return files[0] if files else None


def check_file(path: Path) -> None:
    """Check a LoRA file as far as possible without its model.

    Raises: AdapterFileError or InputError with the problem.
    """
    header = read_header(path, FOREIGN_DTYPES)
    _refuse(header, path)
    settings_of_metadata(header.metadata, path)
    read_tensors(path, dtypes=FOREIGN_DTYPES)
    # Metadata on the base model are often wrong. If the tensor names are ambiguous, the file is checked when it is loaded.
    model = kinds.architecture(replace(header, metadata={}))
    if model not in (None, "SDXL"):
        raise InputError(f"{path} is a LoRA of {model}. Choose a LoRA that was trained on SDXL.")


def left_out(path: Path) -> list[str]:
    """Sentences about tensors that do not change any layer and are ignored, for a file that passes `check_file`."""
    return _left_out(read_header(path, FOREIGN_DTYPES), path)


def load_lora_file(pipeline: StableDiffusionXLPipeline, path: Path, adapter_name: str, config: Path | None = None) -> list[str]:
    """Load a LoRA file of any program as `adapter_name`, active and at scale 1.

    Args:
        config: PEFT's adapter_config.json beside the file.
    Returns: sentences about tensors that were ignored.
    Raises:
        AdapterFileError: the file is damaged or not safe to load.
        InputError: it is not a LoRA of this model; the pipeline is unchanged then.
    """
    header = read_header(path, FOREIGN_DTYPES)
    _refuse(header, path)
    settings = _settings(header, path, config)
    layers = base_layers(pipeline)
    grouped = _grouped(header, path, pipeline, layers)
    tensors = read_tensors(path, dtypes=FOREIGN_DTYPES)
    changes, misfits = {}, []
    for layer, names in grouped.items():
        try:
            changes[layer] = _change(layer, layers[layer], {part: tensors[name] for part, name in names.items()}, settings)
        except MisfitError as error:
            misfits.append(f"in {next(iter(names.values()))!r:.120} {error}")
    if misfits:
        reason = f"{len(grouped) - len(misfits)} of its {len(grouped)} layers fit; {misfits[0]}"
        raise InputError(kinds.misfit_message(path, header, reason))
    apply(pipeline, changes, adapter_name)
    verify(pipeline, adapter_name, path, changes)
    return _left_out(header, path)


def apply(pipeline: StableDiffusionXLPipeline, changes: Changes, adapter_name: str) -> None:
    """Add the changes to the layers of a pipeline as one PEFT adapter; an error leaves the pipeline without it."""
    if any(adapter_name in adapters for adapters in adapters_by_component(pipeline).values()):
        raise InputError(f"The pipeline already has an adapter {adapter_name!r}. Delete it first or choose another name.")
    with ExitStack() as on_failure:
        on_failure.callback(pipeline.delete_adapters, [adapter_name])
        # PEFT initialises each factor at random before it is overwritten; the user's generator must not advance.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # A second adapter on a model is intended here.
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            for component in COMPONENTS:
                component_changes = {layer.name: change for layer, change in changes.items() if layer.component == component}
                if component_changes:
                    _apply(getattr(pipeline, component), component_changes, adapter_name)
        on_failure.pop_all()


def verify(pipeline: StableDiffusionXLPipeline, adapter_name: str, path: Path, expected: Collection[Layer] | None = None) -> None:
    """Check that an adapter was loaded completely: no parameter is on the meta device, and no layer lacks its change.

    Args:
        expected: the layers that must have a change; None for at least one layer.
    Raises: InputError naming the first faulty parameter or layer; the adapter is removed then.
    """
    problem = _problem_of(pipeline, adapter_name, expected)
    if problem is not None:
        if any(adapter_name in adapters for adapters in adapters_by_component(pipeline).values()):
            pipeline.delete_adapters([adapter_name])
        raise InputError(f"{path} was not loaded completely: {problem}. Load it onto the base model that it was trained on.")


def _problem_of(pipeline: StableDiffusionXLPipeline, adapter_name: str, expected: Collection[Layer] | None) -> str | None:
    """The first problem of an adapter that was just loaded; None if there is none."""
    reached, empty = set(), []
    for layer, module in _layers_of(pipeline):
        parts = _adapter_tensors(module, adapter_name)
        reached |= {layer} if parts else set()
        empty += [f"{layer}.{part}" for part, tensors in parts.items() if any(tensor.is_meta for tensor in tensors)]
    if not reached and not expected:
        return "no layer of the model was changed"
    if empty:
        return f"{empty[0]} has no values (it is on the meta device)"
    absent = sorted(set(expected or ()) - reached)
    return f"{absent[0]} was not changed" if absent else None


def _layers_of(pipeline: StableDiffusionXLPipeline) -> Iterator[tuple[Layer, nn.Module]]:
    for component in COMPONENTS:
        for name, module in getattr(pipeline, component).named_modules():
            yield Layer(component, base_name(name)), module


def _adapter_tensors(module: nn.Module, adapter_name: str) -> dict[str, list[torch.Tensor]]:
    """The tensors of an adapter in a PEFT layer, by part."""
    if not isinstance(module, BaseTunerLayer):
        return {}
    parts = {part: getattr(module, part) for part in module.adapter_layer_names if adapter_name in getattr(module, part)}
    values = {part: of_all[adapter_name] for part, of_all in parts.items()}
    return {part: [*value.parameters()] if isinstance(value, nn.Module) else [value] for part, value in values.items()}


def _refuse(header: SafetensorsHeader, path: Path) -> None:
    """Raise an error for tensor names that cannot be those of layers, and for files that are not a LoRA."""
    unsafe = next((name for name in header.tensors if not PLAIN_NAME.fullmatch(name) and not kinds.is_embedding(name)), None)
    # A textual inversion of older diffusers has a single tensor that is named after its word.
    if unsafe is not None and len(header.tensors) > 1:
        raise AdapterFileError(
            f"{path} has a tensor {unsafe!r:.100}, whose name cannot be that of a layer. The file is not used."
        )
    other = kinds.other_kind_message(header, path)
    if other is not None:
        raise InputError(other)


def _settings(header: SafetensorsHeader, path: Path, config: Path | None) -> dict[str, Settings]:
    settings = settings_of_metadata(header.metadata, path)
    if config is None:
        return settings
    fields = read_json(config)
    if str(fields.get("peft_type")).upper() == "NORA":
        raise InputError(f"{config.parent} is one component of a NoRA adapter. Give the folder that contains it.")
    # The tensors determine the changed layers. PEFT may name them by a regular expression, which is not evaluated.
    fields = {name: value for name, value in fields.items() if name not in ("target_modules", "exclude_modules")}
    return {**settings, "": checked(fields, config)}


def _grouped(
    header: SafetensorsHeader, path: Path, pipeline: StableDiffusionXLPipeline, layers: Mapping[Layer, nn.Module]
) -> dict[Layer, dict[str, str]]:
    """The names of the tensors by layer and part.

    Raises: InputError if a tensor belongs to no layer of this model.
    """
    table = spellings(layers, pipeline.unet.config.layers_per_block)
    grouped: dict[Layer, dict[str, str]] = {}
    unknown = []
    for name in header.tensors:
        split = split_name(name)
        layer = None if split is None else table.get(split[0]) or _bare_text_layer(split[0], header.tensors[name].shape, layers)
        if layer is not None and split[1] not in grouped.get(layer, {}):
            grouped.setdefault(layer, {})[split[1]] = name
        elif split is not None or not _is_left_out(header, name):
            unknown.append(name)
    if unknown:
        raise InputError(kinds.misfit_message(path, header, _unused_names(header, unknown, len(grouped))))
    return grouped


def _unused_names(header: SafetensorsHeader, unknown: Sequence[str], fitting: int) -> str:
    """The number of layers that fit, and the tensors that no layer uses."""
    layers = {split[0] for split in map(split_name, header.tensors) if split}
    listed = ", ".join(f"{name!r:.120}" for name in unknown[:LISTED])
    more = f" and {len(unknown) - LISTED} more" if len(unknown) > LISTED else ""
    return f"{fitting} of its {len(layers)} layers are in the model, and no layer uses {listed}{more}"


def _bare_text_layer(name: str, shape: tuple[int, ...], layers: Mapping[Layer, nn.Module]) -> Layer | None:
    """The layer, by its size, of a file in which PEFT saved a single text encoder without naming it; None if none fits."""
    for component in COMPONENTS[1:]:
        for spelling in (name, name.removeprefix("text_model."), f"text_model.{name}"):
            module = layers.get(Layer(component, spelling))
            if isinstance(module, nn.Linear) and {module.in_features, module.out_features} & set(shape):
                return Layer(component, spelling)
    return None


def _is_left_out(header: SafetensorsHeader, name: str) -> bool:
    return kinds.is_embedding(name) or not header.tensors[name].dtype.is_floating_point


def _left_out(header: SafetensorsHeader, path: Path) -> list[str]:
    """Sentences about tensors that do not change any layer and are ignored."""
    embeddings = sorted({name.rpartition(".")[0] or name for name in header.tensors if kinds.is_embedding(name)})
    others = [name for name in header.tensors if split_name(name) is None and not kinds.is_embedding(name)]
    sentences = []
    if embeddings:
        words = ", ".join(repr(name.removeprefix("bundle_emb.")) for name in embeddings[:LISTED])
        sentences.append(
            f"{path} also holds a textual inversion ({words}), which is left out. Only the LoRA is loaded, and these words keep "
            "the base model's meaning in prompts."
        )
    if others:
        sentences.append(f"{path} also holds {', '.join(map(repr, others[:LISTED]))}. No layer uses this, and it is left out.")
    return sentences


def _change(layer: Layer, module: nn.Module, parts: Mapping[str, torch.Tensor], settings: Mapping[str, Settings]) -> Change:
    if not isinstance(module, NORMS):
        return change_of(module, layer.name, parts, settings.get(layer.component, settings.get("")))
    unused = parts.keys() - {"diff", "diff_b", "alpha"}
    if unused:
        raise MisfitError(f"{', '.join(sorted(unused))} cannot be applied to a norm; only diff and diff_b can")
    values = {part: tensor.float().flatten() for part, tensor in parts.items() if part != "alpha"}
    for part, tensor in values.items():
        if module.weight is None or tensor.shape != module.weight.shape:
            size = "no weight" if module.weight is None else f"{module.weight.numel()}"
            raise MisfitError(f"{part} has {tensor.numel()} entries, but the model's norm has {size}")
    return Change(up=values.get("diff"), bias=values.get("diff_b"))


def _apply(model: nn.Module, changes: Mapping[str, Change], adapter_name: str) -> None:
    """Add changes, by layer name, to one component."""
    modules = {base_name(name): module for name, module in model.named_modules() if not name.endswith(".base_layer")}
    norms = {name for name in changes if isinstance(_base(modules[name]), NORMS)}
    low_rank = {name: change for name, change in changes.items() if name not in norms and change.up is not None}
    config = LoraConfig(r=1, target_modules=list(low_rank), init_lora_weights=False, inference_mode=True)
    if low_rank:
        add_adapter(model, config, adapter_name)
        _fill(model, low_rank, config, adapter_name)
    else:
        _register(model, config, adapter_name)
    for name, change in changes.items():
        if change.bias is not None or name in norms:
            _offset_layer(model, name).add(adapter_name, change.up if name in norms else None, change.bias)
    model.set_adapter(adapter_name)


def _fill(model: nn.Module, changes: Mapping[str, Change], config: LoraConfig, adapter_name: str) -> None:
    """Set the rank, the scaling and the factors of each layer of a new adapter."""
    for name, layer in list(model.named_modules()):
        change = changes.get(base_name(name))
        if change is None or not isinstance(layer, LoraLayer) or adapter_name not in layer.r:
            continue
        rank = len(change.down)
        # One configuration cannot say that only some layers are DoRA.
        decomposed = change.magnitude is not None
        layer_config = replace(config, r=rank, use_dora=decomposed) if decomposed else config
        layer.update_layer(adapter_name, rank, lora_alpha=change.scale * rank, config=layer_config)
        pairs = [(layer.lora_A[adapter_name].weight, change.down), (layer.lora_B[adapter_name].weight, change.up)]
        if decomposed:
            pairs.append((layer.lora_magnitude_vector[adapter_name].weight, change.magnitude))
        with torch.no_grad():
            for parameter, value in pairs:
                parameter.copy_(value.reshape(parameter.shape))
        for parameter, _ in pairs:
            parameter.requires_grad_(False)
        config.rank_pattern[base_name(name)], config.alpha_pattern[base_name(name)] = rank, change.scale * rank


def _register(model: nn.Module, config: LoraConfig, adapter_name: str) -> None:
    """Register an adapter without a low-rank part with a component, as `add_adapter` does for others."""
    model.peft_config = {**(getattr(model, "peft_config", None) or {}), adapter_name: config}
    model._hf_peft_config_loaded = True


def _offset_layer(model: nn.Module, name: str) -> OffsetLayer:
    """The `OffsetLayer` around the layer called `name`, which is added if there is none."""
    parent, _, child = name.rpartition(".")
    holder = model.get_submodule(parent)
    outer = layer = getattr(holder, child)
    while isinstance(layer, BaseTunerLayer):
        if isinstance(layer, OffsetLayer):
            return layer
        layer = layer.base_layer
    setattr(holder, child, OffsetLayer(outer))
    return getattr(holder, child)


def _base(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
