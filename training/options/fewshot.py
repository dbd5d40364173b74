"""The options of the few-shot trainer, by concern. Each field is a command-line flag; its help is the flag's."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipelines.adapter_options import AdapterOptions, fill_in, options_of, renamed_flag, unused_options, with_method_options
from pipelines.built_in import BUILT_IN_CLIP_NAME
from pipelines.errors import InputError
from pipelines.fewshot.baselines import BASELINES
from pipelines.fewshot.prompts import PHOTO, TEMPLATE_NAMES
from pipelines.fewshot.sets import SETS
from pipelines.fewshot.shots import MOST_VALIDATION, Shots
from pipelines.fewshot.target_layers import TargetLayers
from pipelines.methods import AUTO, DEFAULT, REFERENCE, method_named, method_names, title_of
from pipelines.optimizers import ADAMW, MUON, optimizer_named
from pipelines.option_checks import above_zero, at_least
from training.options.command_line import parse_groups
from training.options.output import RunOptions

DEFAULT_METHODS = ("zeroshot", "pixels", "linear_probe", REFERENCE, DEFAULT)
# AUTO takes the one with the higher accuracy on the validation images. Next to the adapter, GDA costs nothing.
AUTO_METHODS = ("gda", DEFAULT)
ALL = "all"
NEED_FULL_PRECISION = ("merged", "torch", "onnx")
EXPORTS = ("lora", *NEED_FULL_PRECISION)
DEFAULT_SEEDS = 5
OPTIMIZERS = (ADAMW, MUON)
# Optimisation steps per training image of a class: 500 as in CLIP-LoRA; 20 as measured in docs/arena.md.
ITERATIONS, BUILT_IN_ITERATIONS = 500, 20


@dataclass
class ClipOptions:
    """The CLIP model."""

    model: str = field(
        default=BUILT_IN_CLIP_NAME,
        metadata={
            "help": "A model of open_clip, such as ViT-B-16, a folder with an open_clip_config.json, or hf-hub:OWNER/NAME for "
            "such a folder on the hub. Default: the built-in model."
        },
    )
    pretrained: str | None = field(
        default=None,
        metadata={
            "help": "Weights of the model: one of open_clip's tags, such as openai, a .safetensors checkpoint, or random. The "
            "built-in model and folders have weights of their own."
        },
    )
    quantize: Literal["nf4"] | None = field(
        default=None,
        metadata={
            "help": "nf4 keeps the linear layers of both encoders in 4 bits per parameter, as QLoRA does: with double "
            "quantisation, on GPUs products in bfloat16 and a paged AdamW (pip install bitsandbytes)."
        },
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = field(
        default=None, metadata={"help": "Precision of the training steps. Default: that of the accelerate configuration."}
    )

    _argument_group_name = "model"

    @property
    def is_built_in(self) -> bool:
        """Whether it is the built-in model."""
        return self.model == BUILT_IN_CLIP_NAME


@dataclass
class LabelledDataOptions:
    """The labelled images, their splits, and the names of their classes."""

    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of class folders, a .zip of one, or a .csv with the columns path and label. A split that is defined "
            "by folders, a split.json or a column of the .csv is used. Default: scikit-learn's handwritten digits."
        },
    )
    dataset: str | None = field(
        default=None,
        metadata={"help": f"One of the eleven datasets of the CoOp protocol, in its folder below --data_dir: {', '.join(SETS)}."},
    )
    class_names: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of classes, each as folder=name. Default: the names of the folders. A folder named here is a class, "
            "even if it has the name of a part of a split."
        },
    )
    templates: list[str] | None = field(
        default=None,
        metadata={
            "help": "Prompts with {} for the class's name, in training and evaluation: one, several for an ensemble, or a name: "
            f"{', '.join(TEMPLATE_NAMES)}. Default: those of the dataset, or {PHOTO!r}."
        },
    )
    shots: list[str] = field(default_factory=lambda: ["16"], metadata={"help": "Training images per class: numbers, or all."})
    seeds: list[int] = field(
        default_factory=lambda: list(range(DEFAULT_SEEDS)),
        metadata={"help": "Random seeds. Each gives another split and another initialisation."},
    )
    test_share: float = field(
        default=0.3, metadata={"help": "Share of each class held out for testing, unless the dataset has a split."}
    )
    num_validation_images: int | None = field(
        default=None,
        metadata={
            "help": f"Validation images per class, besides the training images. Default: {MOST_VALIDATION}, and at most as many "
            "as shots."
        },
    )
    base_to_new: bool = field(
        default=False,
        metadata={"help": "Train on the first half of the classes, and also test on the second half by their names alone."},
    )
    crop_scale: list[float] = field(
        default_factory=lambda: [0.5, 1.0],
        metadata={"help": "Smallest and largest share of a training image's area in a random crop."},
    )
    random_flip: bool = field(
        default=False,
        metadata={"help": "Flip training images horizontally at random. Not for asymmetric objects or objects with text."},
    )
    views: int = field(default=4, metadata={"help": "Augmented views of each training image for methods on frozen features."})
    cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder for the features of the model without adapters, which several runs may share. Default: in the run "
            "directory."
        },
    )
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that decode images; 0 uses the main process."})

    _argument_group_name = "data"

    def __post_init__(self) -> None:
        self._check_dataset()
        at_least(self, 0, "views", "dataloader_num_workers")
        at_least(self, 1, "num_validation_images")
        if not 0 < self.test_share < 1:
            raise InputError(f"test_share must be between 0 and 1, got {self.test_share}.")
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            given = " ".join(map(str, self.crop_scale))
            raise InputError(f"crop_scale must be two shares with 0 < smallest <= largest <= 1, got {given}.")
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds must be different numbers of at least 0, got {self.seeds}.")
        self.all_shots()
        self.names_by_key()

    def _check_dataset(self) -> None:
        if self.dataset is not None and self.dataset not in SETS:
            raise InputError(f"dataset must be one of {', '.join(SETS)}, got {self.dataset!r}.")
        if self.dataset is not None and self.data_dir is None:
            raise InputError("dataset needs --data_dir, the folder that contains the folders of the datasets.")

    def all_shots(self) -> list[Shots]:
        """The numbers of shots.

        Raises: InputError for a duplicate, or a value that is neither a positive number nor "all".
        """
        wrong = [given for given in self.shots if given != ALL and not (given.isdecimal() and int(given) >= 1)]
        if wrong or not self.shots or len(set(self.shots)) < len(self.shots):
            raise InputError(f"shots must be different numbers of at least 1, or all, got {' '.join(self.shots) or 'nothing'}.")
        return [ALL if given == ALL else int(given) for given in self.shots]

    def names_by_key(self) -> dict[str, str]:
        """The given class names, by the name of the folder.

        Raises: InputError for a value that does not have the form folder=name.
        """
        pairs = [given.partition("=") for given in self.class_names or ()]
        if wrong := ["".join(pair) for pair in pairs if not (pair[0] and pair[1] and pair[2].strip())]:
            raise InputError(f"class_names must each be written as folder=name, got {wrong[0]!r}.")
        return {key: name for key, _, name in pairs}


@with_method_options("few-shot")
@dataclass
class FewShotMethodOptions:
    """The methods, and the options of the adapter methods."""

    method: list[str] = field(
        default_factory=lambda: list(DEFAULT_METHODS),
        metadata={
            "help": f"Methods to train and compare: {', '.join(BASELINES)}, {', '.join(method_names())}; or {AUTO}, for the one "
            f"of {' and '.join(AUTO_METHODS)} that is better on the validation images."
        },
    )

    _argument_group_name = "method"

    def __post_init__(self) -> None:
        methods = (*BASELINES, *method_names())
        wrong = [name for name in self.methods() if name not in methods]
        if wrong or not self.method or len(set(self.method)) < len(self.method):
            given = " ".join(self.method) or "nothing"
            raise InputError(f"method must be {AUTO}, or one or more of {', '.join(methods)}, each once, got {given}.")

    @property
    def is_automatic(self) -> bool:
        """Whether the run chooses its method on the validation images."""
        return self.method == [AUTO]

    def methods(self) -> list[str]:
        """The methods to train."""
        return list(AUTO_METHODS) if self.is_automatic else self.method

    def adapters(self) -> list[str]:
        """The methods to train that adapt the encoders."""
        return [name for name in self.methods() if name not in BASELINES]

    def unused(self) -> list[str]:
        """A warning for each given option that has no effect."""
        return unused_options(self, "few-shot", self.adapters())


@dataclass
class FewShotOptimisationOptions:
    """How adapters are trained."""

    iterations_per_shot: int | None = field(
        default=None,
        metadata={
            "help": f"Optimisation steps per training image of a class. Default: {ITERATIONS}, or {BUILT_IN_ITERATIONS} on the "
            "built-in model."
        },
    )
    min_train_steps: int = field(default=100, metadata={"help": "Smallest number of optimisation steps."})
    max_train_steps: int | None = field(
        default=None,
        metadata={
            "help": "Optimisation steps of every adapter, whatever the number of shots. Default: those of --iterations_per_shot "
            "and --min_train_steps."
        },
    )
    train_batch_size: int = field(default=32, metadata={"help": "Images per batch on each process."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches per optimisation step."})
    learning_rate: float | None = field(default=None, metadata={"help": "Peak learning rate. Default: depends on the method."})
    optimizer: str | None = field(
        default=None,
        metadata={
            "help": "AdamW, or Muon, whose steps on a matrix have equal singular values. Default: depends on method and model."
        },
    )
    adam_weight_decay: float = field(default=1e-2, metadata={"help": "The optimiser's weight decay."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Maximum norm of the gradients, which are clipped to it."})

    _argument_group_name = "optimisation"

    def __post_init__(self) -> None:
        at_least(self, 1, "iterations_per_shot", "min_train_steps", "max_train_steps")
        at_least(self, 1, "train_batch_size", "gradient_accumulation_steps")
        at_least(self, 0, "adam_weight_decay")
        above_zero(self, "learning_rate", "max_grad_norm")
        if self.optimizer is not None:
            self.optimizer = optimizer_named(self.optimizer, OPTIMIZERS)

    def steps(self, shots: int) -> int:
        """Optimisation steps for `shots` training images per class."""
        return self.max_train_steps or max(self.min_train_steps, self.iterations_per_shot * shots)


@dataclass
class FewShotOutputOptions(RunOptions):
    """The run directory and the exports."""

    export: list[str] = field(
        default_factory=lambda: ["lora"],
        metadata={"help": f"Exports for other programs: {', '.join(EXPORTS)}. Default: lora, the smallest."},
    )
    validation_steps: int = field(
        default=0,
        metadata={
            "help": "Steps between two measurements of an adapter's accuracy on the validation images during its training; 0 for "
            "none. They change nothing else, and take time that is not counted as training."
        },
    )

    _argument_group_name = "output"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "validation_steps")
        wrong = [name for name in self.export if name not in EXPORTS]
        if wrong:
            raise InputError(f"export must be any of {', '.join(EXPORTS)}, got {wrong[0]!r}.")


# Factor of the learning rates for the narrow layers of the built-in model.
BUILT_IN_RATE_FACTOR = 50


@dataclass
class FewShotOptions:
    """All options of the few-shot trainer."""

    model: ClipOptions = field(default_factory=ClipOptions)
    data: LabelledDataOptions = field(default_factory=LabelledDataOptions)
    target_layers: TargetLayers = field(default_factory=TargetLayers)
    method: FewShotMethodOptions = field(default_factory=FewShotMethodOptions)
    optimisation: FewShotOptimisationOptions = field(default_factory=FewShotOptimisationOptions)
    output: FewShotOutputOptions = field(default_factory=FewShotOutputOptions)

    def __post_init__(self) -> None:
        built_in = self.model.is_built_in
        fill_in(self.method, "few-shot", built_in, method_names())
        for name in self.method.adapters():
            # Raises InputError if its options do not fit each other.
            self.adapter(name).check_quantization(self.model.quantize)
        if self.model.quantize is not None and (wrong := [name for name in self.output.export if name in NEED_FULL_PRECISION]):
            raise InputError(
                f"export {wrong[0]} merges the adapter into weights in full precision, so it cannot be used with --quantize. Use "
                "--export lora, or leave out --quantize."
            )
        if self.optimisation.iterations_per_shot is None:
            self.optimisation.iterations_per_shot = BUILT_IN_ITERATIONS if built_in else ITERATIONS
        if self.data.templates is None:
            sample = "digits" if self.data.data_dir is None else "photo"
            self.data.templates = [self.data.dataset or sample]

    def adapter(self, method: str) -> AdapterOptions:
        """The adapter options of `method`. Raises: InputError naming the method and the flag."""
        try:
            return AdapterOptions(method, **options_of(self.method, "few-shot", self.model.is_built_in, method))
        except InputError as error:
            flags = renamed_flag("rank", [method], "few-shot") if "rank" in str(error) else ""
            raise InputError(f"{title_of(method)}: {error}{flags}") from error

    def learning_rate(self, method: str) -> float:
        """The peak learning rate of an adapter method."""
        if self.optimisation.learning_rate is not None:
            return self.optimisation.learning_rate
        rate = self.adapter(method).create().learning_rate("few-shot", self.model.is_built_in, self.optimizer(method))
        return rate * (BUILT_IN_RATE_FACTOR if self.model.is_built_in else 1)

    def optimizer(self, method: str) -> str:
        """The name of the optimiser of an adapter method."""
        return self.optimisation.optimizer or method_named(method).defaults("few-shot", self.model.is_built_in).optimizer

    def title(self) -> str:
        """The part of the run directory's name that follows the time."""
        return self.data.dataset or ("digits" if self.data.data_dir is None else Path(self.data.data_dir).resolve().stem)

    def to_dict(self) -> dict[str, Any]:
        """The resolved options as plain values, by group."""
        return dataclasses.asdict(self)


def parse_fewshot_options(arguments: Sequence[str] | None = None, description: str | None = None) -> FewShotOptions:
    """Parse the command line; an invalid option ends the program with a message and exit code 2."""
    return parse_groups(FewShotOptions, arguments, description)
