"""Export an adapter as a standard LoRA file, which diffusers, A1111, ComfyUI and sd-scripts load without this package.

The weight change of a NoRA layer, s B B' A' A, is a product of two low-rank factors, so the export is exact. A change whose rank
is too high is approximated, and the file's metadata say what is left out (`nora_vision.approximation`), unless the kohya file can
hold the change in a form of LyCORIS.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, get_args

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .approximation import LeftOut, left_out_norm, norm
from .calibration import base_name, unwrapped
from .components import adapted_components
from .factors import Factors, in_weight_shape, low_rank_factors
from .files import write_tensors
from .kohya import SDXL_TEXT_WIDTH, SDXL_WIDTHS, kohya_header, kohya_name
from .lycoris import LycorisForm, lycoris_form

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

ExportFormat = Literal["diffusers", "kohya"]
NO_METADATA: Mapping[str, str] = MappingProxyType({})


# By component and by the layer's name.
Changes = dict[str, dict[str, Factors]]
Forms = dict[str, dict[str, LycorisForm]]


def export_lora(
    pipe: StableDiffusionXLPipeline,
    path: str | os.PathLike,
    adapter_name: str | Mapping[str, float] = "default",
    format: ExportFormat = "diffusers",
    metadata: Mapping[str, str] = NO_METADATA,
) -> Path:
    """Write an adapter of any method at scale 1 as one LoRA file and return the file's path.

    Several adapters with their scales become one, exactly; their ranks add up:
    `sum_i w_i up_i down_i = [w_1 up_1 ... w_n up_n] [down_1; ...; down_n]`.

    diffusers: lora_B = s B B', lora_A = A' A and no alpha, which a loader reads as alpha = rank.
    kohya: lora_up, lora_down and the same alpha for all layers, since diffusers misreads different alphas.
    DoRA adds the norms of rows: lora_magnitude_vector, or kohya's dora_scale (LyCORIS with `wd_on_output`). Programs differ in
    how they use dora_scale, and diffusers drops it from a kohya file; only the diffusers file is reliable.
    LoHa, LoKr and IA3 keep their form in a kohya file, which diffusers does not read.

    Args:
        pipe: with the adapter on its UNet, its text encoders, or both.
        path: the .safetensors file to write, or the folder to write it in.
        adapter_name: name of the adapter, or names and scales of several.
        metadata: further entries of the file's header, such as "modelspec.title".
    Raises: ValueError if no component has the adapter, or a part of it is not a low-rank change of a known layer;
        nothing is written then.
    """
    if format not in get_args(ExportFormat):
        raise ValueError(f"format must be one of {get_args(ExportFormat)}, got {format!r}.")
    scales = {adapter_name: 1.0} if isinstance(adapter_name, str) else dict(adapter_name)
    if not scales:
        raise ValueError("There must be at least one adapter to export, got none.")
    of_each = [(_changes_by_component(pipe, name), scale) for name, scale in scales.items()]
    if not isinstance(adapter_name, str):
        return _write(pipe, Path(path), format, _sum_of(of_each), {}, list(scales), metadata)
    forms = _forms_by_component(pipe, adapter_name)
    return _write(pipe, Path(path), format, of_each[0][0], forms, [adapter_name], metadata)


def export_both(
    pipe: StableDiffusionXLPipeline,
    diffusers_path: os.PathLike,
    kohya_path: os.PathLike,
    adapter_name: str,
    metadata: Mapping[str, str] = NO_METADATA,
) -> dict[ExportFormat, Path]:
    """Write an adapter at scale 1 in both formats, for which its factors are computed once.

    Args:
        metadata: further entries of both headers.
    Returns: the files' paths.
    Raises: as `export_lora`.
    """
    changes, forms = _changes_by_component(pipe, adapter_name), _forms_by_component(pipe, adapter_name)
    paths: dict[ExportFormat, Path] = {"diffusers": Path(diffusers_path), "kohya": Path(kohya_path)}
    return {format: _write(pipe, path, format, changes, forms, [adapter_name], metadata) for format, path in paths.items()}


def _write(
    pipe: StableDiffusionXLPipeline,
    path: Path,
    format: ExportFormat,
    changes: Changes,
    forms: Forms,
    adapter_names: Sequence[str],
    metadata: Mapping[str, str],
) -> Path:
    """Write one file; see `export_lora`."""
    if format == "diffusers":
        path = path if path.suffix == ".safetensors" else path / "pytorch_lora_weights.safetensors"
        write_tensors(path, _diffusers_tensors(changes), {**_left_out(changes, {}), **metadata})
    else:
        path = (
            path if path.suffix == ".safetensors" else path / f"{'-'.join(Path(name).name for name in adapter_names)}.safetensors"
        )
        _write_kohya(pipe, path, changes, forms, adapter_names, metadata)
    return path


def _left_out(changes: Changes, forms: Forms) -> dict[str, str]:
    """The metadata on what the factors of layers without a form of LyCORIS leave out; empty for an exact file."""
    approximated = {
        f"{component}.{name}": change
        for component, factors in changes.items()
        for name, change in factors.items()
        if name not in forms.get(component, {})
    }
    left_out = LeftOut.of(approximated) if approximated else None
    return {} if left_out is None else left_out.metadata()


def _write_kohya(
    pipe: StableDiffusionXLPipeline,
    path: Path,
    changes: Changes,
    forms: Forms,
    adapter_names: Sequence[str],
    metadata: Mapping[str, str],
) -> None:
    rank = Counter(len(change.down) for factors in changes.values() for change in factors.values()).most_common(1)[0][0]
    tensors = _kohya_tensors(changes, forms, float(rank), pipe.unet.config.layers_per_block)
    arguments = {"method": "+".join(sorted({_method(pipe, name) for name in adapter_names}))}
    algorithms = {form.algorithm for of_component in forms.values() for form in of_component.values()}
    widths, text_width = tuple(pipe.unet.config.block_out_channels), pipe.unet.config.cross_attention_dim
    header = kohya_header(
        tensors,
        title=path.stem,
        is_sdxl=(widths, text_width) == (SDXL_WIDTHS, SDXL_TEXT_WIDTH),
        rank=rank,
        network_args={**arguments, **({"algo": min(algorithms)} if algorithms else {})},
        prediction_type=pipe.scheduler.config.prediction_type,
        zero_terminal_snr=bool(pipe.scheduler.config.get("rescale_betas_zero_snr")),
        resolution=pipe.unet.config.sample_size * pipe.vae_scale_factor,
    )
    if algorithms:
        header["ss_network_module"] = "lycoris.kohya"
    write_tensors(path, tensors, {**header, **_left_out(changes, forms), **metadata})


def _method(pipe: StableDiffusionXLPipeline, adapter_name: str) -> str:
    return next(iter(adapted_components(pipe, adapter_name).values())).peft_config[adapter_name].peft_type.value


def _changes_by_component(pipe: StableDiffusionXLPipeline, adapter_name: str) -> Changes:
    components = adapted_components(pipe, adapter_name)
    return {name: low_rank_changes(model, name, adapter_name) for name, model in components.items()}


def _forms_by_component(pipe: StableDiffusionXLPipeline, adapter_name: str) -> Forms:
    """The layers whose change has a form of LyCORIS."""
    forms: Forms = {}
    for component, model in adapted_components(pipe, adapter_name).items():
        for name, layer in unwrapped(model).named_modules():
            form = lycoris_form(layer, adapter_name)
            if form is not None:
                forms.setdefault(component, {})[_exported_name(base_name(name), component)] = form
    return forms


def _exported_name(name: str, component: str) -> str:
    """The name of a layer in exported files; those in a text encoder start with `text_model.`."""
    return name if component == "unet" else f"text_model.{name.removeprefix('text_model.')}"


def _sum_of(of_each: Sequence[tuple[Changes, float]]) -> Changes:
    """The sum of the changes of several adapters, each times its scale, by layer.

    Raises: ValueError for a DoRA, which scales the rows of the changed weight, so that changes do not add up.
    """
    total: Changes = {}
    for changes, scale in of_each:
        for component, factors in changes.items():
            layers = total.setdefault(component, {})
            for name, change in factors.items():
                if change.magnitude is not None:
                    raise ValueError(
                        f"{component}.{name} has a DoRA, which cannot be added to other adapters. Leave the DoRA out."
                    )
                scaled = change._replace(up=scale * change.up)
                layers[name] = _added(layers[name], scaled) if name in layers else scaled
    return total


def _added(first: Factors, second: Factors) -> Factors:
    """The factors of the sum of two changes. What both leave out together is at most the sum of their norms."""
    total = Factors(torch.cat([first.up, second.up], dim=1), torch.cat([first.down, second.down]))
    left_out = left_out_norm(first) + left_out_norm(second)
    return total if left_out == 0 else total._replace(relative_error=left_out / (left_out**2 + norm(total) ** 2) ** 0.5)


def low_rank_changes(model: nn.Module, component: str, adapter_name: str) -> dict[str, Factors]:
    """The factors of every adapted layer's change at scale 1, by layer name.

    Linear: up (out, k), down (k, in). Conv2d: up (out, k, 1, 1), down (k, in, kh, kw). Names in a text encoder start with
    `text_model.`, whether or not this version of transformers has that level.

    Raises: ValueError for a part of the adapter that is not such a change, or that stock loaders drop.
    """
    changes = {}
    for name, layer in unwrapped(model).named_modules():
        name = base_name(name)
        if isinstance(layer, AuxiliaryTrainingWrapper) and adapter_name in getattr(layer, "modules_to_save", {}):
            raise ValueError(f"{component}.{name} was trained in full (modules_to_save), which a LoRA file cannot contain.")
        factors = _layer_factors(layer, f"{component}.{name}", adapter_name)
        if factors is None:
            continue
        if component != "unet" and name.endswith("text_projection"):
            raise ValueError(f"{component}.{name}: stock LoRA loaders drop text_projection. Leave it out of target_modules.")
        changes[_exported_name(name, component)] = in_weight_shape(layer.get_base_layer(), factors)
    return changes if component == "unet" else _with_attention_output(unwrapped(model), changes)


def _layer_factors(layer: nn.Module, name: str, adapter_name: str) -> Factors | None:
    """See `low_rank_factors`; an error names the layer."""
    try:
        return low_rank_factors(layer, adapter_name)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from error


def _with_attention_output(text_encoder: nn.Module, changes: dict[str, Factors]) -> dict[str, Factors]:
    """`changes`, with a zero change of one attention output if there is none.

    diffusers detects the format of text encoder keys by the attention outputs, and fails without any.
    """
    if any(name.endswith("out_proj") for name in changes):
        return changes
    name, layer = next((name, layer) for name, layer in text_encoder.named_modules() if name.endswith("out_proj"))
    first = next(iter(changes.values()))
    rank = len(first.down)
    norms = None if first.magnitude is None else layer.weight.detach().float().norm(dim=1)
    zeros = Factors(torch.zeros(layer.out_features, rank), torch.zeros(rank, layer.in_features), norms)
    return {**changes, f"text_model.{name.removeprefix('text_model.')}": zeros}


def _diffusers_tensors(changes: Changes) -> dict[str, torch.Tensor]:
    tensors = {}
    for component, factors in changes.items():
        for name, change in factors.items():
            tensors[f"{component}.{name}.lora_B.weight"] = change.up
            tensors[f"{component}.{name}.lora_A.weight"] = change.down
            if change.magnitude is not None:
                # In PEFT a convolution has (1, out, 1, 1).
                norms = change.magnitude if change.up.ndim == 2 else change.magnitude[None, :, None, None]
                tensors[f"{component}.{name}.lora_magnitude_vector.weight"] = norms
    return tensors


def _kohya_tensors(changes: Changes, forms: Forms, alpha: float, layers_per_block: int) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for component, factors in changes.items():
        for name, change in factors.items():
            form = forms.get(component, {}).get(name)
            parts = _kohya_parts(change, alpha) if form is None else form.parts
            key = kohya_name(component, name, layers_per_block)
            tensors |= {f"{key}.{part}": tensor for part, tensor in parts.items()}
    return tensors


def _kohya_parts(change: Factors, alpha: float) -> dict[str, torch.Tensor]:
    """The tensors of a layer, by the part of their names."""
    # A loader multiplies by alpha / rank.
    up = change.up * (len(change.down) / alpha)
    parts = {"lora_up.weight": up, "lora_down.weight": change.down, "alpha": torch.tensor(alpha)}
    if change.magnitude is not None:
        parts["dora_scale"] = change.magnitude.reshape(-1, *(1,) * (change.up.ndim - 1))
    return parts
