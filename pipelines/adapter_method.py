"""What an adapter method is: the one class that a file of `pipelines.methods` defines, and what all of them share.

Every command reads its flags from the methods' options, and importing PEFT takes seconds: it is imported in functions, here and
in the methods, so that `--help` does without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import nn

from pipelines.errors import InputError
from pipelines.option_checks import at_least
from pipelines.run_options import Task

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig
    from peft.tuners.tuners_utils import BaseTunerLayer

    from nora_vision.factors import Factors

ADAPTER_NAME = "default"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FULL, COMPACT = "full", "compact"


Losses = Callable[[int], Iterator[torch.Tensor]]


def no_losses(count: int) -> Iterator[torch.Tensor]:
    """Raises: ValueError, as there is no training whose losses could be differentiated."""
    raise ValueError("This method starts from gradients of the training's losses, and none were given.")


@dataclass(frozen=True)
class Probe:
    """What a method may find out of the base model and the data before training.

    Args:
        forward: runs the model that is adapted on the data, for activations.
        losses: `losses(count)` yields the base model's training losses on this process's part of `count` batches, scalars to
            differentiate: adapters are off meanwhile, those that were started before too.
        generator: draws all that is random.
        cache: a .safetensors file for whatever is worth keeping for a later start from the same data.
    """

    forward: Callable[[], None]
    losses: Losses
    generator: torch.Generator
    cache: Path


@dataclass(frozen=True)
class TaskDefaults:
    """What a method is by default on one task and base model.

    Args:
        learning_rate: the peak learning rate on models of full width; recipes raise it for the narrow built-in ones.
        options: values of the method's options that have no default of their own, by field.
        target_layers: name endings of the layers to adapt; None for the task's own.
    """

    learning_rate: float
    options: Mapping[str, Any] = field(default_factory=dict)
    target_layers: Sequence[str] | None = None


class NativeFiles(NamedTuple):
    """PEFT's two files of one component: the configuration, the tensors, and the metadata of their header."""

    config: PeftConfig
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]


class MethodTraining:
    """What a method does within one training. Made anew for each, so that none begins with what another left.

    Args:
        models: the adapted models.
        total_steps: optimisation steps in all.
    """

    def __init__(self, models: Sequence[nn.Module], total_steps: int) -> None:
        self.models, self.total_steps = models, total_steps

    def regularizer(self) -> torch.Tensor | None:
        """A scalar that is added to every batch's loss; None for nothing."""
        return None

    def after_step(self, step: int) -> None:
        """Called between `optimizer.step` and `zero_grad` of step `step`, counted from 1: gradients are still there."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of this, plain values and tensors: training goes on from it to the last bit."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


@dataclass
class LowRankOptions:
    """Options that most methods have; None is filled in from `TaskDefaults`."""

    rank: int | None = field(default=None, metadata={"help": "rank", "few-shot": "lora_rank"})
    alpha: float | None = field(
        default=None, metadata={"help": "numerator of the scaling alpha / rank; the scaling is 1 unless given"}
    )
    dropout: float = field(default=0.0, metadata={"help": "dropout within the adapter"})

    def __post_init__(self) -> None:
        at_least(self, 1, "rank")


class AdapterMethod:
    """An adapter method. A subclass sets the class attributes, and overrides what differs.

    Args:
        options: an instance of `Options`, complete.

    `Options` is a dataclass whose fields are flags and form fields; a field's metadata holds its `help`, its `choices` where it
    has some, and under a task's name the flag's name there where that is another.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    reference: ClassVar[str]
    Options: ClassVar[type] = LowRankOptions
    # Whether an adapter that was started but not trained leaves the model as it was.
    starts_at_base: ClassVar[bool] = True
    # What it can be put on.
    adapts_convolutions: ClassVar[bool] = True
    adapts_quantized_layers: ClassVar[bool] = True
    # What other programs make of the exported files, as Markdown, where that is not what it was trained as.
    export_note: ClassVar[str | None] = None
    # Whether FSDP may split its parameters between processes.
    can_be_sharded: ClassVar[bool] = True

    def __init__(self, options: Any) -> None:
        self.options = options

    @classmethod
    def defaults(cls, task: Task, built_in: bool) -> TaskDefaults:
        """What it is by default on `task`, on the built-in model or another."""
        raise NotImplementedError

    def config(self, target_modules: list[str], exclude_modules: str | None = None) -> PeftConfig:
        """PEFT's configuration of the adapter that the options describe."""
        raise NotImplementedError

    def attach(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        """Add the adapter to `model`.

        Raises: ValueError if the configuration does not fit the model.
        """
        add_adapter(model, config, adapter_name)

    def start(self, model: nn.Module, probe: Probe, adapter_name: str) -> None:
        """Initialise an adapter that was just added to `model`."""
        raise NotImplementedError

    def learning_rate_factor(self, parameter_name: str) -> float:
        """What the learning rate of the parameter called so is multiplied by."""
        return 1.0

    def training(self, models: Sequence[nn.Module], total_steps: int) -> MethodTraining:
        """What the method does within a training of `total_steps` steps that begins now."""
        return MethodTraining(models, total_steps)

    # What holds for every adapter of a PEFT type, whatever it was trained with.

    @classmethod
    def allows_any_scale(cls, config: PeftConfig) -> bool:
        """Whether the change of weight can be scaled: otherwise it is there in full or not at all."""
        return True

    @classmethod
    def set_scale(cls, model: nn.Module, adapter_name: str, scale: float) -> None:
        """Scale the change of every weight of `model` by `scale`, 1 as trained."""
        for layer in tuner_layers(model).values():
            layer.set_scale(adapter_name, scale)

    @classmethod
    def save(cls, components: Mapping[str, nn.Module], folder: Path, adapter_name: str) -> None:
        """Write the adapter's native files, at scale 1: `folder/<layout>/<component>`, of which the layout "full" loads anywhere.

        By default PEFT's adapter_config.json and adapter_model.safetensors under `full`.
        """
        from peft import get_peft_model_state_dict

        from nora_vision.saving import PEFT_PREFIX

        for name, model in components.items():
            state = get_peft_model_state_dict(model, adapter_name=adapter_name)
            tensors = {f"{PEFT_PREFIX}{key}": value for key, value in state.items()}
            write_native(folder / FULL / name, model.peft_config[adapter_name], tensors)

    @classmethod
    def load(cls, components: Mapping[str, nn.Module], folder: Path, adapter_name: str) -> None:
        """Add the adapter in each subfolder of a layout's `folder` to the component of that name, for use, not for training.

        Raises:
            InputError: a file has other tensors than an adapter of its configuration has on this model.
            AdapterFileError: a file was changed since it was saved.
        """
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        from nora_vision.saving import PEFT_PREFIX

        for name, model in components.items():
            config, tensors, _ = read_native(folder / name)
            # Files were once written without the prefix, which PEFT's own loader needs.
            state = {key.removeprefix(PEFT_PREFIX): value for key, value in tensors.items()}
            add_adapter(model, config, adapter_name)
            # PEFT itself passes over targets that the model lacks, and over tensors that no target takes.
            strange = sorted(state.keys() ^ get_peft_model_state_dict(model, adapter_name=adapter_name).keys())
            if strange:
                raise InputError(
                    f"{folder / name / WEIGHTS} does not fit this {name} model: {strange[0]!r} and {len(strange) - 1} more are "
                    "in one of the two alone. Load it onto the model that it was trained on."
                )
            set_peft_model_state_dict(model, state, adapter_name)


def add_adapter(model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
    """Add an adapter to `model`, its own way where it has one (diffusers, transformers), else PEFT's.

    Raises: ValueError if the configuration does not fit the model.
    """
    from peft import inject_adapter_in_model

    if hasattr(model, "add_adapter"):
        model.add_adapter(config, adapter_name)
    else:
        inject_adapter_in_model(config, model, adapter_name)


def write_native(
    folder: Path, config: PeftConfig, tensors: dict[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write PEFT's two files into `folder`, with digests of the tensors and of the configuration, and with `metadata`."""
    from nora_vision.files import CONFIGURATION, configuration_digest, read_json, write_tensors

    config.save_pretrained(str(folder))
    digest = {CONFIGURATION: configuration_digest(read_json(folder / CONFIG))}
    write_tensors(folder / WEIGHTS, tensors, {**(metadata or {}), **digest}, digest=True)


def read_native(folder: Path) -> NativeFiles:
    """What `write_native` wrote.

    Raises: AdapterFileError if a file was changed since.
    """
    from peft import PeftConfig

    from nora_vision.files import check_configuration, read_header, read_json, read_tensors

    metadata = read_header(folder / WEIGHTS).metadata
    check_configuration(metadata, read_json(folder / CONFIG), folder)
    return NativeFiles(PeftConfig.from_pretrained(str(folder)), read_tensors(folder / WEIGHTS), metadata)


def as_lora(factors: Mapping[str, Factors]) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """The plain LoRA, or DoRA, that has exactly these changes: its configuration and PEFT's tensors.

    Args:
        factors: by the layer's name.
    """
    from peft import LoraConfig

    from nora_vision.saving import PEFT_PREFIX

    ranks = {layer: len(each.down) for layer, each in factors.items()}
    rank = max(ranks.values())
    others = {f"^{layer}": of_layer for layer, of_layer in ranks.items() if of_layer != rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=others,
        alpha_pattern=others,
        target_modules=sorted(factors),
        use_dora=any(each.magnitude is not None for each in factors.values()),
        inference_mode=True,
    )
    tensors = {}
    for layer, each in factors.items():
        values = {"lora_A.weight": each.down, "lora_B.weight": each.up, "lora_magnitude_vector": each.magnitude}
        tensors |= {f"{PEFT_PREFIX}{layer}.{key}": value for key, value in values.items() if value is not None}
    return config, tensors


def add_as_lora(model: nn.Module, factors: Mapping[str, Factors], adapter_name: str, source: Path) -> None:
    """Add the plain LoRA that has exactly these changes: diffusers scales, fuses and deletes it as any LoRA.

    Args:
        factors: by the layer's name, of its weight as a matrix.
        source: what they were read from, for errors.
    Raises: InputError naming a layer that the model does not have, or not in this size.
    """
    from peft import set_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer

    from nora_vision.calibration import base_name
    from nora_vision.factors import in_weight_shape

    modules = {base_name(name): module for name, module in model.named_modules() if not name.endswith(".base_layer")}
    shaped = {}
    for name, each in factors.items():
        layer = modules.get(name)
        layer = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
        size = _matrix_size(layer)
        if size != (len(each.up), each.down.shape[1]):
            raise InputError(
                f"{source} does not fit this model: it changes {name!r} of {len(each.up)} x {each.down.shape[1]}, and the "
                f"model has {size or 'no such layer'}. Load it onto the model that it was trained on."
            )
        shaped[name] = in_weight_shape(layer, each)
    config, tensors = as_lora(shaped)
    add_adapter(model, config, adapter_name)
    set_peft_model_state_dict(model, tensors, adapter_name)


def _matrix_size(layer: nn.Module | None) -> tuple[int, int] | None:
    """(out, in) of a layer's weight as a matrix, whatever it is stored as; None where there is no such layer."""
    if isinstance(layer, nn.Conv2d):
        return layer.out_channels, layer.weight[0].numel()
    return (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else None


def tuner_layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    """Every adapted layer of `model`, by its name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


@contextmanager
def adapters_off(models: Iterable[nn.Module]) -> Iterator[None]:
    """Have every adapted layer of `models` compute its base layer alone meanwhile. What is trained stays trainable."""
    before = {layer: layer.disable_adapters for model in models for layer in tuner_layers(model).values()}
    for layer in before:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, disabled in before.items():
            layer._disable_adapters = disabled


def base_losses(losses: Losses, models: Iterable[nn.Module]) -> Losses:
    """`losses`, with the adapters of `models` off from the first loss until the last has been differentiated."""

    def of_base_model(count: int) -> Iterator[torch.Tensor]:
        with adapters_off(models):
            yield from losses(count)

    return of_base_model


def trained_parameters(components: Mapping[str, nn.Module]) -> list[nn.Parameter]:
    """The parameters that are trained."""
    return [parameter for model in components.values() for parameter in model.parameters() if parameter.requires_grad]
