"""The options of the subject trainer, by concern. Each field is a command-line flag; its help is the flag's.

Where a flag means what it means in diffusers' train_dreambooth_lora_sdxl.py it has that script's name.
"""

from __future__ import annotations

import dataclasses
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from pipelines.errors import InputError
from pipelines.methods import AdapterOptions, method_named
from pipelines.subject.adapters import ATTENTION, EVERYWHERE
from pipelines.subject.base_model import is_built_in
from pipelines.subject.optimizers import PRODIGY_LEARNING_RATE
from training.options.data import DataOptions
from training.options.file import as_flags
from training.options.judging import JudgingOptions
from training.options.model import ModelOptions
from training.options.optimisation import OptimisationOptions
from training.options.output import OutputOptions

NEW_SCENES = ("in the snow", "in the forest", "at night", "in the water")
# Adam's steps are of one size whatever the layer's width: narrow layers need larger ones.
BUILT_IN_RATE_FACTOR = 10


@dataclass
class SubjectOptions:
    """All options of the subject trainer."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    optimisation: OptimisationOptions = field(default_factory=OptimisationOptions)
    output: OutputOptions = field(default_factory=OutputOptions)
    judging: JudgingOptions = field(default_factory=JudgingOptions)

    def __post_init__(self) -> None:
        built_in = is_built_in(self.model.pretrained_model_name_or_path)
        if self.data.size_conditioning is None:
            self.data.size_conditioning = "target" if built_in else "picture"
        if self.adapter.target_modules is None:
            self.adapter.target_modules = EVERYWHERE if built_in else ATTENTION
        self._check_text_encoders()
        if self.optimisation.learning_rate is None:
            self.optimisation.learning_rate = self._default_learning_rate(built_in)
        if self.output.validation_prompt is None:
            prompts = self.data.subject_prompts()
            self.output.validation_prompt = [*prompts, *(f"{prompts[0]} {scene}" for scene in NEW_SCENES)]

    def _check_text_encoders(self) -> None:
        for name in ("text_encoder_lr", "stop_text_encoder_training"):
            if getattr(self.optimisation, name) is not None and not self.adapter.train_text_encoder:
                raise InputError(f"{name} needs --train_text_encoder: the text encoders are not trained without it.")

    def _default_learning_rate(self, built_in: bool) -> float:
        if self.optimisation.is_prodigy:
            return PRODIGY_LEARNING_RATE
        factor = BUILT_IN_RATE_FACTOR if built_in else 1
        return factor * method_named(self.adapter.method).default_learning_rate

    def to_dict(self) -> dict[str, Any]:
        """The resolved options as plain values, by group; the hub's token stays out."""
        values = dataclasses.asdict(self)
        values["judging"]["hub_token"] = None
        return values


GROUPS = (ModelOptions, DataOptions, AdapterOptions, OptimisationOptions, OutputOptions, JudgingOptions)


def parse_options(arguments: Sequence[str] | None = None, description: str | None = None) -> SubjectOptions:
    """The options on the command line; a wrong one ends the program with a message and exit code 2."""
    parser = HfArgumentParser(GROUPS, description=description, allow_abbrev=False)
    parser.add_argument(
        "--options_file",
        help="A .json or .yaml file of options, such as a run's options.json, which starts a run like it; flags given beside it "
        "win.",
    )
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        flags = [*_flags_of_file(given, parser), *given]
        groups = parser.parse_args_into_dataclasses(flags, look_for_args_file=False)
        return SubjectOptions(*groups[: len(GROUPS)])
    except ValueError as error:
        parser.error(str(error))


def _flags_of_file(given: list[str], parser: HfArgumentParser) -> list[str]:
    """What the file named by --options_file says, as flags; none without one."""
    finder = ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--options_file", type=Path)
    path = finder.parse_known_args(given)[0].options_file
    names = [group.name for group in dataclasses.fields(SubjectOptions)]
    return [] if path is None else as_flags(path, parser, names)
