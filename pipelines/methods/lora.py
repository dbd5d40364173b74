"""LoRA, by PEFT:  h = W x + alpha / r B A x  [Hu et al. 2021]."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from nora_vision.files import (
    CONFIGURATION,
    check_configuration,
    configuration_digest,
    read_header,
    read_json,
    read_tensors,
    write_tensors,
)
from pipelines.errors import InputError
from pipelines.methods import AdapterOptions, add_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Lora:
    """LoRA with a Gaussian A and a zero B."""

    default_rank = 4
    default_learning_rate = 1e-4
    b_like = "lora_B"

    def config(self, options: AdapterOptions, target_modules: list[str], exclude_modules: str | None) -> PeftConfig:
        """PEFT's configuration; the scaling is 1 unless alpha is given."""
        return LoraConfig(
            r=options.rank,
            lora_alpha=options.rank if options.alpha is None else options.alpha,
            lora_dropout=options.dropout,
            init_lora_weights="gaussian",
            target_modules=target_modules,
            exclude_modules=exclude_modules,
        )

    def start(
        self, model: nn.Module, run_model: Callable[[], None], adapter_name: str, cache: Path, generator: torch.Generator
    ) -> None:
        """Draw A from `generator`; LoRA needs neither activations nor a cache."""
        cast_training_params(model, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if f"lora_A.{adapter_name}." in name:
                rank = parameter.shape[0]
                with torch.no_grad():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) / rank)

    def save(self, components: dict[str, nn.Module], folder: Path, adapter_name: str) -> None:
        """Write PEFT's adapter_config.json and adapter_model.safetensors for each component under `full`."""
        for name, model in components.items():
            target = folder / "full" / name
            model.peft_config[adapter_name].save_pretrained(str(target))
            metadata = {CONFIGURATION: configuration_digest(read_json(target / CONFIG))}
            write_tensors(target / WEIGHTS, get_peft_model_state_dict(model, adapter_name=adapter_name), metadata, digest=True)

    def load(self, components: dict[str, nn.Module], folder: Path, adapter_name: str) -> None:
        """Add PEFT's adapter in each subfolder to the component of that name.

        Raises:
            InputError: a file has other tensors than an adapter of its configuration has on this model.
            AdapterFileError: a file was changed since it was saved.
        """
        for name, model in components.items():
            metadata = read_header(folder / name / WEIGHTS).metadata
            check_configuration(metadata, read_json(folder / name / CONFIG), folder / name)
            state = read_tensors(folder / name / WEIGHTS)
            add_adapter(model, PeftConfig.from_pretrained(str(folder / name)), adapter_name)
            # PEFT itself passes over targets that the model lacks, and over tensors that no target takes.
            strange = sorted(state.keys() ^ get_peft_model_state_dict(model, adapter_name=adapter_name).keys())
            if strange:
                raise InputError(
                    f"{folder / name / WEIGHTS} does not fit this {name} model: {strange[0]!r} and {len(strange) - 1} more are "
                    "in one of the two alone. Load it onto the model that it was trained on."
                )
            set_peft_model_state_dict(model, state, adapter_name)


METHOD = Lora()
