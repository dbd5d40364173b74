"""Presets for training on a subject: option values, each with its reason. The figures were measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from webui.draft import Options


@dataclass(frozen=True)
class Value:
    """One option's value in a preset.

    Args:
        group, field: the option.
        value: the value of the option.
        reason: the reason, one sentence.
    """

    group: str
    field: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Preset:
    """A named set of option values.

    Args:
        name: the display name.
        duration: the training time, compared with Balanced.
        purpose: when to use it.
        values: its option values; all others are the trainer's defaults.
    """

    name: str
    duration: str
    purpose: str
    values: tuple[Value, ...]

    def options(self) -> Options:
        """The option values by group and field."""
        values: Options = {}
        for each in self.values:
            values.setdefault(each.group, {})[each.field] = each.value
        return values

    def reason(self, group: str, field: str) -> str | None:
        """The reason for an option's value; None if the preset does not set it."""
        return next((each.reason for each in self.values if (each.group, each.field) == (group, field)), None)


# Measured on five photographs of a toy robot, one of them held out, with the built-in model on one core. A step takes 0.23 s, a
# validation loss 3.6 s, a set of sample images 6 s, the check of the exported files 26 s, and everything else 44 s.
# Similarity to the subject and validation loss of the recommended checkpoint (base model: 0.176, 1.000), and processor time:
#   Balanced 0.273, 0.944 in 153 to 185 s;  Fast 0.277, 0.938 in 107 s;
#   800 steps at half the rate 0.267, 0.938 in 217 s, no better for more time, and 400 at a third of it with min-SNR weights
#   0.240, 0.953; crop variants do not change photos that are square already.
# On the rendered toy the similarity peaks at step 200 of 400 (0.693; 0.668 at 120), so Fast may stop too early.
# Best therefore trains like Balanced and evaluates more checkpoints. Complete runs on the example, one after the other on two
# idle cores: Fast 85 s, Balanced 171 s, Best 218 s.
SUBJECT = (
    Preset(
        "Fast",
        "a little more than half as long as Balanced",
        "For a quick test: does the model learn the subject, and are the photos good enough?",
        (
            Value("optimisation", "max_train_steps", 160, "Colours and large parts are learned early, details later."),
            Value("validation", "heldout_steps", 40, "The validation loss is measured every 40 steps, as in Balanced."),
            Value("output", "validation_steps", 80, "Sample images are generated halfway and at the end."),
            Value(
                "validation",
                "num_candidate_images",
                1,
                "Only the checkpoint with the lowest validation loss is scored by its images.",
            ),
            Value(
                "validation",
                "certify",
                False,
                "The exported files are not verified with diffusers. Use Balanced before you share them.",
            ),
        ),
    ),
    Preset(
        "Balanced",
        "about three minutes with the built-in model",
        "The trainer's defaults; the right choice in most cases.",
        (
            Value(
                "optimisation",
                "max_train_steps",
                400,
                "Enough for most subjects. If the model overfits, an earlier checkpoint is recommended.",
            ),
        ),
    ),
    Preset(
        "Best",
        "about a third longer than Balanced",
        "The same training, with more checkpoints to select from. Longer training and lower learning rates were tried and "
        "gave no better results.",
        (
            Value(
                "validation",
                "heldout_steps",
                20,
                "The validation loss is measured every 20 steps instead of 40, for a finer choice of the checkpoint.",
            ),
            Value(
                "validation",
                "num_candidate_images",
                10,
                "The images of ten checkpoints are compared, instead of four (two with other base models).",
            ),
        ),
    ),
)
BALANCED = "Balanced"


def preset_named(presets: Sequence[Preset], name: str) -> Preset:
    """The preset `name`, or Balanced if there is none."""
    by_name = {preset.name: preset for preset in presets}
    return by_name.get(name, by_name[BALANCED])
