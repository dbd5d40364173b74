"""Read native adapter files, which are completely checked, also against the model, before they are used."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from .calibration import ActivationStatistics, BaseCalibration, base_modules
from .compact import EARLIER_PROJECTIONS
from .config import NoraConfig, NoraPeftType
from .files import (
    CONFIGURATION,
    DIGEST,
    DTYPES,
    PLAIN_NAME,
    AdapterFileError,
    check_configuration,
    check_finite,
    read_header,
    read_json,
    read_tensors,
)
from .inner import InnerForm
from .layer_types import layer_class_for
from .packing import (
    PACKED_DTYPES,
    PROBE,
    SCALE,
    SCALES,
    SCALES_DIGEST,
    needs_statistics,
    packed_shapes,
    unpack,
)
from .saving import CONFIG_NAME, LAYOUT, PACKED, PEFT_PREFIX, WEIGHTS_NAME

# In the metadata of compact files of earlier versions: the layer whose scale each layer uses.
SHARED_SCALES = "nora_shared_scales"
METADATA = frozenset({"format", LAYOUT, SHARED_SCALES, SCALES, SCALES_DIGEST, CONFIGURATION, DIGEST})
# Values of the field `compact`, besides PACKED.
FULL, EARLIER = False, True
ALLOWED_DTYPES = {FULL: DTYPES, EARLIER: DTYPES, PACKED: PACKED_DTYPES}
NAME_FIELDS = ("target_modules", "exclude_modules", "modules_to_save", "rank_pattern", "inner_rank_pattern")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class AdapterFile:
    """A checked adapter of one model.

    Args:
        config: its configuration.
        tensors: by name.
        folder: for messages.
        recomputed: whether the outer factors are to be computed again from the base weights.
    """

    config: NoraConfig
    tensors: dict[str, torch.Tensor]
    folder: Path
    recomputed: bool


def read_adapter(model: nn.Module, folder: Path, base_calibration: BaseCalibration | None = None) -> AdapterFile:
    """Read the adapter in `folder` and check it against `model`, which is not changed.

    Raises: AdapterFileError as `load_nora` does.
    """
    _check_files(folder)
    weights = folder / WEIGHTS_NAME
    fields = read_json(folder / CONFIG_NAME)
    config, layout = _read_config(fields, folder / CONFIG_NAME)
    header = read_header(weights, ALLOWED_DTYPES[layout])
    _check_metadata(header.metadata, weights)
    shared = _shared_scales(header.metadata, weights) if layout == EARLIER else {}
    recomputed = layout != FULL and config.is_recomputable
    of_layers = _expected_shapes(model, config, recomputed, shared, weights)
    in_full = _shapes_trained_in_full(model, config)
    expected = packed_shapes(of_layers, header.tensors) if layout == PACKED else of_layers
    _compare({_plain(name): entry.shape for name, entry in header.tensors.items()}, expected | in_full, weights)
    check_configuration(header.metadata, fields, folder)
    _check_all_match(model, config, folder / CONFIG_NAME)
    tensors = {_plain(name): tensor for name, tensor in read_tensors(weights, dtypes=ALLOWED_DTYPES[layout]).items()}
    if layout == PACKED:
        statistics = _statistics(header.metadata, of_layers, base_calibration, weights)
        unpacked = unpack(tensors, header.metadata, of_layers, statistics, str(weights))
        # The compressed scales, and products of factors in 8 bits and their steps, may still be infinite.
        check_finite(unpacked, str(weights))
        tensors = unpacked | {name: tensors[name] for name in in_full}
    tensors |= {f"{name}.{SCALE}": tensors[f"{owner}.{SCALE}"] for name, owner in shared.items()}
    _check_scales(tensors, weights)
    return AdapterFile(config, tensors, folder, recomputed)


def _check_scales(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    for name, tensor in tensors.items():
        if name.endswith(f".{SCALE}") and not (tensor >= 0).all():
            raise AdapterFileError(f"{path}: {name!r} must not be negative.")


def _plain(name: str) -> str:
    return name.removeprefix(PEFT_PREFIX)


def _statistics(
    metadata: Mapping[str, str], shapes: Mapping[str, Shape], base_calibration: BaseCalibration | None, path: Path
) -> ActivationStatistics | None:
    """The statistics of the base calibration at the layers with `shapes`; None if the file stores its scales."""
    if not needs_statistics(metadata):
        return None
    if base_calibration is None:
        raise AdapterFileError(
            f"{path} needs the base calibration, from which its activation scales are computed again, but none was given. Pass "
            "base_calibration, such as nora_vision.sdxl_calibration(pipe)['unet'], load it with load_nora(pipe, ...) or with "
            "pipelines, or use the full adapter or its LoRA export."
        )
    return base_calibration(sorted(name.removesuffix(f".{SCALE}") for name in shapes if name.endswith(f".{SCALE}")))


def _check_files(folder: Path) -> None:
    if not (folder / CONFIG_NAME).is_file():
        raise AdapterFileError(f"{folder} has no {CONFIG_NAME}, so it is not an adapter.")
    if not (folder / WEIGHTS_NAME).is_file():
        others = sorted(file.name for file in folder.iterdir() if file.name != CONFIG_NAME)
        raise AdapterFileError(f"{folder} has no {WEIGHTS_NAME}, only {others}. Other files are not read; a .bin is a pickle.")


def component_folders(path: Path, components: tuple[str, ...]) -> dict[str, Path]:
    """The folders of an adapter by component.

    Raises:
        FileNotFoundError: there is no such folder.
        AdapterFileError: the path is a file, or there is no folder of a component.
    """
    if path.is_file():
        raise AdapterFileError(
            f"{path} is a file; load_nora takes the folder that save_nora wrote. Load LoRA with pipe.load_lora_weights."
        )
    if not path.is_dir():
        raise FileNotFoundError(f"There is no adapter folder {path}.")
    folders = {name: path / name for name in components if (path / name / CONFIG_NAME).is_file() or _weights_in(path / name)}
    if not folders:
        raise AdapterFileError(f"{path} does not contain an adapter in any of the folders {', '.join(components)}.")
    return folders


def _weights_in(folder: Path) -> bool:
    return any(folder.glob("adapter_model.*"))


def _read_config(fields: Mapping[str, Any], path: Path) -> tuple[NoraConfig, bool | str]:
    """The configuration, in inference mode, and the field `compact`: `FULL`, `EARLIER` or `PACKED`."""
    layout = fields.get("compact", FULL)
    fields = {name: value for name, value in fields.items() if name != "compact"}
    if fields.get("peft_type") != NoraPeftType.NORA:
        raise AdapterFileError(
            f"{path} configures an adapter of type {fields.get('peft_type')!r}, not {NoraPeftType.NORA.value!r}."
        )
    unknown = sorted(fields.keys() - {field.name for field in dataclasses.fields(NoraConfig)})
    if unknown or layout not in (FULL, EARLIER, PACKED):
        raise AdapterFileError(f"{path} has fields that this version does not know: {unknown or {'compact': layout}}.")
    for field in NAME_FIELDS:
        _check_names(fields.get(field), field, path)
    if not fields.get("target_modules"):
        raise AdapterFileError(f"{path} must list target_modules, got {fields.get('target_modules')!r}.")
    try:
        return NoraConfig(**{**fields, "inference_mode": True}), layout
    except (TypeError, ValueError, AttributeError) as error:
        raise AdapterFileError(f"{path} is not a valid configuration: {error}") from error


def _check_names(value: Any, field: str, path: Path) -> None:
    """Refuse regular expressions: an untrusted file must not determine what is executed."""
    if value is None:
        return
    names = value if isinstance(value, (list, dict)) else [None]
    bad = next((name for name in names if not isinstance(name, str) or not PLAIN_NAME.fullmatch(name)), "")
    if bad != "":
        raise AdapterFileError(f"{path}: {field} must list plain names, got {bad or value!r}. Save the adapter with save_nora.")


def _check_all_match(model: nn.Module, config: NoraConfig, path: Path) -> None:
    """Refuse names and patterns that match no layer of `model`, as an injection would."""
    names = [name for name, _ in base_modules(model)]
    layers = [name for name in names if check_target_module_exists(config, name)]
    try:
        config.check_modules(names, type(model).__name__)
        config.check_patterns(layers, type(model).__name__)
    except ValueError as error:
        raise AdapterFileError(f"{path} does not fit this model: {error}") from error
    if not layers:
        raise AdapterFileError(f"{path} does not fit this model: it adapts none of its layers.")


def _check_metadata(metadata: Mapping[str, str], path: Path) -> None:
    """Refuse unknown metadata in NoRA's files, since a damaged key of the digest would disable its check."""
    unknown = sorted(metadata.keys() - METADATA)
    if unknown and any(key.startswith("nora_") for key in metadata):
        raise AdapterFileError(f"{path} has metadata that this version does not know: {unknown}. Save the adapter again.")


def _shared_scales(metadata: Mapping[str, str], path: Path) -> dict[str, str]:
    """The layer whose activation scale each other layer of a compact adapter uses."""
    try:
        shared = json.loads(metadata.get(SHARED_SCALES, "{}"))
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} has malformed {SHARED_SCALES}: {error}.") from error
    if not isinstance(shared, dict) or not all(isinstance(owner, str) for owner in shared.values()):
        raise AdapterFileError(f"{path} has malformed {SHARED_SCALES}: it must map layers to layers.")
    return shared


def _expected_shapes(
    model: nn.Module, config: NoraConfig, recomputed: bool, shared: Mapping[str, str], path: Path
) -> dict[str, Shape]:
    """The shapes, by name, of the tensors of all adapted layers, before packing, with this configuration on this model."""
    shapes: dict[str, Shape] = {}
    inputs = {}
    for name, module in base_modules(model):
        if not check_target_module_exists(config, name):
            continue
        try:
            out_features, in_features = layer_class_for(module, name).matrix_shape(module)
            config.check_rank((out_features, in_features), name)
        except ValueError as error:
            raise AdapterFileError(f"{path} does not fit this model: {error}") from error
        inputs[name] = in_features
        form = config.inner_form_for(name)
        shapes |= _inner_shapes(name, form, config.preserve_output)
        if name not in shared:
            shapes[f"{name}.{SCALE}"] = (in_features,)
        probe = {f"{name}.{PROBE}": (1 + EARLIER_PROJECTIONS,)}
        shapes |= probe if recomputed else _outer_shapes(name, out_features, in_features, form.r)
    for name, owner in shared.items():
        if inputs.get(name, -1) != inputs.get(owner) or f"{owner}.{SCALE}" not in shapes:
            raise AdapterFileError(f"{path} does not fit this model: {name!r} cannot use the activation scale of {owner!r}.")
    return shapes


def _inner_shapes(name: str, form: InnerForm, preserve_output: bool) -> dict[str, Shape]:
    shapes = form.shapes() | (form.start_shapes() if preserve_output else {})
    return {f"{name}.{tensor}": shape for tensor, shape in shapes.items()}


def _outer_shapes(name: str, out_features: int, in_features: int, r: int) -> dict[str, Shape]:
    return {f"{name}.nora_A": (r, in_features), f"{name}.nora_B": (out_features, r)}


def _shapes_trained_in_full(model: nn.Module, config: NoraConfig) -> dict[str, Shape]:
    wanted = tuple(config.modules_to_save or ())
    return {
        f"{name}.{key}": tuple(tensor.shape)
        for name, module in base_modules(model)
        if name.endswith(wanted) and wanted
        for key, tensor in module.state_dict().items()
    }


def _compare(actual: Mapping[str, Shape], expected: Mapping[str, Shape], path: Path) -> None:
    unexpected, missing = sorted(actual.keys() - expected.keys()), sorted(expected.keys() - actual.keys())
    for names, what in ((unexpected, "contains {}, which the adapter cannot have on it"), (missing, "lacks {}")):
        if names:
            listed = repr(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")
            raise AdapterFileError(
                f"{path} does not fit this model: it {what.format(listed)}. It belongs to another base model, or is incomplete."
            )
    for name, shape in actual.items():
        if shape != expected[name]:
            raise AdapterFileError(
                f"{path} does not fit this model: {name!r} has shape {shape}, the model needs {expected[name]}."
            )
