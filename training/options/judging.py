"""Options of how a run is judged, certified and published."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipelines.errors import InputError
from training.options.checks import at_least


@dataclass
class JudgingOptions:
    """How the run judges itself, and what it hands on."""

    heldout_steps: int | None = field(
        default=None,
        metadata={
            "help": "Steps between two measurements of the held-out loss, at each of which the adapter is kept; a tenth of all "
            "unless said."
        },
    )
    judge_model: str | None = field(
        default=None,
        metadata={"help": "CLIP or DINOv2 model, a folder or a hub name, that scores samples; the base model unless said."},
    )
    certify: bool = field(
        default=True,
        metadata={"help": "Have stock diffusers, in a process without this project, draw with the exported files, and compare."},
    )
    private: bool = field(
        default=False,
        metadata={"help": "Leave captions, paths, names and pictures out of everything that is meant to be published."},
    )
    push_to_hub: bool = field(default=False, metadata={"help": "Upload what is meant to be published to the Hugging Face hub."})
    hub_model_id: str | None = field(
        default=None, metadata={"help": "Repository on the hub, as owner/name; the run's own name unless said."}
    )
    hub_token: str | None = field(
        default=None, metadata={"help": "Token for the hub, never written down; that of `hf auth login` unless said."}
    )

    _argument_group_name = "judging"

    def __post_init__(self) -> None:
        at_least(self, 1, "heldout_steps")
        if not self.push_to_hub and (self.hub_model_id is not None or self.hub_token is not None):
            raise InputError("hub_model_id and hub_token need --push_to_hub: nothing is uploaded without it.")

    def measured_every(self, max_train_steps: int) -> int:
        """Steps between two measurements in a training of `max_train_steps`."""
        return self.heldout_steps or max(1, max_train_steps // 10)
