"""Options of what is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipelines.errors import InputError
from pipelines.option_checks import above_zero, at_least

LATEST = "latest"


@dataclass
class RunOptions:
    """A run's directory and its checkpoints, for every recipe."""

    output_dir: str | None = field(default=None, metadata={"help": "The run's directory; a new one under runs/ unless said."})
    resume_from_checkpoint: Literal["latest"] | None = field(
        default=None, metadata={"help": "'latest' goes on from the newest checkpoint in --output_dir."}
    )
    checkpointing_steps: int = field(default=100, metadata={"help": "Steps between two checkpoints."})
    checkpoints_total_limit: int = field(default=2, metadata={"help": "How many checkpoints are kept."})
    report_to: Literal["tensorboard", "wandb", "none"] = field(
        default="tensorboard", metadata={"help": "Where metrics and images go besides the run's directory."}
    )

    def __post_init__(self) -> None:
        at_least(self, 1, "checkpointing_steps", "checkpoints_total_limit")
        if self.resume_from_checkpoint is not None and self.output_dir is None:
            raise InputError("resume_from_checkpoint needs --output_dir, the directory of the run to go on with.")


@dataclass
class OutputOptions(RunOptions):
    """What is written while training and after it."""

    validation_prompt: list[str] | None = field(
        default=None, metadata={"help": "Prompts of the images made before, during and after training; new scenes unless said."}
    )
    validation_steps: int = field(default=200, metadata={"help": "Steps between two sets of images."})
    dry_run: bool = field(
        default=False,
        metadata={"help": "Do three real steps, tell what the whole run takes, and stop. Every run begins with this."},
    )
    memory_limit_gb: float | None = field(
        default=None, metadata={"help": "Memory that training may take, for a device that is shared; all there is unless said."}
    )
    ladder: bool = field(
        default=True, metadata={"help": "Where it does not fit, find settings that do, each by a dry run in its own process."}
    )

    _argument_group_name = "output"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "validation_steps")
        above_zero(self, "memory_limit_gb")
