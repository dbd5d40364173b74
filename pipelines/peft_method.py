"""The base class of methods that are a tuner of PEFT, used as it is."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pipelines.adapter_checks import targeted_layers
from pipelines.adapter_method import AdapterMethod, Probe, tuner_layers
from pipelines.lazy_modules import nn, torch
from pipelines.lora_conversion import add_as_lora
from pipelines.scalable_layers import make_scalable

if TYPE_CHECKING:
    from peft import PeftConfig

LARGEST_SEED = 2**31


class PeftMethod(AdapterMethod):
    """A tuner of PEFT. A subclass names its configuration and the fields that its options set.

    `is_low_rank`: the weight change has low rank. Such an adapter is exported exactly as plain LoRA and loaded as that.
    """

    # The name of the configuration's class in `peft`.
    config_class: ClassVar[str]
    # Fields of the configuration by the option that sets them, where the names differ.
    fields: ClassVar[Mapping[str, str]] = {"rank": "r"}
    # Fields of the configuration with fixed values.
    settings: ClassVar[Mapping[str, Any]] = {}
    is_low_rank: ClassVar[bool] = False
    # Most tuners compute with the weight itself; those that only add to the layer's output adapt quantised layers too.
    adapts_quantized_layers = False

    def config(self, target_modules: list[str], exclude_modules: str | None = None) -> PeftConfig:
        """PEFT's configuration with the options' values, and alpha = rank unless alpha is given."""
        import peft

        options = {field.name: getattr(self.options, field.name) for field in dataclasses.fields(self.options)}
        if "alpha" in options and options["alpha"] is None:
            options["alpha"] = options["rank"]
        given = {self.fields.get(name, name): value for name, value in options.items() if value is not None}
        config = getattr(peft, self.config_class)(**given, **self.settings, target_modules=target_modules)
        # Some configurations lack this field, but all tuners read it.
        config.exclude_modules = exclude_modules
        return config

    def attach(self, model: nn.Module, config: PeftConfig, adapter_name: str, generator: torch.Generator) -> None:
        """Add the adapter; PEFT samples its initial values from the global generator, which is seeded by `generator`.

        Raises: ValueError naming the layer that the adapter does not fit.
        """
        from nora_vision.calibration import base_name
        from nora_vision.factors import has_adapter

        for name, layer in targeted_layers(model, config):
            problem = self.misfit(layer)
            if problem is not None:
                raise ValueError(f"{self.title} cannot adapt {name!r}: {problem}")
        with seeded(generator):
            self.inject(model, config, adapter_name)
        make_scalable(model)
        if "exclude_modules" not in {field.name for field in dataclasses.fields(config)}:
            # A configuration without this field cannot save it, so the adapted layers are listed by name.
            layers = (name for name, layer in tuner_layers(model).items() if has_adapter(layer, adapter_name))
            config.target_modules, config.exclude_modules = set(map(base_name, layers)), None

    def misfit(self, layer: nn.Module) -> str | None:
        """Why the method cannot adapt `layer`, with the remedy; None if it can."""
        if isinstance(layer, nn.Linear):
            return self.misfit_of_size(layer.out_features, layer.in_features)
        if not self.adapts_convolutions:
            return f"it adapts nn.Linear only, got {type(layer).__name__}. Narrow target_modules."
        if getattr(layer, "padding_mode", "zeros") != "zeros":
            return f"it adapts convolutions that pad with zeros, got padding_mode={layer.padding_mode!r}. Narrow target_modules."
        return None

    def misfit_of_size(self, m: int, n: int) -> str | None:
        """The same for a weight (m, n)."""
        return None

    def start(self, model: nn.Module, probe: Probe, adapter_name: str) -> None:
        """Train in float32; the initial values are PEFT's."""
        from diffusers.training_utils import cast_training_params

        cast_training_params(model, dtype=torch.float32)

    @classmethod
    def load(cls, components: Mapping[str, nn.Module], folder: Path, adapter_name: str) -> None:
        """Load each component's adapter: as plain LoRA if that is exact, else as PEFT's layers with a scale.

        Raises: as `AdapterMethod.load`.
        """
        from nora_vision.calibration import base_name
        from nora_vision.factors import low_rank_factors

        for name, model in components.items():
            target = skeleton_of(model) if cls.is_low_rank else model
            super().load({name: target}, folder, adapter_name)
            if cls.is_low_rank:
                layers = tuner_layers(target).items()
                factors = {base_name(layer_name): low_rank_factors(layer, adapter_name) for layer_name, layer in layers}
                add_as_lora(model, factors, adapter_name, folder / name)
            else:
                make_scalable(model)


@contextmanager
def seeded(generator: torch.Generator) -> Iterator[None]:
    """Seed the global generator of the CPU from `generator` within the context, and restore it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(LARGEST_SEED, (), generator=generator)))
        yield


def skeleton_of(model: nn.Module) -> nn.Module:
    """A module with the layers of `model` that can be adapted, under the same names and sharing their weights.

    Adapters that are added to it leave `model` as it is.
    """
    from nora_vision.calibration import base_name
    from nora_vision.layer_types import find_layer_class

    root = nn.Module()
    for name, layer in model.named_modules():
        if find_layer_class(layer) is None:
            continue
        parent = root
        *path, last = base_name(name).split(".")
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]
        parent.add_module(last, _sharing(layer))
    return root


def _sharing(layer: nn.Module) -> nn.Module:
    """A copy of `layer` with its tensors, whose `requires_grad` PEFT can change without changing that of `layer`."""
    shared = copy.copy(layer)
    parameters = {key: value if value is None else nn.Parameter(value.data, False) for key, value in layer._parameters.items()}
    shared._parameters = parameters
    return shared
