"""Ways to train a classifier to choose from, and what of them the images that are there allow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipelines.methods import DEFAULT as DEFAULT_METHOD
from pipelines.methods import REFERENCE, title_of
from webui.draft import Options, merged
from webui.labelled_classes import LabelledClasses
from webui.presets import Preset, Value

BASELINES = ["zeroshot", "pixels", "linear_probe"]
COMPARED = [*BASELINES, DEFAULT_METHOD]
MOST_COMPARED = [*BASELINES, "tip_adapter_f", REFERENCE, DEFAULT_METHOD]
BESIDE = f"{title_of(DEFAULT_METHOD)} beside what it has to beat: no training, raw pixels, and a linear probe."
MOST_VALIDATION = 4
# Of a class of the built-in model's, whose steps the recipe counts by its images.
BUILT_IN_STEPS, MOST_STEPS = 10, 400
DEFAULT = "Fast"
EVERY_IMAGE = "Every image that is neither tested on nor needed to choose the settings: more than anything else this helps."

# Whole runs on the example, digits, one after the other on two cores with nothing else at work: Fast 75 s, Balanced 193 s, Best
# 336 s.
CLASSIFY = (
    Preset(
        "Fast",
        "a minute or two with the built-in model",
        "A first answer: can these classes be told apart, and does training help?",
        (
            Value("data", "shots", ["16"], "Sixteen images of each class: quick, and enough to see whether it works."),
            Value("data", "seeds", [0], "One seed: one sample of training images."),
            Value("method", "method", COMPARED, BESIDE),
        ),
    ),
    Preset(
        "Balanced",
        "about three times the time of Fast",
        "A classifier to use: it learns from every image that is not needed for the test.",
        (
            Value("data", "shots", ["all"], EVERY_IMAGE),
            Value("data", "seeds", [0], "With all images, another seed would train on the same ones."),
            Value("method", "method", COMPARED, BESIDE),
        ),
    ),
    Preset(
        "Best",
        "about twice the time of Balanced",
        "The most accurate of several ways to learn from every image.",
        (
            Value("data", "shots", ["all"], EVERY_IMAGE),
            Value("data", "seeds", [0], "With all images, another seed would train on the same ones."),
            Value("method", "method", MOST_COMPARED, "Two more methods to choose from."),
            Value("optimisation", "min_train_steps", 200, "At least twice the usual steps, where there are few images."),
        ),
    ),
)


def completed(classes: LabelledClasses, values: Options, chosen: Options) -> Options:
    """All that a run on `classes` is started with.

    Args:
        values: of the preset and the user.
        chosen: the user's alone, which are left as they are.
    """
    fitted = merged(values, {"data": {}, "optimisation": {}})
    if "shots" not in chosen.get("data", {}):
        fitted["data"]["shots"] = fitting_shots(classes, fitted["data"].get("shots", ["16"]))
    is_built_in = "model" not in fitted.get("model", {})
    if is_built_in and "iterations_per_shot" not in chosen.get("optimisation", {}) and fitted["data"]["shots"] == ["all"]:
        fitted["optimisation"] |= bounded_steps(classes)
    fitted["data"] |= classes.data_options()
    return {group: fields for group, fields in fitted.items() if fields}


def fitting_shots(classes: LabelledClasses, wanted: Sequence[str]) -> list[str]:
    """The numbers of images a class to learn from that every class has; "all" where none fits."""
    fewest = min((one.learnable for one in classes.classes), default=0)
    fitting = [one for one in wanted if one == "all" or (one.isdecimal() and fewest >= int(one) + min(int(one), MOST_VALIDATION))]
    return fitting or ["all"]


def bounded_steps(classes: LabelledClasses) -> dict[str, Any]:
    """Fewer steps an image where all images of large classes would make the training take hours."""
    fewest = max(1, min((one.learnable for one in classes.classes), default=1))
    return {"iterations_per_shot": max(1, MOST_STEPS // fewest)} if BUILT_IN_STEPS * fewest > MOST_STEPS else {}
