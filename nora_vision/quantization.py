"""Base weights in 4 bits, as bitsandbytes stores them  [QLoRA, Dettmers et al. 2023], and the unquantised weights they came from.

With W the unquantised weight and Q(W) the quantised one, the relative error of quantisation is ||Q(W) - W|| / ||W||, in Frobenius
norms: about 0.09 for normally distributed weights in NF4.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from peft.utils.integrations import dequantize_module_weight
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor

INDEX_SUFFIX = ".safetensors.index.json"

# The unquantised weight of a layer by its name; see `CheckpointWeights`.
UnquantizedWeights = Callable[[str], torch.Tensor]


def keep_differentiable(model: nn.Module) -> None:
    """Have bitsandbytes keep the 4-bit weights of `model` in the form that training and dequantisation need.

    On CPUs with AVX-512 BF16 it repacks a weight on the first call in evaluation mode. The repacked layer gives no gradient for
    its input, and PEFT dequantises it to wrong values.

    Raises: ValueError naming a layer that is repacked already.
    """
    for name, layer in model.named_modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
            if _is_repacked(layer):
                raise ValueError(
                    f"bitsandbytes has repacked the 4-bit weight of {name!r} for inference on this CPU, after which it has no "
                    "gradient. Load the model again, and add the adapter or call calibrate before the model is evaluated."
                )


def _is_repacked(layer: nn.Module) -> bool:
    return bool(getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False))


def is_quantized(layer: nn.Module) -> bool:
    """Whether the weight of `layer` is stored in integers."""
    return not layer.weight.is_floating_point()


def dequantized_weight(layer: nn.Module) -> torch.Tensor:
    """Q(W) of a quantised layer, or the weight of another one, in the shape of the layer's weight before quantisation.

    If FSDP has sharded the weight, it is gathered, so that all processes must call this together.
    """
    weight = dequantize_module_weight(layer).detach()
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


class CheckpointWeights:
    """Reads unquantised weights from a checkpoint, one at a time.

    Args:
        path: a .safetensors file, or a folder with one or with several and their index, as `save_pretrained` writes it.
    Raises: FileNotFoundError if there is none.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        path = Path(path)
        indices, files = sorted(path.glob(f"*{INDEX_SUFFIX}")), sorted(path.glob("*.safetensors"))
        if path.is_file():
            self._files = self._names_in(path)
        elif len(indices) == 1:
            named = json.loads(indices[0].read_text(encoding="utf-8"))["weight_map"]
            self._files = {name: path / file for name, file in named.items()}
        elif len(files) == 1:
            self._files = self._names_in(files[0])
        else:
            raise FileNotFoundError(
                f"{path} must be a .safetensors file, or a folder with one such file or with one *{INDEX_SUFFIX}; it has "
                f"{len(files)} files and {len(indices)} indices. Give the file itself."
            )
        self.path = path

    @staticmethod
    def _names_in(file: Path) -> dict[str, Path]:
        with safe_open(file, framework="pt") as tensors:
            return dict.fromkeys(tensors.keys(), file)

    def __call__(self, layer_name: str) -> torch.Tensor:
        """The weight of the layer called `layer_name`, in its stored shape and dtype.

        Raises: ValueError if the checkpoint has none.
        """
        name = f"{layer_name}.weight"
        if name not in self._files:
            raise ValueError(f"{self.path} has no tensor {name!r}. Give the checkpoint that the model was loaded from.")
        with safe_open(self._files[name], framework="pt") as tensors:
            return tensors.get_tensor(name)
