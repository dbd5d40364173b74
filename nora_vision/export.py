"""Export an adapter as a standard LoRA file, which diffusers, A1111, ComfyUI and sd-scripts load without this package.

The weight change of a NoRA layer, s B B' A' A, is a product of two low-rank factors, so the export is exact.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .calibration import base_name, unwrapped
from .components import adapted_components
from .factors import Factors, in_weight_shape, low_rank_factors
from .files import write_tensors
from .kohya import kohya_header, kohya_name

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

ExportFormat = Literal["diffusers", "kohya"]


# By component and by the layer's name.
Changes = dict[str, dict[str, Factors]]


def export_lora(
    pipe: StableDiffusionXLPipeline,
    path: str | os.PathLike,
    adapter_name: str | Mapping[str, float] = "default",
    format: ExportFormat = "diffusers",
) -> Path:
    """Write an adapter (NoRA, or PEFT's LoRA or DoRA) at scale 1 as one LoRA file and return the file's path.

    Several adapters with their scales become one, exactly; their ranks add up:
    `sum_i w_i up_i down_i = [w_1 up_1 ... w_n up_n] [down_1; ...; down_n]`.

    diffusers: lora_B = s B B', lora_A = A' A and no alpha, which a loader reads as alpha = rank.
    kohya: lora_up, lora_down and the same alpha for all layers, since diffusers misreads different alphas.
    DoRA adds the norms of rows: lora_magnitude_vector, or kohya's dora_scale (LyCORIS with `wd_on_output`). Programs differ in
    how they use dora_scale, and diffusers drops it from a kohya file; only the diffusers file is reliable.

    Args:
        pipe: with the adapter on its UNet, its text encoders, or both.
        path: the .safetensors file to write, or the folder to write it in.
        adapter_name: name of the adapter, or names and scales of several.
    Raises: ValueError if no component has the adapter, or a part of it is not a low-rank change of a known layer;
        nothing is written then.
    """
    if format not in get_args(ExportFormat):
        raise ValueError(f"format must be one of {get_args(ExportFormat)}, got {format!r}.")
    scales = {adapter_name: 1.0} if isinstance(adapter_name, str) else dict(adapter_name)
    if not scales:
        raise ValueError("There must be at least one adapter to export, got none.")
    of_each = [(_changes_by_component(pipe, name), scale) for name, scale in scales.items()]
    changes = of_each[0][0] if isinstance(adapter_name, str) else _sum_of(of_each)
    path = Path(path)
    if format == "diffusers":
        path = path if path.suffix == ".safetensors" else path / "pytorch_lora_weights.safetensors"
        write_tensors(path, _diffusers_tensors(changes))
    else:
        path = path if path.suffix == ".safetensors" else path / f"{'-'.join(Path(name).name for name in scales)}.safetensors"
        _write_kohya(pipe, path, changes, list(scales))
    return path


def _write_kohya(pipe: StableDiffusionXLPipeline, path: Path, changes: Changes, adapter_names: Sequence[str]) -> None:
    rank = Counter(len(change.down) for factors in changes.values() for change in factors.values()).most_common(1)[0][0]
    tensors = _kohya_tensors(changes, float(rank), pipe.unet.config.layers_per_block)
    header = kohya_header(
        tensors,
        title=path.stem,
        rank=rank,
        network_args={"method": "+".join(sorted({_method(pipe, name) for name in adapter_names}))},
        prediction_type=pipe.scheduler.config.prediction_type,
        zero_terminal_snr=bool(pipe.scheduler.config.get("rescale_betas_zero_snr")),
        resolution=pipe.unet.config.sample_size * pipe.vae_scale_factor,
    )
    write_tensors(path, tensors, header)


def _method(pipe: StableDiffusionXLPipeline, adapter_name: str) -> str:
    return next(iter(adapted_components(pipe, adapter_name).values())).peft_config[adapter_name].peft_type.value


def _changes_by_component(pipe: StableDiffusionXLPipeline, adapter_name: str) -> Changes:
    components = adapted_components(pipe, adapter_name)
    return {name: low_rank_changes(model, name, adapter_name) for name, model in components.items()}


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
                up = scale * change.up
                previous = layers.get(name)
                layers[name] = Factors(
                    up if previous is None else torch.cat([previous.up, up], dim=1),
                    change.down if previous is None else torch.cat([previous.down, change.down]),
                )
    return total


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
        if component != "unet":
            if name.endswith("text_projection"):
                raise ValueError(f"{component}.{name}: stock LoRA loaders drop text_projection. Leave it out of target_modules.")
            name = f"text_model.{name.removeprefix('text_model.')}"
        changes[name] = in_weight_shape(layer.get_base_layer(), factors)
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


def _kohya_tensors(changes: Changes, alpha: float, layers_per_block: int) -> dict[str, torch.Tensor]:
    tensors = {}
    for component, factors in changes.items():
        for name, change in factors.items():
            key = kohya_name(component, name, layers_per_block)
            # A loader multiplies by alpha / rank.
            tensors[f"{key}.lora_up.weight"] = change.up * (len(change.down) / alpha)
            tensors[f"{key}.lora_down.weight"] = change.down
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
            if change.magnitude is not None:
                tensors[f"{key}.dora_scale"] = change.magnitude.reshape(-1, *(1,) * (change.up.ndim - 1))
    return tensors
