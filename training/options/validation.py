"""Options of how a run is judged, certified and published."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipelines.errors import InputError
from pipelines.option_checks import at_least

# On the bundled toy and on photographs four end in the same step as all ten that were kept; two nearly always.
BUILT_IN_CANDIDATES, CANDIDATES = 4, 2


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
        metadata={
            "help": "What scores samples: 'mini', the built-in CLIP; 'open_clip:MODEL/WEIGHTS'; a CLIP or DINOv2 model of "
            "transformers, a hub name or a folder; or 'base', the base model itself. Unless said, mini with the built-in base "
            "model, base with others."
        },
    )
    drawn_candidates: int | None = field(
        default=None,
        metadata={
            "help": "How many of the kept adapters, those with the least held-out loss, must have samples before a step is "
            "suggested: they draw them after training. 4 with the built-in model, 2 with others unless said; 0 draws none."
        },
    )
    certify: bool = field(
        default=True,
        metadata={"help": "Have stock diffusers, in a process without this project, draw with the exported files, and compare."},
    )
    private: bool = field(
        default=False,
        metadata={"help": "Leave captions, paths, names and images out of everything that is meant to be published."},
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
        at_least(self, 0, "drawn_candidates")
        if self.judge_model is not None and not self.judge_model.strip():
            raise InputError(
                "judge_model must be 'mini', 'base', 'open_clip:MODEL/WEIGHTS', a hub name or a folder, got nothing."
            )
        if not self.push_to_hub and (self.hub_model_id is not None or self.hub_token is not None):
            raise InputError("hub_model_id and hub_token need --push_to_hub: nothing is uploaded without it.")

    def fill_in(self, built_in: bool) -> None:
        """Decide what was left to the base model, `built_in` or another.

        The built-in CLIP sees images as the built-in base model draws them, 64 pixels wide. Others draw what it was never
        shown, and a better CLIP is not downloaded unasked: there the base model, which knows its own images, judges. Its
        images also take longer, so that fewer are drawn.
        """
        # Here, as the judges' models take seconds to import and --help needs none.
        from pipelines import mini_clip
        from pipelines.clip import BUILT_IN
        from pipelines.subject.scores import BASE

        if self.judge_model is None:
            self.judge_model = BUILT_IN if built_in and (mini_clip.BUILT_IN_CLIP / mini_clip.WEIGHTS_FILE).is_file() else BASE
        if self.drawn_candidates is None:
            self.drawn_candidates = BUILT_IN_CANDIDATES if built_in else CANDIDATES

    def measured_every(self, max_train_steps: int) -> int:
        """Steps between two measurements in a training of `max_train_steps`."""
        return self.heldout_steps or max(1, max_train_steps // 10)
