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
        found: Options = {}
        for each in self.values:
            found.setdefault(each.group, {})[each.field] = each.value
        return found

    def reason(self, group: str, field: str) -> str | None:
        """Why it sets an option; None where it does not."""
        return next((each.why for each in self.values if (each.group, each.field) == (group, field)), None)


SUBJECT = (
    Preset(
        "Fast",
        "about half the time of Balanced",
        "A first look: is it the right subject, are the photos good enough?",
        (
            Value("optimisation", "max_train_steps", 200, "Half the steps: the subject's colours and parts come early."),
            Value("output", "validation_steps", 100, "Sample pictures halfway and at the end, as with more steps."),
            Value("judging", "drawn_candidates", 2, "Only the two most promising steps are compared by their pictures."),
        ),
    ),
    Preset(
        "Balanced",
        "three minutes with the built-in model",
        "What the trainer does unless told otherwise; the right choice where nothing speaks against it.",
        (Value("optimisation", "max_train_steps", 400, "Enough for the subject to be plain to see in every scene."),),
    ),
    Preset(
        "Best",
        "about twice the time of Balanced",
        "The finest choice of the step to use.",
        (
            Value("optimisation", "max_train_steps", 800, "Twice the steps."),
            Value("output", "validation_steps", 400, "Sample pictures halfway and at the end."),
        ),
    ),
)
BALANCED = "Balanced"


def preset_named(presets: Sequence[Preset], name: str) -> Preset:
    """The preset called `name`, or the balanced one."""
    found = {preset.name: preset for preset in presets}
    return found.get(name, found[BALANCED])
