"""Zero-shot accuracy of the built-in CLIP on held-out photographs under each domain shift, against that on clean ones.

    python benchmarks/domain_shift.py --images_dir PHOTOS

A shift is of use where zero-shot is clearly above chance and clearly below clean: there is something to adapt, and to start from.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import torch
from transformers import HfArgumentParser

from pipelines.built_in import BUILT_IN_CLIP_NAME
from pipelines.clip import Clip, load_clip
from pipelines.fewshot.domain_shift import ShiftedPhoto, choose_photos, shifted_images
from pipelines.fewshot.features import image_features, prompt_features
from pipelines.fewshot.inputs import GivenImageSet
from pipelines.fewshot.metrics import top1
from pipelines.fewshot.prompts import make_prompts
from pipelines.fewshot.shifts import CLEAN, SHIFTS


@dataclass
class BenchmarkOptions:
    """The options of the benchmark."""

    images_dir: str = field(metadata={"help": "Folder of the pretraining photographs: zips and classes.json."})
    model: str = field(default=BUILT_IN_CLIP_NAME, metadata={"help": "The CLIP model, as of the few-shot recipe."})
    num_classes: int = field(default=20, metadata={"help": "Number of classes of a dataset."})
    seeds: list[int] = field(default_factory=lambda: list(range(5)), metadata={"help": "Seeds of datasets; the mean is printed."})


def zero_shot_accuracy(clip: Clip, photos: list[ShiftedPhoto], shift: str, seed: int) -> float:
    """The accuracy on `photos` under `shift`, from the names of their classes alone."""
    classes = sorted({shifted.photo.class_name for shifted in photos})
    labels = torch.tensor([classes.index(shifted.photo.class_name) for shifted in photos])
    features, _ = image_features(clip, GivenImageSet(list(shifted_images(photos, shift, seed)), clip.preprocess))
    return top1(features @ prompt_features(clip, make_prompts(classes, "photo")).T, labels)


def rows(options: BenchmarkOptions) -> list[str]:
    """The lines of the table."""
    clip = load_clip(options.model)
    datasets = {seed: choose_photos(Path(options.images_dir), seed, options.num_classes, 1) for seed in options.seeds}
    tested = {seed: [shifted for shifted in photos if shifted.part == "test"] for seed, photos in datasets.items()}
    accuracy = {
        shift: fmean(zero_shot_accuracy(clip, photos, shift, seed) for seed, photos in tested.items()) for shift in SHIFTS
    }
    head = ["| shift | zero-shot | clean | chance |", "|---|---|---|---|"]
    chance = 1 / options.num_classes
    shifts = [shift for shift in SHIFTS if shift != CLEAN]
    return head + [f"| {shift} | {accuracy[shift]:.1%} | {accuracy[CLEAN]:.1%} | {chance:.1%} |" for shift in shifts]


if __name__ == "__main__":
    parser = HfArgumentParser(BenchmarkOptions, description=__doc__)
    sys.stdout.write("\n".join(rows(parser.parse_args_into_dataclasses()[0])) + "\n")
