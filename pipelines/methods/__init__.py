"""The door for adapter methods: a new one is one file here, named as `--method` names it, that defines `METHOD`.

A method says how a model is prepared for training and how its native files are written and read. Training, export and
generation are the same for all.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from peft import PeftConfig, inject_adapter_in_model
from torch import nn

from pipelines.errors import InputError


class AdapterMethod(Protocol):
    """What a file of this package defines as `METHOD`.

    Args:
        default_rank: the rank unless one is given.
        default_learning_rate: the peak learning rate on SDXL unless one is given.
        b_like: what the names of its B-like parameters contain: those that multiply last, which LoRA+ trains faster.
    """

    default_rank: int
    default_learning_rate: float
    b_like: str

    def config(self, options: AdapterOptions, target_modules: list[str], exclude_modules: str | None) -> PeftConfig:
        """PEFT's configuration of the adapter that `options` describe."""

    def start(
        self, model: nn.Module, run_model: Callable[[], None], adapter_name: str, cache: Path, generator: torch.Generator
    ) -> None:
        """Initialise an adapter that was just added to `model`.

        Args:
            run_model: runs the base model on the subject, for methods that start from activations.
            cache: a .safetensors file for whatever is worth keeping for a later start from the same data.
            generator: draws all that is random.
        """

    def save(self, components: dict[str, nn.Module], folder: Path, adapter_name: str) -> None:
        """Write the adapter's native files: `folder/<layout>/<component>`, of which the layout "full" loads anywhere."""

    def load(self, components: dict[str, nn.Module], folder: Path, adapter_name: str) -> None:
        """Add the adapter that `save` wrote, from the layout's `folder`."""


@dataclass
class AdapterOptions:
    """The adapter: its method, its size, and what it is put on."""

    method: str = field(default="nora", metadata={"help": "Adapter method: nora, lora or dora."})
    rank: int | None = field(default=None, metadata={"help": "Rank of LoRA and DoRA (4 unless said), outer rank of NoRA (32)."})
    inner_r: int = field(
        default=8, metadata={"help": "Inner rank of NoRA, at most the outer: 2 rank inner_r numbers are trained a layer."}
    )
    alpha: float | None = field(
        default=None, metadata={"help": "Numerator of the scaling alpha / (inner) rank; unless said the scaling is 1."}
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout within the adapter."})
    inner_init: str = field(default="zero", metadata={"help": "Start of NoRA's inner factors: zero or gaussian."})
    preserve_output: bool = field(
        default=False, metadata={"help": "NoRA subtracts its frozen start, so that a gaussian start is the base model too."}
    )
    target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Name endings of the UNet's layers to adapt: its attention unless said, and on the built-in model, whose "
            "finest level has none, its convolutions too."
        },
    )
    train_text_encoder: bool = field(default=False, metadata={"help": "Adapt the attention of both text encoders too."})

    _argument_group_name = "adapter"

    def __post_init__(self) -> None:
        method = method_named(self.method)
        self.rank = method.default_rank if self.rank is None else self.rank
        if self.rank < 1:
            raise InputError(f"rank must be at least 1, got {self.rank}.")
        if self.target_modules == []:
            raise InputError("target_modules must name at least one layer, got none.")
        # The configuration checks every other field, before any model is loaded.
        method.config(self, self.target_modules or [], None)


def add_adapter(model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
    """Add an adapter to `model`, its own way where it has one (diffusers, transformers), else PEFT's.

    Raises: ValueError if the configuration does not fit the model.
    """
    if hasattr(model, "add_adapter"):
        model.add_adapter(config, adapter_name)
    else:
        inject_adapter_in_model(config, model, adapter_name)


def method_names() -> list[str]:
    """The names of all methods: the files of this package."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def method_named(name: str) -> AdapterMethod:
    """The method called `name`.

    Raises: InputError if there is none.
    """
    if name not in method_names():
        raise InputError(f"method must be one of {', '.join(method_names())}, got {name!r}.")
    return importlib.import_module(f"{__name__}.{name}").METHOD
