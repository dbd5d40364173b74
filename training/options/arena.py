"""The options of the arena, by concern. Each field is a command-line flag; its help is the flag's."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.built_in import BUILT_IN, BUILT_IN_CLIP_NAME
from pipelines.errors import InputError
from pipelines.fewshot.baselines import BASELINES
from pipelines.methods import DEFAULT, REFERENCE, method_names
from pipelines.option_checks import above_zero, at_least
from training.options.command_line import parse_groups

DIGITS, ALL = "digits", "all"
DEFAULT_STEPS = 200
# Photos of a subject: to train on, to choose a learning rate on and to test on.
FEWEST_PHOTOS = 3


@dataclass
class ArenaDataOptions:
    """The subjects and the labelled datasets, and the splits of each."""

    subjects_dir: str | None = field(
        default=None,
        metadata={"help": "Folder with one folder of images for each subject, or the folder of images of a single subject."},
    )
    class_words: list[str] | None = field(
        default=None,
        metadata={
            "help": "Class words of the subjects' prompts, each as folder=word. Default: the folder's name, without underscores."
        },
    )
    datasets: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"Labelled datasets: anything that --data_dir of the few-shot trainer takes, or {DIGITS} for scikit-learn's "
            "handwritten digits."
        },
    )
    shots: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16], metadata={"help": "Training images per class."})
    seeds: list[int] = field(
        default_factory=lambda: list(range(5)),
        metadata={"help": "Random seeds. Each gives another split and another initialisation."},
    )
    base_to_new: bool = field(
        default=True,
        metadata={"help": "Also train on half of the classes, and test on the other half by their names alone."},
    )
    sweep_validation_images: int = field(
        default=30, metadata={"help": "Validation images per class that the learning rate of a few-shot method is chosen on."}
    )

    _argument_group_name = "data"

    def __post_init__(self) -> None:
        if self.subjects_dir is None and not self.datasets:
            raise InputError("There is nothing to compare methods on: give --subjects_dir, --datasets, or both.")
        at_least(self, 1, "sweep_validation_images")
        for name, least in (("shots", 1), ("seeds", 0)):
            values = getattr(self, name)
            if not values or min(values) < least or len(set(values)) < len(values):
                raise InputError(f"{name} must be different numbers of at least {least}, got {values}.")
        self.words_by_folder()

    def words_by_folder(self) -> dict[str, str]:
        """The given class words, by the name of the subject's folder.

        Raises: InputError for a value that does not have the form folder=word.
        """
        pairs = [given.partition("=") for given in self.class_words or ()]
        if wrong := ["".join(pair) for pair in pairs if not (pair[0] and pair[1] and pair[2].strip())]:
            raise InputError(f"class_words must each be written as folder=word, got {wrong[0]!r}.")
        return {folder: word for folder, _, word in pairs}


@dataclass
class ArenaMethodOptions:
    """The methods, and the budget that each of them gets."""

    methods: list[str] = field(
        default_factory=lambda: [REFERENCE, DEFAULT],
        metadata={
            "help": "Methods, each a name or a name with options, as in nora:basis=gradient,rank=16; all means every method. "
            f"Names: {', '.join(method_names())}; for labelled datasets also {', '.join(BASELINES)}."
        },
    )
    max_train_steps: int | None = field(
        default=None, metadata={"help": f"Optimisation steps of each training. Default: {DEFAULT_STEPS}."}
    )
    max_train_seconds: float | None = field(
        default=None,
        metadata={"help": "Seconds of each training, in place of steps: a method's number of steps follows from its pace."},
    )
    learning_rate_factors: list[float] = field(
        default_factory=lambda: [0.3, 1.0, 3.0],
        metadata={
            "help": "Learning rates that are tried for each method, as multiples of its default. If the best one is the smallest "
            "or largest, up to two more are tried on that side."
        },
    )

    _argument_group_name = "method"

    def __post_init__(self) -> None:
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise InputError(f"methods must be one or more, each once, got {' '.join(self.methods) or 'nothing'}.")
        at_least(self, 1, "max_train_steps")
        above_zero(self, "max_train_seconds")
        if self.max_train_steps is not None and self.max_train_seconds is not None:
            raise InputError("max_train_steps and max_train_seconds are two budgets. Give one of them.")
        if self.max_train_steps is None and self.max_train_seconds is None:
            self.max_train_steps = DEFAULT_STEPS
        if not self.learning_rate_factors or min(self.learning_rate_factors) <= 0:
            raise InputError(f"learning_rate_factors must be above 0, got {self.learning_rate_factors}.")
        self.learning_rate_factors = sorted(set(self.learning_rate_factors))


@dataclass
class ArenaModelOptions:
    """The base models, and further flags of the recipes."""

    pretrained_model_name_or_path: str = field(
        default=BUILT_IN, metadata={"help": "SDXL base model of the subjects. Default: the built-in model."}
    )
    model: str = field(
        default=BUILT_IN_CLIP_NAME, metadata={"help": "CLIP model of the labelled datasets. Default: the built-in model."}
    )
    pretrained: str | None = field(default=None, metadata={"help": "Weights of the CLIP model, such as openai."})
    subject_flags: str = field(default="", metadata={"help": "Flags for every training of a subject, in one text."})
    fewshot_flags: str = field(default="", metadata={"help": "Flags for every few-shot training, in one text."})

    _argument_group_name = "models"

    def __post_init__(self) -> None:
        for name in ("subject_flags", "fewshot_flags"):
            try:
                shlex.split(getattr(self, name))
            except ValueError as error:
                raise InputError(f"{name} must be flags as in a shell, got {getattr(self, name)!r}: {error}.") from error


@dataclass
class ArenaOutputOptions:
    """The arena's directory, and where its cells run."""

    output_dir: str = field(
        default="runs/arena", metadata={"help": "Directory of the arena. Cells that it has finished are not run again."}
    )
    num_workers: int | None = field(
        default=None, metadata={"help": "Cells that run at once on this machine. Default: one for each GPU, or one on the CPU."}
    )
    ray_address: str | None = field(
        default=None,
        metadata={
            "help": "Address of a Ray cluster, or auto, whose workers run the cells (pip install ray). All of them must see the "
            "arena's directory and the images under the same paths."
        },
    )
    cpus_per_cell: float = field(default=1.0, metadata={"help": "CPU cores that Ray reserves for a cell."})
    gpus_per_cell: float = field(default=0.0, metadata={"help": "GPUs that Ray reserves for a cell."})
    results: list[str] = field(
        default_factory=list,
        metadata={"help": "Files of results of other arenas (their results.jsonl). Cells with a result there are not run again."},
    )
    retry_failed: bool = field(default=False, metadata={"help": "Run cells again that have failed before."})
    write: str | None = field(
        default=None,
        metadata={"help": "A Markdown document whose parts between the arena's comments are replaced by the report."},
    )
    report_only: bool = field(default=False, metadata={"help": "Only write the report of the cells that are finished."})

    _argument_group_name = "output"

    def __post_init__(self) -> None:
        at_least(self, 1, "num_workers")
        at_least(self, 0, "gpus_per_cell")
        above_zero(self, "cpus_per_cell")


@dataclass
class ArenaOptions:
    """All options of the arena."""

    data: ArenaDataOptions
    method: ArenaMethodOptions = field(default_factory=ArenaMethodOptions)
    models: ArenaModelOptions = field(default_factory=ArenaModelOptions)
    output: ArenaOutputOptions = field(default_factory=ArenaOutputOptions)

    def to_dict(self) -> dict[str, Any]:
        """The resolved options as plain values, by group."""
        return dataclasses.asdict(self)


def parse_arena_options(arguments: Sequence[str] | None = None, description: str | None = None) -> ArenaOptions:
    """Parse the command line; an invalid option ends the program with a message and exit code 2."""
    return parse_groups(ArenaOptions, arguments, description)
