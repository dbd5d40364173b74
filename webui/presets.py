"""Presets of both tasks: option values, each with its reason. The figures were measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipelines.methods import DEFAULT, REFERENCE, title_of
from pipelines.subject.heldout import MIN_IMAGES_TO_HOLD_OUT, NONE
from training.options.values import Values, merged


@dataclass(frozen=True)
class Value:
    """One option's value in a preset.

    Args:
        group, field: the option.
        value: the value of the option.
        reason: the reason, one sentence.
        below: it applies to datasets with fewer images; None for all.
    """

    group: str
    field: str
    value: Any
    reason: str
    below: int | None = None


@dataclass(frozen=True)
class Preset:
    """A named set of option values.

    Args:
        name: the display name.
        summary: the display name's supplement.
        purpose: when to use it.
        values: its option values; all others are the trainer's defaults.
    """

    name: str
    summary: str
    purpose: str
    values: tuple[Value, ...]

    def of(self, num_images: int) -> Iterator[Value]:
        """The values for a dataset of so many images."""
        return (each for each in self.values if each.below is None or num_images < each.below)

    def options(self, num_images: int) -> Values:
        """The option values by group and field."""
        return merged(*({each.group: {each.field: each.value}} for each in self.of(num_images)))


# Measured on five photographs of a toy robot, one of them held out, with the built-in model on one core. A step takes 0.23 s, a
# set of sample images 6 s.
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
        "a quick test",
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
            # Cross-validation on four photos takes as long as two complete trainings. One held-out photo would take a quarter of
            # the training images, and the loss of a single photo says little; the sample images choose the checkpoint instead.
            Value(
                "data",
                "heldout_image",
                NONE,
                f"With fewer than {MIN_IMAGES_TO_HOLD_OUT} photos, cross-validation would triple the time. The sample images "
                "choose the checkpoint.",
                below=MIN_IMAGES_TO_HOLD_OUT,
            ),
        ),
    ),
    Preset(
        "Balanced",
        "recommended",
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
        "more checkpoints to select from",
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

BASELINES = ["zeroshot", "pixels", "linear_probe"]
COMPARED = [*BASELINES, DEFAULT]
MOST_COMPARED = [*BASELINES, "tip_adapter_f", REFERENCE, DEFAULT]
BESIDE = f"{title_of(DEFAULT)} and three baselines: zero-shot, raw pixels and a linear probe."
EVERY_IMAGE = "All images that are not in the test or validation split. More images help more than any other setting."
ONE_SEED = "With all images, another seed would select the same training images."

# Measured on the digits example, one run after the other on two idle cores: Fast 75 s, Balanced 193 s, Best 336 s.
CLASSIFY = (
    Preset(
        "Fast",
        "a quick test",
        "For a quick test: can the classes be distinguished, and does training help?",
        (
            Value("data", "shots", ["16"], "16 training images per class (16-shot), which is fast and enough for a test."),
            Value("data", "seeds", [0], "One random split."),
            Value("method", "method", COMPARED, BESIDE),
        ),
    ),
    Preset(
        "Balanced",
        "recommended",
        "For a classifier that you want to use. Trains on all images outside of the test and validation splits.",
        (
            Value("data", "shots", ["all"], EVERY_IMAGE),
            Value("data", "seeds", [0], ONE_SEED),
            Value("method", "method", COMPARED, BESIDE),
        ),
    ),
    Preset(
        "Best",
        "compares more methods",
        "Trains more methods on all images; choose the most accurate one afterwards.",
        (
            Value("data", "shots", ["all"], EVERY_IMAGE),
            Value("data", "seeds", [0], ONE_SEED),
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
