"""The base class of adapter methods, and the functions that they share.

Every command reads its flags from the methods' options, and PEFT takes seconds to import. So it is imported inside functions,
here and in the methods, and `--help` does not load it.
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
    """A `Losses` without losses. Raises: ValueError."""
    raise ValueError("This method is initialised from gradients of the training loss, but no losses were given.")


@dataclass(frozen=True)
class Probe:
    """Access to the base model and the training data, for methods that are initialised from them.

    Args:
        forward: runs the adapted model on the data, to record activations.
        losses: `losses(count)` yields the base model's training losses, scalars to differentiate, on this process's share of
            `count` batches. All adapters are disabled meanwhile.
        generator: the source of all randomness.
        cache: a .safetensors file for results that a later initialisation from the same data can reuse.
    """

    forward: Callable[[], None]
    losses: Losses
    generator: torch.Generator
    cache: Path


@dataclass(frozen=True)
class TaskDefaults:
    """A method's defaults on one task and base model.

    Args:
        learning_rate: the peak learning rate on models of full width; recipes raise it for the narrow built-in ones.
        options: defaults of the options whose default in `Options` is None, by field name.
        target_layers: name endings of the layers to adapt; None for the task's default.
    """

    learning_rate: float
    options: Mapping[str, Any] = field(default_factory=dict)
    target_layers: Sequence[str] | None = None


class NativeFiles(NamedTuple):
    """The content of one component's PEFT files: the configuration, the tensors, and the metadata in the tensors' header."""

    config: PeftConfig
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]


class MethodTraining:
    """A method's state and hooks during one training run; each run creates its own.

    Args:
        models: the adapted models.
        total_steps: optimisation steps of the run.
    """

    def __init__(self, models: Sequence[nn.Module], total_steps: int) -> None:
        self.models, self.total_steps = models, total_steps

    def regularizer(self) -> torch.Tensor | None:
        """A scalar that is added to the loss of every batch; None for none."""
        return None

    def after_step(self, step: int) -> None:
        """Called after `optimizer.step` and before `zero_grad`, so that gradients are available; `step` counts from 1."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors for a checkpoint, from which training resumes bit for bit."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


def option(default: Any, text: str, label: str = "", **metadata: Any) -> Any:
    """A field of a method's `Options`.

    Args:
        text: the help.
        label: the label in a form; empty for one made from the field's name.
        metadata: `choices`, and under a task's name the name of the flag on that task.
    """
    return field(default=default, metadata={"help": text, "label": label, **metadata})


@dataclass
class LowRankOptions:
    """Options that most methods share; None is replaced by the value in `TaskDefaults`."""

    rank: int | None = option(None, "rank", **{"few-shot": "lora_rank"})
    alpha: float | None = option(None, "numerator of the scaling alpha / rank (default: the scaling is 1)")
    dropout: float = option(0.0, "dropout probability within the adapter")

    def __post_init__(self) -> None:
        at_least(self, 1, "rank")


class AdapterMethod:
    """An adapter method. A subclass sets the class attributes and overrides what differs.

    Each field of the dataclass `Options` is a flag and a form field; `option` makes one.

    Args:
        options: an instance of `Options` with every value set.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    reference: ClassVar[str]
    Options: ClassVar[type] = LowRankOptions
    # Whether an initialised, untrained adapter leaves the model's output unchanged.
    starts_at_base: ClassVar[bool] = True
    # Which layers it can adapt besides linear ones in full precision.
    adapts_convolutions: ClassVar[bool] = True
    adapts_quantized_layers: ClassVar[bool] = True
    # Markdown on how other programs read the exported files, if their results differ.
    export_note: ClassVar[str | None] = None
    # Whether FSDP may shard its parameters.
    can_be_sharded: ClassVar[bool] = True

    def __init__(self, options: Any) -> None:
        self.options = options

    @classmethod
    def defaults(cls, task: Task, built_in: bool) -> TaskDefaults:
        """The method's defaults on `task`, for the built-in model or another one."""
        raise NotImplementedError

    def config(self, target_modules: list[str], exclude_modules: str | None = None) -> PeftConfig:
        """The PEFT configuration for the options."""
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
        """The factor on the learning rate of the parameter with this name."""
        return 1.0

    def training(self, models: Sequence[nn.Module], total_steps: int) -> MethodTraining:
        """The method's state and hooks for a training run of `total_steps` steps."""
        return MethodTraining(models, total_steps)

    # The class methods below apply to every adapter of the method's PEFT type, whatever its options were.

    @classmethod
    def allows_any_scale(cls, config: PeftConfig) -> bool:
        """Whether the adapter can be used at any scale; otherwise only at 0 and 1."""
        return True

    @classmethod
    def set_scale(cls, model: nn.Module, adapter_name: str, scale: float) -> None:
        """Scale the change of every weight of `model` by `scale`; 1 is the trained adapter."""
        for layer in tuner_layers(model).values():
            layer.set_scale(adapter_name, scale)

    @classmethod
    def save(cls, components: Mapping[str, nn.Module], folder: Path, adapter_name: str) -> None:
        """Write the adapter's native files at scale 1 to `folder/<layout>/<component>`; the layout "full" is self-contained.

        By default, PEFT's adapter_config.json and adapter_model.safetensors are written to `full`.
        """
        from peft import get_peft_model_state_dict

        from nora_vision.saving import PEFT_PREFIX

        for name, model in components.items():
            state = get_peft_model_state_dict(model, adapter_name=adapter_name)
            tensors = {f"{PEFT_PREFIX}{key}": value for key, value in state.items()}
            write_native(folder / FULL / name, model.peft_config[adapter_name], tensors)

    @classmethod
    def load(cls, components: Mapping[str, nn.Module], folder: Path, adapter_name: str) -> None:
        """Load the adapter in `folder/<component>` onto each of `components`, for inference.

        Args:
            folder: the folder of one layout.
        Raises:
            InputError: a file's tensors are not those of its configuration on this model.
            AdapterFileError: a file was changed after it was saved.
        """
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        from nora_vision.saving import PEFT_PREFIX

        for name, model in components.items():
            config, tensors, _ = read_native(folder / name)
            # Earlier versions wrote no prefix; PEFT's own loader needs one.
            state = {key.removeprefix(PEFT_PREFIX): value for key, value in tensors.items()}
            add_adapter(model, config, adapter_name)
            # PEFT ignores targets that the model lacks, and tensors that match no target.
            unmatched = sorted(state.keys() ^ get_peft_model_state_dict(model, adapter_name=adapter_name).keys())
            if unmatched:
                raise InputError(
                    f"{folder / name / WEIGHTS} does not fit this {name} model: only one of the two has {unmatched[0]!r} "
                    f"({len(unmatched)} such tensors in all). Load it onto the model that it was trained on."
                )
            set_peft_model_state_dict(model, state, adapter_name)


def add_adapter(model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
    """Add an adapter to `model` by its own `add_adapter` (diffusers, transformers), or else by PEFT.

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
    """Write PEFT's two files to `folder`, with `metadata` and digests of the tensors and the configuration in the header."""
    from nora_vision.files import CONFIGURATION, configuration_digest, read_json, write_tensors

    config.save_pretrained(str(folder))
    digest = {CONFIGURATION: configuration_digest(read_json(folder / CONFIG))}
    write_tensors(folder / WEIGHTS, tensors, {**(metadata or {}), **digest}, digest=True)


def read_native(folder: Path) -> NativeFiles:
    """Read what `write_native` wrote.

    Raises: AdapterFileError if a file was changed after it was saved.
    """
    from peft import PeftConfig

    from nora_vision.files import check_configuration, read_header, read_json, read_tensors

    metadata = read_header(folder / WEIGHTS).metadata
    check_configuration(metadata, read_json(folder / CONFIG), folder)
    return NativeFiles(PeftConfig.from_pretrained(str(folder)), read_tensors(folder / WEIGHTS), metadata)


def as_lora(factors: Mapping[str, Factors]) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """The plain LoRA (or DoRA) with exactly these weight changes: its PEFT configuration and tensors.

    Args:
        factors: by layer name: up (out, k) and down (k, in), or (out, k, 1, 1) and (k, in, kh, kw) for a convolution.
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
    """Add the plain LoRA with exactly these weight changes, which diffusers scales, fuses and deletes like any LoRA.

    Args:
        factors: by layer name: up (out, k) and down (k, in), or (k, in * kh * kw) for a convolution.
        source: the file or folder of the adapter, for error messages.
    Raises: InputError naming a layer that the model lacks or has in another size.
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
                f"{source} does not fit this model: it changes the layer {name!r} of size {len(each.up)} x {each.down.shape[1]}, "
                f"but the model has {'no such layer' if size is None else f'one of {size[0]} x {size[1]}'}. Load it onto the "
                "model that it was trained on."
            )
        shaped[name] = in_weight_shape(layer, each)
    config, tensors = as_lora(shaped)
    add_adapter(model, config, adapter_name)
    set_peft_model_state_dict(model, tensors, adapter_name)


def _matrix_size(layer: nn.Module | None) -> tuple[int, int] | None:
    """(out, in) of a layer's weight as a matrix, also of a quantised one; None if there is no such layer."""
    if isinstance(layer, nn.Conv2d):
        return layer.out_channels, layer.weight[0].numel()
    return (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else None


def tuner_layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    """The adapted layers of `model` by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


@contextmanager
def adapters_off(models: Iterable[nn.Module]) -> Iterator[None]:
    """Disable all adapters of `models` within the context, without changing `requires_grad`."""
    before = {layer: layer.disable_adapters for model in models for layer in tuner_layers(model).values()}
    for layer in before:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, disabled in before.items():
            layer._disable_adapters = disabled


def base_losses(losses: Losses, models: Iterable[nn.Module]) -> Losses:
    """`losses` with the adapters of `models` disabled until the last loss has been differentiated."""

    def of_base_model(count: int) -> Iterator[torch.Tensor]:
        with adapters_off(models):
            yield from losses(count)

    return of_base_model


def trained_parameters(components: Mapping[str, nn.Module]) -> list[nn.Parameter]:
    """The trainable parameters of all components."""
    return [parameter for model in components.values() for parameter in model.parameters() if parameter.requires_grad]
