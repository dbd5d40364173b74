"""The base class of adapter methods, and the functions that they share.

Every command reads its flags from the methods' options, and PEFT takes seconds to import. So it is imported inside functions,
here and in the methods, and `--help` does not load it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pipelines.adapter_checks import PEFT_ERRORS, check_rank, check_ranks_of_file, check_targets, check_tensors
from pipelines.errors import InputError
from pipelines.lazy_modules import nn, torch
from pipelines.native_files import FULL, METHOD_KEY, WEIGHTS, read_native, write_native
from pipelines.optimizers import ADAMW
from pipelines.option_checks import above_zero, at_least, below_one
from pipelines.run_options import Task

if TYPE_CHECKING:
    from peft import PeftConfig
    from peft.tuners.tuners_utils import BaseTunerLayer

    from nora_vision.calibration import BaseCalibration


ADAPTER_NAME = "default"


Losses = Callable[[int], Iterator["torch.Tensor"]]


def no_losses(count: int) -> Iterator[torch.Tensor]:
    """A `Losses` without losses. Raises: ValueError."""
    raise ValueError("This method is initialised from gradients of the training loss, but no losses were given.")


@dataclass(frozen=True)
class Probe:
    """Access to the base model and the training data, for methods that are initialised from them.

    Args:
        forward: runs the adapted model on the data, to record activations.
        losses: `losses(count)` yields the base model's training losses, scalars to differentiate, on this process's share of
            `count` batches, or with 0 of those of one epoch; the same on each call. All adapters are disabled meanwhile.
        generator: the source of all randomness.
        cache: a .safetensors file for results that a later initialisation from the same data can reuse.
        base_calibration: computes activation statistics of layers, by their names, on fixed inputs instead of the data; None if
            there are none for the model.
        unquantized: the folder of the weights before quantisation, which `nora_vision.CheckpointWeights` reads; None for a model
            in full precision and for methods without `uses_unquantized_weights`.
    """

    forward: Callable[[], None]
    losses: Losses
    generator: torch.Generator
    cache: Path
    base_calibration: BaseCalibration | None = None
    unquantized: Path | None = None


@dataclass(frozen=True)
class TaskDefaults:
    """A method's defaults on one task and base model.

    Args:
        learning_rate: the peak learning rate on models of full width; recipes raise it for the narrow built-in ones.
        options: defaults of the options whose default in `Options` is None, by field name.
        target_layers: name endings of the layers to adapt; None for the task's default.
        optimizer: the optimiser of classification, one of `OPTIMIZERS`.
    """

    learning_rate: float
    options: Mapping[str, Any] = field(default_factory=dict)
    target_layers: Sequence[str] | None = None
    optimizer: str = ADAMW


class MethodTraining:
    """A method's state and hooks during one training run; each run creates its own. Steps count from 1.

    Args:
        models: the adapted models.
        total_steps: optimisation steps of the run.
    """

    def __init__(self, models: Sequence[nn.Module], total_steps: int) -> None:
        self.models, self.total_steps = models, total_steps

    def regularizer(self) -> torch.Tensor | None:
        """A scalar that is added to the loss of every batch; None for none."""
        return None

    def before_step(self, step: int, generator: torch.Generator) -> None:
        """Called before the forward passes of a step; `generator` depends on the seed of the run and `step` only."""

    def after_backward(self, step: int) -> None:
        """Called after all backward passes of a step and the clipping of gradients, and before `optimizer.step`."""

    def after_step(self, step: int) -> None:
        """Called after `optimizer.step` and before `zero_grad`, so that gradients are available."""

    def round_trained(self) -> None:
        """Round the trained parameters to the values that the adapter's files will hold; called before they are measured."""

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
        metadata: `choices`, and under a task's name the name of the flag on that task. `before_it_existed`: the value of the
            option in runs that did not record it, if that is not the default.
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
        above_zero(self, "alpha")
        below_one(self, "dropout")


class AdapterMethod:
    """An adapter method. A subclass sets the class attributes and overrides what differs.

    Each field of the dataclass `Options` is a flag and a form field; `option` makes one.

    Args:
        options: an instance of `Options` with every value set.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    reference: ClassVar[str]
    # Trained parameters of one layer, a Python expression in m and n (rows and columns of the weight as a matrix) and options.
    parameters: ClassVar[str]
    # Trained parameters that all layers of a component share, an expression in options and `layers`, the number of layers.
    shared_parameters: ClassVar[str] = "0"
    Options: ClassVar[type] = LowRankOptions
    # Whether an initialised, untrained adapter leaves the model's output unchanged.
    starts_at_base: ClassVar[bool] = True
    # Whether the seed changes the initial values of its tensors.
    samples_start: ClassVar[bool] = True
    # The option that must not exceed the size of every adapted weight; None if higher values make sense or `attach` checks it.
    rank_option: ClassVar[str | None] = "rank"
    # Which layers it can adapt besides linear ones in full precision.
    adapts_convolutions: ClassVar[bool] = True
    adapts_quantized_layers: ClassVar[bool] = True
    # Whether `start` reads the weights before quantisation, so that they are kept on disk until then.
    uses_unquantized_weights: ClassVar[bool] = False
    # Whether the exported files of LoRA change the model as the adapter does; otherwise `export_note` says what differs.
    exports_exactly: ClassVar[bool] = True
    # Markdown on how other programs read the exported files, if their results differ.
    export_note: ClassVar[str | None] = None
    # What scales other than 1 do, if the change is not proportional to them; such adapters cannot be added either.
    scale_note: ClassVar[str | None] = None
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

    def add(
        self,
        model: nn.Module,
        target_modules: list[str],
        generator: torch.Generator,
        adapter_name: str = ADAPTER_NAME,
        exclude_modules: str | None = None,
    ) -> None:
        """Configure the adapter, note the method in the configuration, and attach it to `model`.

        Raises: ValueError if it does not fit the model, or naming targets that the model lacks.
        """
        config = self.config(target_modules, exclude_modules)
        note_method(config, self.name)
        check_targets(model, config)
        check_rank(model, config, self.rank_option, getattr(self.options, self.rank_option or "", None))
        self.attach(model, config, adapter_name, generator)

    def attach(self, model: nn.Module, config: PeftConfig, adapter_name: str, generator: torch.Generator) -> None:
        """Add the adapter to `model`; values that are sampled here and not in `start` come from `generator`.

        Raises: ValueError if the configuration does not fit the model.
        """
        self.inject(model, config, adapter_name)

    def prepare_dry_run(self, model: nn.Module, adapter_name: str) -> bool:
        """Prepare an adapter that was just added to `model` for training steps that only measure memory and time, before `start`.

        Returns: whether the steps can come before `start`. It must then need no more memory than they do, and replace all values.
        """
        return False

    def prepare_start(self, components: Mapping[str, nn.Module], probes: Mapping[str, Probe], adapter_name: str) -> None:
        """Called once before `start`, with all components and a probe of each, by name."""

    def start(self, model: nn.Module, probe: Probe, adapter_name: str) -> None:
        """Initialise an adapter that was just added to `model`."""
        raise NotImplementedError

    @property
    def needs_quantization(self) -> bool:
        """Whether the base model must be quantised."""
        return False

    @property
    def without_effect(self) -> frozenset[str]:
        """The options that have no effect with the values of the others, by name: a resumed run may have other values.

        A run is told which of them were given.
        """
        return frozenset()

    def formula_names(self, m: int, n: int) -> dict[str, int]:
        """The names in `parameters` besides those of options, for a weight (m, n)."""
        return {"m": m, "n": n}

    def learning_rate(self, task: Task, built_in: bool, optimizer: str) -> float:
        """The default peak learning rate with these options and this optimiser; see `TaskDefaults`."""
        return self.defaults(task, built_in).learning_rate

    def learning_rate_factor(self, parameter_name: str) -> float:
        """The factor on the learning rate of the parameter with this name."""
        return 1.0

    def training(self, models: Sequence[nn.Module], total_steps: int) -> MethodTraining:
        """The method's state and hooks for a training run of `total_steps` steps."""
        return MethodTraining(models, total_steps)

    # The class methods below apply to every adapter of the method, whatever its options were.

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
            metadata = {METHOD_KEY: cls.name, **cls.file_metadata(model, adapter_name)}
            write_native(folder / FULL / name, model.peft_config[adapter_name], tensors, metadata)

    @classmethod
    def file_metadata(cls, model: nn.Module, adapter_name: str) -> dict[str, str]:
        """Metadata of the adapter's native file, from which `check_loaded` verifies what the file does not hold."""
        return {}

    @classmethod
    def check_loaded(cls, model: nn.Module, adapter_name: str, metadata: Mapping[str, str], source: Path) -> None:
        """Verify an adapter that was loaded from the native file `source`, with the metadata that `file_metadata` returned.

        Raises: AdapterFileError if values that the file does not hold differ here from those that it was trained with.
        """

    @classmethod
    def inject(cls, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        """Add the adapter's layers to `model`."""
        add_adapter(model, config, adapter_name)

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
            config, tensors, metadata = read_native(folder / name)
            # Earlier versions wrote no prefix; PEFT's own loader needs one.
            state = {key.removeprefix(PEFT_PREFIX): value for key, value in tensors.items()}
            note_method(config, cls.name)
            try:
                if cls.rank_option is not None:
                    check_ranks_of_file(model, config, tensors)
                cls.inject(model, config, adapter_name)
                check_tensors(state, get_peft_model_state_dict(model, adapter_name=adapter_name))
            except PEFT_ERRORS as error:
                raise InputError(
                    f"{folder / name / WEIGHTS} does not fit this {name} model: {error} Load it onto the one it was trained on."
                ) from error
            set_peft_model_state_dict(model, state, adapter_name)
            cls.check_loaded(model, adapter_name, metadata, folder / name / WEIGHTS)

    @classmethod
    def load_calibrated(
        cls,
        components: Mapping[str, nn.Module],
        folder: Path,
        adapter_name: str,
        base_calibration: Mapping[str, BaseCalibration],
    ) -> None:
        """As `load`, for methods whose files may need the base calibration of a component."""
        cls.load(components, folder, adapter_name)

    @classmethod
    def conflicts(cls, model: nn.Module, adapter_name: str) -> list[str]:
        """Sentences about other adapters of `model` that should not be used together with this one."""
        return []


def note_method(config: PeftConfig, name: str) -> None:
    """Note the name of the method in a configuration, which `method_of` reads; PEFT does not save the note."""
    config.nora_vision_method = name


def add_adapter(model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
    """Add an adapter to `model` by its own `add_adapter` (diffusers, transformers), or else by PEFT.

    Raises: ValueError if the configuration does not fit the model.
    """
    from peft import inject_adapter_in_model

    if hasattr(model, "add_adapter"):
        model.add_adapter(config, adapter_name)
    else:
        inject_adapter_in_model(config, model, adapter_name)


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


def trained_parameters(components: Mapping[str, nn.Module]) -> list[nn.Parameter]:
    """The trainable parameters of all components."""
    return [parameter for model in components.values() for parameter in model.parameters() if parameter.requires_grad]
