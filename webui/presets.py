"""Ways to train to choose from: each a few values of the options, with the reason for each. Their figures were measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from webui.draft import Options


@dataclass(frozen=True)
class Value:
    """One option's value in a preset.

    Args:
        group, field: which option.
        value: its value.
        why: the reason, in one sentence.
    """

    group: str
    field: str
    value: Any
    why: str


@dataclass(frozen=True)
class Preset:
    """One way to train.

    Args:
        name: what it is called.
        costs: in time, against the one in the middle.
        gives: what for.
        values: what it sets; what it leaves out is the trainer's default.
    """

    name: str
    costs: str
    gives: str
    values: tuple[Value, ...]

    def options(self) -> Options:
        """Its values by group and field."""
        values: Options = {}
        for each in self.values:
            values.setdefault(each.group, {})[each.field] = each.value
        return values

    def reason(self, group: str, field: str) -> str | None:
        """Why it sets an option; None where it does not."""
        return next((each.why for each in self.values if (each.group, each.field) == (group, field)), None)


# Measured on five photographs of a toy robot, one of them held out, with the built-in model on one core. A step takes 0.23 s,
# measuring the loss 3.6 s, a set of sample images 6 s, checking the exported files in a second program 26 s, all else 44 s.
# At the suggested step, likeness to the subject and held-out loss (of the base model 0.176 and 1.000) with their processor time:
#   Balanced 0.273, 0.944 in 153 to 185 s;  Fast 0.277, 0.938 in 107 s;
#   800 steps at half the rate 0.267, 0.938 in 217 s, no better for more time, and 400 at a third of it with min-SNR weights
#   0.240, 0.953; other crops of photos that are square already are the same photos.
# The drawn toy is most like itself at step 200 of 400 (0.693; 0.668 at 120): there the steps that Fast leaves out do count.
# So Best trains as Balanced does; its steps are those of Balanced and more. On the example, whole runs one after the other on two
# cores with nothing else at work: Fast 85 s, Balanced 171 s, Best 218 s.
SUBJECT = (
    Preset(
        "Fast",
        "a little over half the time of Balanced",
        "A first look: is it the right subject, are the photos good enough?",
        (
            Value("optimisation", "max_train_steps", 160, "The subject's colours and parts come early; its details later."),
            Value("validation", "heldout_steps", 40, "Progress is measured as often as in Balanced: every 40 steps."),
            Value("output", "validation_steps", 80, "Sample images halfway and at the end."),
            Value(
                "validation",
                "num_candidate_images",
                1,
                "The step to use is chosen by the measured loss, with images of one more step.",
            ),
            Value(
                "validation",
                "certify",
                False,
                "No second program checks the exported files; train Balanced before you share them.",
            ),
        ),
    ),
    Preset(
        "Balanced",
        "three minutes with the built-in model",
        "What the trainer does unless told otherwise; the right choice where nothing speaks against it.",
        (
            Value(
                "optimisation",
                "max_train_steps",
                400,
                "Enough for most subjects; where it is too much, an earlier step is suggested.",
            ),
        ),
    ),
    Preset(
        "Best",
        "about a third more time than Balanced",
        "The same training, looked at more closely: the step to use is chosen among more steps, nearer together. Training "
        "for longer, or more gently, was tried and came out no better.",
        (
            Value(
                "validation",
                "heldout_steps",
                20,
                "Progress is measured every 20 steps, not every 40: the best step can lie between.",
            ),
            Value(
                "validation",
                "num_candidate_images",
                10,
                "Ten promising steps draw images and are compared by them, not two or four.",
            ),
        ),
    ),
)
BALANCED = "Balanced"


def preset_named(presets: Sequence[Preset], name: str) -> Preset:
    """The preset called `name`, or the balanced one."""
    by_name = {preset.name: preset for preset in presets}
    return by_name.get(name, by_name[BALANCED])
