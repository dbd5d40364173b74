"""Fitted baselines: classifiers whose state is only named tensors, and their files."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional as F

from nora_vision.files import read_header, read_tensors, write_tensors
from pipelines.errors import InputError
from pipelines.fewshot.projection import project

# Shape of scalars, which are stored as tensors.
SCALAR: tuple[str, ...] = ()
# Inputs per batch, since a key-value cache compares each with all its keys.
BATCH = 1024
PREDICTOR = "predictor"


class Head(nn.Module):
    """A classifier on features of length 1, or on raw pixels.

    Args:
        tensors: one for each entry of `shapes`; equal words in the shapes mean equal sizes.
    Raises: InputError for missing or further tensors, or other shapes.
    """

    shapes: ClassVar[dict[str, tuple[str, ...]]]

    def __init__(self, **tensors: torch.Tensor) -> None:
        super().__init__()
        if set(tensors) != set(self.shapes):
            raise InputError(f"{type(self).__name__} needs the tensors {sorted(self.shapes)}, got {sorted(tensors)}.")
        sizes: dict[str, int] = {}
        for name, words in self.shapes.items():
            shape = tuple(tensors[name].shape)
            if len(shape) != len(words) or any(
                sizes.setdefault(word, size) != size for word, size in zip(words, shape, strict=True)
            ):
                raise InputError(f"{type(self).__name__} needs {name!r} of shape {words} with {sizes}, got {shape}.")
            self.register_buffer(name, tensors[name].detach().float())

    def with_rows(self, rows: torch.Tensor) -> Head:
        """The head with classes appended: `rows` (more, width) for the weight, zeros for all other tensors."""
        buffers = {}
        for name, words in self.shapes.items():
            buffers[name] = buffer = self.get_buffer(name)
            if "classes" in words:
                axis = words.index("classes")
                sizes = [len(rows) if word == "classes" else size for word, size in zip(words, buffer.shape, strict=True)]
                more = rows.to(buffer) if name == "weight" else buffer.new_zeros(sizes)
                buffers[name] = torch.cat([buffer, more], dim=axis)
        return type(self)(**buffers)


class LinearHead(Head):
    """logits = W x + b."""

    shapes: ClassVar = {"weight": ("classes", "width"), "bias": ("classes",)}

    @classmethod
    def unbiased(cls, weight: torch.Tensor) -> LinearHead:
        """The head with `weight` (classes, width) and zero bias."""
        return cls(weight=weight, bias=torch.zeros_like(weight[:, 0]))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(n, width) to (n, classes)."""
        return F.linear(inputs, self.weight, self.bias)


class Prompted(LinearHead):
    """A linear classifier computed from prompts with a learned context, which is stored too."""

    shapes: ClassVar = {**LinearHead.shapes, "context": ("tokens", "token width")}


class KeyValueCache(Head):
    """logits = W x + alpha exp(-beta (1 - K x)) V  [Zhang et al. 2022]."""

    shapes: ClassVar = {
        "weight": ("classes", "width"),
        "keys": ("pictures", "width"),
        "values": ("pictures", "classes"),
        "alpha": SCALAR,
        "beta": SCALAR,
    }

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(n, width) to (n, classes)."""
        return inputs @ self.weight.T + self.alpha * key_value_logits(inputs, self.keys, self.values, self.beta)


class Bottleneck(Head):
    """logits = W x' with x' the direction of  ratio relu(U relu(D x)) + (1 - ratio) x  [Gao et al. 2021]."""

    shapes: ClassVar = {
        "weight": ("classes", "width"),
        "down": ("hidden", "width"),
        "up": ("width", "hidden"),
        "ratio": SCALAR,
    }

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(n, width) to (n, classes)."""
        return adapted(inputs, self.down, self.up, self.ratio) @ self.weight.T


class ProjectedHead(Head):
    """logits = W x, with x the direction of  P h + b  for an embedding h before the image encoder's projection
    [Fahes et al. 2024]."""

    shapes: ClassVar = {"weight": ("classes", "width"), "projection": ("width", "embedding width"), "bias": ("width",)}

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(n, embedding width) to (n, classes)."""
        return project(inputs, self.projection, self.bias) @ self.weight.T


def key_value_logits(
    features: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, beta: float | torch.Tensor
) -> torch.Tensor:
    """exp(-beta (1 - K x)) V: the similarity to the training images of each class.

    Args:
        features: (n, d), of length 1.
        keys: (images, d), of length 1.
        values: (images, classes), one-hot.
    Returns: (n, classes).
    """
    return torch.exp(-beta * (1 - features @ keys.T)) @ values


def adapted(features: torch.Tensor, down: torch.Tensor, up: torch.Tensor, ratio: float | torch.Tensor) -> torch.Tensor:
    """Features (n, d) of length 1, mixed with their bottleneck: down (hidden, d), up (d, hidden)."""
    bottleneck = F.linear(F.linear(features, down).relu(), up).relu()
    return F.normalize(ratio * bottleneck + (1 - ratio) * features, dim=-1)


Reads = Literal["features", "pixels", "embeddings"]
READABLE: dict[str, Reads] = {"features": "features", "pixels": "pixels", "embeddings": "embeddings"}
# By their names in files.
HEADS: dict[str, type[Head]] = {
    "Linear": LinearHead,
    "Prompted": Prompted,
    "KeyValueCache": KeyValueCache,
    "Bottleneck": Bottleneck,
    "Projected": ProjectedHead,
}


@dataclass(frozen=True)
class Predictor:
    """A fitted baseline.

    Args:
        head: computes the logits.
        num_trainable_parameters: number of parameters set by a gradient or a solver; counts and copies are not included.
        setting: hyperparameters chosen on the validation images.
        reads: the input of `logits`: unit features of images, the output of `raw_pixels`, or embeddings of images before the
            encoder's projection.
        open_vocabulary: whether classes can be added by their prompts alone.
    """

    head: Head
    num_trainable_parameters: int
    setting: dict[str, float] = field(default_factory=dict)
    reads: Reads = "features"
    open_vocabulary: bool = False

    @torch.no_grad()
    def logits(self, inputs: torch.Tensor) -> torch.Tensor:
        """(n, width) to (n, classes) float32, on the device of the head."""
        return torch.cat([self.head(part.to(next(self.head.buffers()))) for part in inputs.split(BATCH)])


def save_predictor(predictor: Predictor, path: Path) -> None:
    """Write `predictor` as a safetensors file."""
    metadata = {
        "head": next(name for name, kind in HEADS.items() if type(predictor.head) is kind),
        "num_trainable_parameters": predictor.num_trainable_parameters,
        "setting": predictor.setting,
        "reads": predictor.reads,
        "open_vocabulary": predictor.open_vocabulary,
    }
    write_tensors(path, predictor.head.state_dict(), {PREDICTOR: json.dumps(metadata)}, digest=True)


def load_predictor(path: Path) -> Predictor:
    """The predictor that `save_predictor` wrote, on the CPU.

    Raises: AdapterFileError if it is not a valid safetensors file; InputError if it does not contain a predictor.
    """
    header = read_header(path)
    try:
        metadata = json.loads(header.metadata[PREDICTOR])
        kind, reads = HEADS[metadata["head"]], READABLE[metadata["reads"]]
        # Earlier versions wrote "trained_numbers".
        count = metadata["num_trainable_parameters" if "num_trainable_parameters" in metadata else "trained_numbers"]
        num_trainable_parameters, setting = int(count), dict(metadata["setting"])
        open_vocabulary = bool(metadata["open_vocabulary"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"The metadata of {str(path)!r} do not describe a predictor ({error}). Use the file of a baseline."
        ) from error
    return Predictor(kind(**read_tensors(path)), num_trainable_parameters, setting, reads, open_vocabulary)
