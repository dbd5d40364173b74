"""Accuracy of the built-in CLIP: zero-shot on held-out photographs and new scenes, and a linear probe on other images.

    python benchmarks/mini_clip.py --photos_dir PHOTOS --classes_dir CLASSES

`PHOTOS` is the folder of its pretraining, of which a tenth was held out; `CLASSES` contains a folder of images for each class.
The probe is a logistic regression on a few images per class, on features and on raw pixels, evaluated on all other images.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import numpy as np
from PIL import Image
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import CLIPTokenizer, HfArgumentParser

from pipelines.built_in import BUILT_IN_CLIP
from pipelines.corpus import HELD_OUT_SHARE, corpus_scenes, part, photo_corpus, rendered_corpus, split_held_out, to_pixels
from pipelines.errors import InputError
from pipelines.images import read_image
from pipelines.mini_clip import CLIP, class_tokens, image_features, load_model
from pipelines.mini_clip_scores import held_out_accuracy, scene_accuracies
from pipelines.mini_sdxl import RESOLUTION

PENALTIES = {"logisticregression__C": [1e-4, 1e-3, 1e-2, 1e-1, 1.0]}


@dataclass
class BenchmarkOptions:
    """The options of the benchmark."""

    model: str = field(default=str(BUILT_IN_CLIP), metadata={"help": "Folder of the model."})
    photos_dir: str | None = field(default=None, metadata={"help": "Folder of zipped photographs with classes.json."})
    classes_dir: str | None = field(default=None, metadata={"help": "A folder of images for each class."})
    scenes: int = field(default=1000, metadata={"help": "Number of rendered scenes."})
    shots: int = field(default=16, metadata={"help": "Training images per class for the probe."})
    draws: int = field(default=5, metadata={"help": "Number of random samples of these images; the mean is printed."})
    seed: int = field(
        default=0, metadata={"help": "Seed of the pretraining, which determines the held-out images, and of the samples."}
    )


def held_out_row(options: BenchmarkOptions, model: CLIP, tokenizer: CLIPTokenizer) -> str:
    """The row of the held-out photographs."""
    photos = photo_corpus(Path(options.photos_dir), RESOLUTION)
    captions, labels = np.unique(photos.captions, return_inverse=True)
    _, held_out = split_held_out(photos.captions, HELD_OUT_SHARE, options.seed)
    names = class_tokens(tokenizer, [caption.removeprefix("a photo of ") for caption in captions])
    accuracy = held_out_accuracy(model, part(photos, held_out), labels[held_out], names)
    return f"| {len(held_out):,} held-out photographs, zero-shot | {accuracy:.1%} | {1 / len(captions):.1%} |"


def scene_rows(options: BenchmarkOptions, model: CLIP, tokenizer: CLIPTokenizer) -> list[str]:
    """The rows of the new scenes, which use the seed after that of the pretraining."""
    pixels = to_pixels(rendered_corpus(options.scenes, RESOLUTION, options.seed + 1).images)
    scores = scene_accuracies(model, pixels, corpus_scenes(options.scenes, options.seed + 1), tokenizer)
    return [
        f"| {name} of {options.scenes:,} scenes, zero-shot | {one.accuracy:.1%} | {one.chance:.1%} |"
        for name, one in scores.items()
    ]


def read_classes(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The images of every folder in `folder`, (count, RESOLUTION, RESOLUTION, 3) uint8, and their classes, (count,).

    Raises: InputError if there are fewer than two classes.
    """
    classes = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if len(classes) < 2:
        raise InputError(f"classes_dir must contain a folder of images for each of at least two classes, got {str(folder)!r}.")
    files = [(file, label) for label, path in enumerate(classes) for file in sorted(path.iterdir())]
    return np.stack([read_square(file) for file, _ in files]), np.asarray([label for _, label in files])


def read_square(file: Path) -> np.ndarray:
    """The middle square of an image, (RESOLUTION, RESOLUTION, 3) uint8."""
    image = read_image(file)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return np.asarray(square.resize((RESOLUTION, RESOLUTION), Image.Resampling.BICUBIC))


def probe_accuracy(features: np.ndarray, labels: np.ndarray, shots: int, seed: int) -> float:
    """The accuracy of a logistic regression on `shots` images per class, on all other images.

    Its penalty is chosen by cross-validation on the training images.

    Args:
        features: (count, width).
        labels: (count,).
    """
    rng = np.random.default_rng(seed)
    classes = np.unique(labels)
    chosen = np.concatenate([rng.permutation(np.flatnonzero(labels == label))[:shots] for label in classes])
    others = np.setdiff1d(np.arange(len(labels)), chosen)
    probe = GridSearchCV(make_pipeline(StandardScaler(), LogisticRegression(max_iter=200)), PENALTIES, cv=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe.fit(features[chosen], labels[chosen])
    return float(probe.score(features[others], labels[others]))


def probe_rows(options: BenchmarkOptions, model: CLIP) -> list[str]:
    """The rows of the probe, on the model's features and on raw pixels."""
    images, labels = read_classes(Path(options.classes_dir))
    sources = {
        "features": image_features(model, to_pixels(images)).numpy(),
        "raw pixels": images.reshape(len(images), -1) / 255,
    }
    chance = 1 / len(np.unique(labels))
    rows = []
    for name, values in sources.items():
        scores = [
            probe_accuracy(values.astype(np.float32), labels, options.shots, options.seed + draw) for draw in range(options.draws)
        ]
        rows.append(
            f"| {options.shots} images a class, probe of {name}, mean of {options.draws} | {fmean(scores):.1%} | {chance:.1%} |"
        )
    return rows


def rows(options: BenchmarkOptions) -> Sequence[str]:
    """The lines of the table for which images are given."""
    model, tokenizer = load_model(Path(options.model)), CLIPTokenizer.from_pretrained(options.model)
    lines = ["| what | accuracy | chance |", "|---|---|---|"]
    if options.photos_dir:
        lines.append(held_out_row(options, model, tokenizer))
    lines += scene_rows(options, model, tokenizer)
    return lines + (probe_rows(options, model) if options.classes_dir else [])


if __name__ == "__main__":
    sys.stdout.write(
        "\n".join(rows(HfArgumentParser(BenchmarkOptions, description=__doc__).parse_args_into_dataclasses()[0])) + "\n"
    )
