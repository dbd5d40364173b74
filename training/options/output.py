"""Options of the run directory, its checkpoints and validation images."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipelines.errors import InputError
from pipelines.option_checks import above_zero, at_least

LATEST = "latest"


@dataclass
class RunOptions:
    """The run directory and its checkpoints, for every recipe."""

    output_dir: str | None = field(default=None, metadata={"help": "Run directory. Default: a new one under runs/."})
    resume_from_checkpoint: Literal["latest"] | None = field(
        default=None, metadata={"help": "'latest' resumes from the newest checkpoint in --output_dir."}
    )
    checkpointing_steps: int = field(default=100, metadata={"help": "Steps between two checkpoints."})
    checkpoints_total_limit: int = field(
        default=2, metadata={"help": "Number of checkpoints to keep, besides the one with the lowest held-out loss."}
    )
    report_to: Literal["tensorboard", "wandb", "none"] = field(
        default="tensorboard", metadata={"help": "Tracker that also gets the metrics and images."}
    )

    def __post_init__(self) -> None:
        at_least(self, 1, "checkpointing_steps", "checkpoints_total_limit")
        if self.resume_from_checkpoint is not None and self.output_dir is None:
            raise InputError("resume_from_checkpoint needs --output_dir, the directory of the run to resume.")


@dataclass
class OutputOptions(RunOptions):
    """Validation images, the dry run and the memory fallback."""

    validation_prompt: list[str] | None = field(
        default=None,
        metadata={
            "help": "Prompts of the images generated before, during and after training. Default: the subject in new scenes."
        },
    )
    validation_images: bool = field(
        default=True,
        metadata={"help": "Generate and score validation images. Without them, the held-out loss alone recommends a step."},
    )
    validation_steps: int = field(default=200, metadata={"help": "Steps between two sets of validation images."})
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Only measure three training steps, report the time, memory and disk space that the run needs, and "
            "stop. Every run starts with this."
        },
    )
    memory_limit_gb: float | None = field(
        default=None, metadata={"help": "Memory that training may use, in GB, for a shared device. Default: no limit."}
    )
    memory_fallback: bool = field(
        default=True,
        metadata={"help": "If training does not fit into memory, find settings that fit, by dry runs in separate processes."},
    )

    _argument_group_name = "output"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "validation_steps")
        above_zero(self, "memory_limit_gb")
