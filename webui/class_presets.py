"""Presets for training a classifier, and how they adapt to the number of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipelines.methods import DEFAULT as DEFAULT_METHOD
from pipelines.methods import REFERENCE, title_of
from webui.draft import Options, merged
from webui.labelled_datasets import LabelledClasses
from webui.presets import Preset, Value

BASELINES = ["zeroshot", "pixels", "linear_probe"]
COMPARED = [*BASELINES, DEFAULT_METHOD]
MOST_COMPARED = [*BASELINES, "tip_adapter_f", REFERENCE, DEFAULT_METHOD]
BESIDE = f"{title_of(DEFAULT_METHOD)} and three baselines: zero-shot, raw pixels and a linear probe."
MOST_VALIDATION = 4
# The recipe's default steps per training image with the built-in model, and the most steps of a preset.
BUILT_IN_STEPS, MOST_STEPS = 10, 400
DEFAULT = "Fast"
EVERY_IMAGE = "All images that are not in the test or validation split. More images help more than any other setting."

# Measured on the digits example, one run after the other on two idle cores: Fast 75 s, Balanced 193 s, Best
# 336 s.
CLASSIFY = (
    Preset(
        "Fast",
        "a minute or two with the built-in model",
        "For a quick test: can the classes be distinguished, and does training help?",
        (
            Value("data", "shots", ["16"], "16 training images per class (16-shot), which is fast and enough for a test."),
            Value("data", "seeds", [0], "One random split."),
            Value("method", "method", COMPARED, BESIDE),
        ),
    ),
    Preset(
        "Balanced",
        "about three times as long as Fast",
        "For a classifier that you want to use. Trains on all images outside of the test and validation splits.",
        (
            Value("data", "shots", ["all"], EVERY_IMAGE),
            Value("data", "seeds", [0], "With all images, another seed would select the same training images."),
            Value("method", "method", COMPARED, BESIDE),
        ),
    ),
    Preset(
        "Best",
        "about twice as long as Balanced",
        "Trains more methods on all images; choose the most accurate one afterwards.",
        (
            Value("data", "shots", ["all"], EVERY_IMAGE),
            Value("data", "seeds", [0], "With all images, another seed would select the same training images."),
            Value("method", "method", MOST_COMPARED, f"Also Tip-Adapter-F and {title_of(REFERENCE)}."),
            Value(
                "optimisation",
                "min_train_steps",
                200,
                "At least 200 steps, twice the default minimum. This matters for few images.",
            ),
        ),
    ),
)


def completed(classes: LabelledClasses, values: Options, chosen: Options) -> Options:
    """The options of a run on `classes`.

    Args:
        values: options of the preset and the user.
        chosen: the user's options only, which are not adapted.
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
    """The values of `wanted` (images per class) that every class can provide; ["all"] if there are none."""
    fewest = min((one.learnable for one in classes.classes), default=0)
    fitting = [one for one in wanted if one == "all" or (one.isdecimal() and fewest >= int(one) + min(int(one), MOST_VALIDATION))]
    return fitting or ["all"]


def bounded_steps(classes: LabelledClasses) -> dict[str, Any]:
    """Lower `iterations_per_shot` for large classes, so that training on all images does not take hours."""
    fewest = max(1, min((one.learnable for one in classes.classes), default=1))
    return {"iterations_per_shot": max(1, MOST_STEPS // fewest)} if BUILT_IN_STEPS * fewest > MOST_STEPS else {}
