"""The options of the subject trainer, by concern. Each field is a command-line flag; its help is the flag's.

Where a flag means what it means in diffusers' train_dreambooth_lora_sdxl.py it has that script's name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diffusers.optimization import SchedulerType
from transformers import HfArgumentParser

from pipelines.errors import InputError
from pipelines.methods import AdapterOptions, method_named
from pipelines.subject.adapters import ATTENTION, EVERYWHERE
from pipelines.subject.base_model import ASSETS, BUILT_IN_MODEL, is_built_in
from pipelines.subject.data import SizeConditioning

SAMPLE_SUBJECT = ASSETS / "sample-subject"
SAMPLE_PROMPT = "a photo of sks toy"
NEW_SCENES = ("in the snow", "in the forest", "at night", "in the water")
# Adam's steps are of one size whatever the layer's width: narrow layers need larger ones.
BUILT_IN_RATE_FACTOR = 10
LATEST = "latest"


def _at_least(options: object, least: float, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and not value >= least:
            raise InputError(f"{name} must be at least {least}, got {value}.")


def _above_zero(options: object, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise InputError(f"{name} must be above 0, got {value}.")


@dataclass
class ModelOptions:
    """The base model and how it is computed."""

    pretrained_model_name_or_path: str = field(
        default=str(BUILT_IN_MODEL), metadata={"help": "SDXL base model: a hub name or a folder. The built-in one unless said."}
    )
    variant: str | None = field(default=None, metadata={"help": "Variant of the model's files, such as fp16."})
    mixed_precision: Literal["no", "fp16", "bf16"] | None = field(
        default=None, metadata={"help": "Precision of the frozen weights; what accelerate is configured for unless said."}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute activations in the backward pass: less memory, more time."}
    )

    _argument_group_name = "model"

    def __post_init__(self) -> None:
        if not self.pretrained_model_name_or_path:
            raise InputError("pretrained_model_name_or_path must be a hub name or a folder, got nothing.")


@dataclass
class DataOptions:
    """The subject's pictures and words."""

    instance_data_dir: str = field(
        default=str(SAMPLE_SUBJECT), metadata={"help": "Folder with pictures of the subject. The bundled toy unless said."}
    )
    instance_prompt: str | None = field(
        default=None, metadata={"help": "What the pictures show: a rare word and a class word, as in 'a photo of sks dog'."}
    )
    resolution: int | None = field(
        default=None, metadata={"help": "Side in pixels that pictures are resized and cropped to; the model's own unless said."}
    )
    random_flip: bool = field(
        default=False, metadata={"help": "Mirror pictures at random. Not for subjects with a left and a right, or with writing."}
    )
    size_conditioning: SizeConditioning | None = field(
        default=None,
        metadata={
            "help": "What SDXL is told of a picture's size and crop: picture, the truth; target, nothing, which is all that the "
            "built-in model knows and its default."
        },
    )
    heldout_image: str | None = field(
        default=None, metadata={"help": "File name of one of the pictures, left out of training to measure the loss on."}
    )

    _argument_group_name = "data"

    def __post_init__(self) -> None:
        if self.instance_prompt is None:
            if Path(self.instance_data_dir).resolve() != SAMPLE_SUBJECT.resolve():
                raise InputError(
                    "Pictures of your own need --instance_prompt: a rare word and a class word, as in 'a photo of sks dog'."
                )
            self.instance_prompt = SAMPLE_PROMPT
        if not self.instance_prompt.strip():
            raise InputError("instance_prompt must not be empty. Name the subject, as in 'a photo of sks dog'.")
        _at_least(self, 8, "resolution")
        if self.resolution is not None and self.resolution % 8:
            raise InputError(f"resolution must be a multiple of 8, got {self.resolution}.")


@dataclass
class OptimisationOptions:
    """How the adapter is trained."""

    max_train_steps: int = field(default=400, metadata={"help": "Optimisation steps."})
    train_batch_size: int = field(default=4, metadata={"help": "Pictures a batch on each process."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches an optimisation step."})
    learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate; on SDXL 3e-4 for nora and 1e-4 for lora unless said."}
    )
    lr_scheduler: str = field(
        default="cosine", metadata={"help": f"Schedule of the learning rate: {', '.join(kind.value for kind in SchedulerType)}."}
    )
    lr_warmup_steps: int = field(default=10, metadata={"help": "Steps over which the learning rate rises to its peak."})
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW's decay of the gradient's mean."})
    adam_beta2: float = field(default=0.999, metadata={"help": "AdamW's decay of the gradient's square."})
    adam_weight_decay: float = field(default=1e-4, metadata={"help": "AdamW's weight decay."})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "AdamW's epsilon."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm."})
    snr_gamma: float | None = field(default=None, metadata={"help": "Gamma of min-SNR weighting, such as 5; none unless said."})
    seed: int = field(default=0, metadata={"help": "Seed of everything that is drawn."})

    _argument_group_name = "optimisation"

    def __post_init__(self) -> None:
        _at_least(self, 1, "max_train_steps", "train_batch_size", "gradient_accumulation_steps")
        _at_least(self, 0, "lr_warmup_steps", "seed", "adam_weight_decay")
        _above_zero(self, "learning_rate", "max_grad_norm", "snr_gamma", "adam_epsilon")
        allowed = [kind.value for kind in SchedulerType]
        if self.lr_scheduler not in allowed:
            raise InputError(f"lr_scheduler must be one of {', '.join(allowed)}, got {self.lr_scheduler!r}.")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must be in [0, 1), got {getattr(self, name)}.")


@dataclass
class OutputOptions:
    """What is written while training and after it."""

    output_dir: str | None = field(default=None, metadata={"help": "The run's directory; a new one under runs/ unless said."})
    resume_from_checkpoint: Literal["latest"] | None = field(
        default=None, metadata={"help": "'latest' goes on from the newest checkpoint in --output_dir."}
    )
    checkpointing_steps: int = field(default=100, metadata={"help": "Steps between two checkpoints."})
    checkpoints_total_limit: int = field(default=2, metadata={"help": "How many checkpoints are kept."})
    validation_prompt: list[str] | None = field(
        default=None, metadata={"help": "Prompts of the pictures made before, during and after training; new scenes unless said."}
    )
    validation_steps: int = field(default=200, metadata={"help": "Steps between two sets of pictures."})

    _argument_group_name = "output"

    def __post_init__(self) -> None:
        _at_least(self, 1, "checkpointing_steps", "checkpoints_total_limit", "validation_steps")
        if self.resume_from_checkpoint is not None and self.output_dir is None:
            raise InputError("resume_from_checkpoint needs --output_dir, the directory of the run to go on with.")


@dataclass
class SubjectOptions:
    """All options of the subject trainer."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    optimisation: OptimisationOptions = field(default_factory=OptimisationOptions)
    output: OutputOptions = field(default_factory=OutputOptions)

    def __post_init__(self) -> None:
        built_in = is_built_in(self.model.pretrained_model_name_or_path)
        if self.data.size_conditioning is None:
            self.data.size_conditioning = "target" if built_in else "picture"
        if self.adapter.target_modules is None:
            self.adapter.target_modules = EVERYWHERE if built_in else ATTENTION
        if self.optimisation.learning_rate is None:
            factor = BUILT_IN_RATE_FACTOR if built_in else 1
            self.optimisation.learning_rate = factor * method_named(self.adapter.method).default_learning_rate
        if self.output.validation_prompt is None:
            prompt = self.data.instance_prompt
            self.output.validation_prompt = [prompt, *(f"{prompt} {scene}" for scene in NEW_SCENES)]

    def to_dict(self) -> dict[str, Any]:
        """The resolved options as plain values, by group."""
        return dataclasses.asdict(self)


GROUPS = (ModelOptions, DataOptions, AdapterOptions, OptimisationOptions, OutputOptions)


def parse_options(arguments: Sequence[str] | None = None, description: str | None = None) -> SubjectOptions:
    """The options on the command line; a wrong one ends the program with a message and exit code 2."""
    parser = HfArgumentParser(GROUPS, description=description, allow_abbrev=False)
    try:
        return SubjectOptions(*parser.parse_args_into_dataclasses(arguments, look_for_args_file=False))
    except ValueError as error:
        parser.error(str(error))
