"""Export an adapted CLIP model for use without this package: merged weights, plain LoRA, torch.export and ONNX.

Everything is exported at the adapter's current scale.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

from nora_vision.approximation import LeftOut
from nora_vision.factors import Factors, low_rank_factors
from nora_vision.files import replacing, write_tensors
from pipelines.adapter_method import ADAPTER_NAME, tuner_layers
from pipelines.clip import Clip, checkpoint_metadata
from pipelines.clip_attention import repack, separate
from pipelines.errors import InputError
from pipelines.lora_conversion import as_lora
from pipelines.native_files import WEIGHTS, save_config
from pipelines.packages import installed

logger = logging.getLogger(__name__)
# Largest difference between PyTorch and another runtime in single precision, on features of length 1.
TOLERANCE = 1e-4


def merged(clip: Clip, packed: bool = True) -> Clip:
    """A copy of `clip` with its adapters merged into the weights.

    Args:
        packed: restores the original attention classes, and with them the original state-dict keys.
    Raises: ValueError naming the layer if a merged weight is not finite.
    """
    model = copy.deepcopy(clip.model)
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, BaseTunerLayer):
            continue
        if not layer.disable_adapters:
            try:
                layer.merge(safe_merge=True)
            except ValueError as error:
                raise ValueError(f"The adapter on {name!r} cannot be merged: {error}") from error
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    for module in model.modules():
        if hasattr(module, "peft_config"):
            del module.peft_config
    if packed:
        repack(model)
    return replace(clip, model=model.requires_grad_(False))


def save_merged(clip: Clip, path: str | os.PathLike) -> None:
    """Write the merged weights as an open_clip checkpoint, a .safetensors file with the keys of the base model.

    Its metadata hold the activation and the preprocessing, which `load_clip(model, path)` reads; open_clip itself takes them as
    arguments.
    """
    model = merged(clip).model
    write_tensors(path, model.state_dict(), checkpoint_metadata(model))


def save_lora(components: dict[str, nn.Module], folder: Path, scale: float = 1.0) -> None:
    """Write the adapter as plain LoRA in PEFT's layout, one folder per encoder.

    A change without low rank is approximated; the log and the file's metadata say how much is left out.

    `PeftModel.from_pretrained` loads a folder onto the encoder after `separate` has split its attention.

    Args:
        scale: factor of every weight change.
    Raises: InputError for a weight change that LoRA cannot represent, such as DoRA's at scale 0.
    """
    for name, model in components.items():
        factors = {layer: _factors(module, layer, scale) for layer, module in tuner_layers(model).items()}
        config, tensors = as_lora(factors)
        save_config(config, folder / name)
        left_out = LeftOut.of(factors)
        write_tensors(folder / name / WEIGHTS, tensors, {} if left_out is None else left_out.metadata())
        if left_out is not None:
            logger.warning(f"{folder / name / WEIGHTS} is not exact: {left_out}. The merged model and the adapter are exact.")


def _factors(layer: BaseTunerLayer, name: str, scale: float) -> Factors:
    try:
        factors = low_rank_factors(layer, ADAPTER_NAME)
    except ValueError as error:
        raise InputError(f"{name} {error}") from error
    if factors.magnitude is not None and scale != 1:
        raise InputError(
            f"An adapter with magnitudes can be exported as LoRA only at scale 1, got {scale:g} ({name}). Use scale 1."
        )
    return factors._replace(up=scale * factors.up)


class ImageTower(nn.Module):
    """Pixels (n, 3, h, w) to features (n, d) float32 of length 1."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = _part(model, lambda name: name == "visual")

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(n, 3, h, w) to (n, d)."""
        return F.normalize(self.model.encode_image(pixels).float(), dim=-1)


class TextTower(nn.Module):
    """Token ids (n, t) int64 over the whole context to features (n, d) float32 of length 1, those of the end token."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = _part(model, lambda name: name != "visual")

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(n, t) to (n, d)."""
        return F.normalize(self.model.encode_text(tokens).float(), dim=-1)


def _part(model: nn.Module, wanted: Callable[[str], bool]) -> nn.Module:
    """A shallow copy of open_clip's model, which holds the code of both encoders, with only the `wanted` modules."""
    part = copy.copy(model)
    part._modules = {name: module for name, module in model._modules.items() if wanted(name)}
    return part


def export_towers(clip: Clip, tokens: torch.Tensor) -> dict[str, ExportedProgram]:
    """Export both encoders of the merged model with torch.export, for any batch size.

    Args:
        tokens: (n, t), token ids of at least two example texts.
    Returns: the programs "image" and "text", on the CPU in single precision.
    """
    # Packed attention takes a fast path in evaluation mode that other runtimes do not support.
    model = merged(clip, packed=False).model.cpu().float().eval()
    separate(model)
    batch = Dim("batch")
    programs = {}
    for name, (tower, example) in _towers(model, tokens).items():
        with torch.no_grad():
            programs[name] = torch.export.export(tower, (example,), dynamic_shapes=({0: batch},))
    return programs


def save_exported(clip: Clip, folder: Path, tokens: torch.Tensor, format: Literal["torch", "onnx"] = "onnx") -> dict[str, Path]:
    """Write both encoders of the merged model and compare the features of the files with PyTorch's.

    The inputs are `pixels` (n, 3, h, w) and `tokens` (n, t) int64 for any n, the outputs `features` (n, d) float32 of length 1.

    Args:
        tokens: (n, t), token ids of at least two example texts.
        format: "torch" writes torch.export's .pt2, "onnx" .onnx.
    Raises: InputError if a package is missing; ValueError if the features differ.
    """
    if format not in ("torch", "onnx"):
        raise InputError(f"format must be torch or onnx, got {format!r}.")
    programs = export_towers(clip, tokens)
    files = {}
    for name, program in programs.items():
        files[name] = folder / f"{name}.{'pt2' if format == 'torch' else 'onnx'}"
        _write(program, files[name], format)
        example = program.example_inputs[0][0]
        # Other values and another batch size than in the traced example.
        other = torch.cat([example.flip(0), example[:1]])
        with torch.no_grad():
            expected = program.module()(other)
        difference = (run_exported(files[name], other) - expected).abs().max().item()
        if not difference <= TOLERANCE:
            raise ValueError(
                f"The features of {files[name]} must match PyTorch's within {TOLERANCE:.0e}, but differ by {difference:.1e}. "
                "Export to the other format."
            )
    return files


def run_exported(file: Path, inputs: torch.Tensor) -> torch.Tensor:
    """The features (n, d) float32 that an encoder's .pt2 or .onnx file computes from pixels (n, 3, h, w) or tokens (n, t)."""
    if file.suffix == ".pt2":
        with torch.no_grad():
            return torch.export.load(file).module()(inputs)
    session = installed("onnxruntime", "ONNX").InferenceSession(str(file), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return torch.from_numpy(session.run(["features"], {name: inputs.numpy()})[0])


def _towers(model: nn.Module, tokens: torch.Tensor) -> Mapping[str, tuple[nn.Module, torch.Tensor]]:
    """Each encoder as a separate module, with example inputs."""
    generator = torch.Generator().manual_seed(0)
    size = model.visual.image_size
    height, width = size if isinstance(size, tuple) else (size, size)
    pixels = torch.randn(len(tokens), 3, height, width, generator=generator)
    return {"image": (ImageTower(model), pixels), "text": (TextTower(model), tokens.cpu())}


def _write(program: ExportedProgram, file: Path, format: str) -> None:
    with replacing(file) as beside:
        if format == "torch":
            with beside.open("wb") as stream:
                torch.export.save(program, stream)
            return
        installed("onnxscript", "ONNX")
        (name,) = (spec for spec in ("pixels", "tokens") if spec in program.graph_signature.user_inputs)
        torch.onnx.export(
            program, f=beside, dynamo=True, input_names=[name], output_names=["features"], external_data=False, verbose=False
        )
