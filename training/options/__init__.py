"""The options of the subject trainer, by concern. Each field is a command-line flag; its help is the flag's.

A flag with the meaning of a flag of diffusers' train_dreambooth_lora_sdxl.py has the same name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.adapter_options import AdapterOptions, unused_options
from pipelines.built_in import is_built_in
from pipelines.errors import InputError
from pipelines.optimizers import PRODIGY_LEARNING_RATE
from pipelines.subject.target_layers import default_targets
from training.options.command_line import parse_groups
from training.options.data import DataOptions
from training.options.model import ModelOptions
from training.options.optimisation import OptimisationOptions
from training.options.output import OutputOptions
from training.options.validation import ValidationOptions

NEW_SCENES = ("in the snow", "in the forest", "at night", "in the water")
# Adam's step size does not depend on the width of a layer, and the narrow layers of the built-in model need larger steps.
BUILT_IN_RATE_FACTOR = 10


@dataclass
class SubjectOptions:
    """All options of the subject trainer."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    optimisation: OptimisationOptions = field(default_factory=OptimisationOptions)
    output: OutputOptions = field(default_factory=OutputOptions)
    validation: ValidationOptions = field(default_factory=ValidationOptions)

    def __post_init__(self) -> None:
        built_in = is_built_in(self.model.pretrained_model_name_or_path)
        if self.data.size_conditioning is None:
            self.data.size_conditioning = "target" if built_in else "image"
        if self.adapter.target_modules is None:
            self.adapter.target_modules = default_targets(self.adapter.method, built_in)
        self.validation.fill_in(built_in, self.output.validation_images)
        self._check_text_encoders()
        self._check_rates()
        self.adapter.check_quantization(self.model.quantize)
        if self.optimisation.learning_rate is None:
            self.optimisation.learning_rate = self._default_learning_rate(built_in)
        if self.output.validation_prompt is None:
            prompts = self.data.subject_prompts()
            self.output.validation_prompt = [*prompts, *(f"{prompts[0]} {scene}" for scene in NEW_SCENES)]

    def _check_text_encoders(self) -> None:
        for name in ("text_encoder_lr", "stop_text_encoder_training"):
            if getattr(self.optimisation, name) is not None and not self.adapter.train_text_encoder:
                raise InputError(f"{name} needs --train_text_encoder: the text encoders are not trained without it.")

    def _check_rates(self) -> None:
        if self.optimisation.is_prodigy and self.adapter.lora_plus_ratio != 1:
            raise InputError(
                "Prodigy adapts one learning rate for all parameters, so lora_plus_ratio needs --optimizer AdamW. Leave it out."
            )

    def unused(self) -> list[str]:
        """A sentence for each given option that has no effect."""
        return unused_options(self.adapter, "subject", [self.adapter.method])

    def _default_learning_rate(self, built_in: bool) -> float:
        if self.optimisation.is_prodigy:
            return PRODIGY_LEARNING_RATE
        factor = BUILT_IN_RATE_FACTOR if built_in else 1
        return factor * self.adapter.create().learning_rate("subject", built_in, self.optimisation.optimizer)

    def prompts(self, captions: Iterable[str] = ()) -> list[str]:
        """All prompts of the run: `captions` of its images, the class prompt and the validation prompts."""
        data = self.data
        of_class = [data.class_prompt] if data.with_prior_preservation and data.class_prompt else []
        return [*captions, *of_class, *self.output.validation_prompt]

    def to_dict(self) -> dict[str, Any]:
        """The resolved options as plain values, by group, without the hub token."""
        values = dataclasses.asdict(self)
        values["validation"]["hub_token"] = None
        return values


def parse_options(arguments: Sequence[str] | None = None, description: str | None = None) -> SubjectOptions:
    """Parse the command line; an invalid option ends the program with a message and exit code 2."""
    return parse_groups(SubjectOptions, arguments, description)
