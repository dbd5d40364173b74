"""Classification for the page and the API: zero-shot with the built-in CLIP, and with the classifier of a run."""

from __future__ import annotations

import hashlib
import io
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from pipelines.clip import BUILT_IN, Clip, load_clip
from pipelines.errors import InputError
from pipelines.fewshot.classifier import CLASSIFIER, FewShotClassifier, classifier_folder
from pipelines.fewshot.data import LabelledImage, LabelledImageDataset
from pipelines.fewshot.features import image_features, prompt_features
from pipelines.fewshot.prompts import make_prompts
from pipelines.fewshot.sources import DatasetSource
from pipelines.images import read_image
from training.runs.fewshot_files import FewShotReport
from training.runs.record import RunRecord
from webui.labelled_datasets import EXAMPLE, LabelledClasses
from webui.runs import read_cached
from webui.uploads import display_name, read_upload

# The zero-shot accuracy uses at most MOST_ZERO_SHOT images, but FEWEST_OF_CLASS of every class, to take a few seconds.
MOST_ZERO_SHOT, FEWEST_OF_CLASS, MOST_FEATURES = 200, 2, 20_000
MAX_CLASSIFIERS = 2
MOST_FILES, TOP = 200, 3

# One forward pass at a time, because parallel ones would share the same cores.
_one_at_a_time = threading.Lock()
_features: OrderedDict[bytes, torch.Tensor] = OrderedDict()


@dataclass(frozen=True)
class ZeroShotAccuracy:
    """The accuracy of the built-in CLIP from the class names alone.

    Args:
        right, count: the numbers of correctly classified images and of all images.
        by_class: the same numbers for each class, by its key.
    """

    right: int
    count: int
    by_class: dict[str, tuple[int, int]]


@lru_cache(maxsize=1)
def built_in() -> Clip:
    """The built-in CLIP, loaded once."""
    return load_clip(BUILT_IN)


def zero_shot(classes: LabelledClasses) -> ZeroShotAccuracy:
    """Zero-shot accuracy of the built-in CLIP on some images of each class.

    Raises: InputError if there are fewer than two classes with images, or an image cannot be read.
    """
    with_images = [one for one in classes.classes if one.images]
    if len(with_images) < 2:
        raise InputError("Zero-shot accuracy needs at least two classes with images. Add images to another class.")
    template = "digits" if classes.id == EXAMPLE else "photo"
    each = max(FEWEST_OF_CLASS, MOST_ZERO_SHOT // len(with_images))
    chosen = [_some(one.images, each) for one in with_images]
    with _one_at_a_time:
        clip = built_in()
        features = _features_of(list(chain(*chosen)), clip)
        prompts = prompt_features(clip, make_prompts([one.name for one in with_images], template))
    predicted = iter((features @ prompts.T).argmax(dim=1).tolist())
    right = [list(islice(predicted, len(files))).count(label) for label, files in enumerate(chosen)]
    by_class = {one.key: (right[label], len(chosen[label])) for label, one in enumerate(with_images)}
    return ZeroShotAccuracy(sum(right), sum(map(len, chosen)), by_class)


def _some(images: Sequence[DatasetSource], most: int) -> list[DatasetSource]:
    """At most `most` of the images, evenly spaced."""
    stride = max(1, len(images) // most)
    return list(images[::stride])[:most]


def _features_of(sources: Sequence[DatasetSource], clip: Clip) -> torch.Tensor:
    """(n, d) image features; those of images seen before come from a cache."""
    digests = [hashlib.sha256(source.content()).digest() for source in sources]
    fresh = {digest: source for digest, source in zip(digests, sources, strict=True) if digest not in _features}
    if fresh:
        images = [LabelledImage(source, 0, "") for source in fresh.values()]
        features, _ = image_features(clip, LabelledImageDataset(images, clip.preprocess))
        _features.update(zip(fresh, features, strict=True))
    rows = torch.stack([_features[digest] for digest in digests])
    while len(_features) > MOST_FEATURES:
        _features.popitem(last=False)
    return rows


def classifier_of(record: RunRecord, trial: str | None = None) -> FewShotClassifier:
    """The classifier of a run; the `MAX_CLASSIFIERS` used last stay loaded.

    Args:
        trial: the folder of a trial of the run; None for the trial that was chosen as the classifier.
    Raises: InputError if the run is not done, or the classifier cannot be used.
    """
    path = record.path if trial is None else trial_folder(record, trial)
    if trial is None and not (record.path / FewShotReport.NAME).is_file():
        raise InputError("This run has no classifier yet. Wait until it is done, or choose another run.")
    folder = classifier_folder(path)
    return _loaded(folder.absolute(), (folder / CLASSIFIER).stat().st_mtime_ns)


@lru_cache(maxsize=MAX_CLASSIFIERS)
def _loaded(folder: Path, changed: int) -> FewShotClassifier:
    return FewShotClassifier.from_run(folder)


def trial_folder(record: RunRecord, trial: str) -> Path:
    """The folder of `trial`, one of the trials in the report of a run.

    Raises: InputError if the report has no such trial.
    """
    report = read_cached(FewShotReport, record.path)
    if report is None or report.trial_in(trial) is None:
        raise InputError("This run did not train this method. Choose one from the list.")
    return record.path / trial


def classify(record: RunRecord, files: Sequence[str | Path], trial: str | None = None, top: int = TOP) -> list[dict[str, Any]]:
    """Classify images with the classifier of a run.

    Args:
        files: uploaded files; each is checked like any upload.
        trial: as in `classifier_of`.
        top: the number of classes to return per image.
    Returns: a row for each file: {"picture": its name, "class", "probability", "top": [[class, probability], ...]}, with "notes"
        if there are sentences on how it was read; {"picture", "error"} for a file that cannot be used. Names and sentences
        contain user input.
    Raises: InputError if there is no file, there are too many, or the run has no classifier.
    """
    if not 1 <= len(files) <= MOST_FILES:
        raise InputError(f"1 to {MOST_FILES} images can be classified at once, got {len(files)}.")
    rows: list[dict[str, Any]] = []
    readable = []
    for file in map(Path, files):
        row: dict[str, Any] = {"picture": display_name(file)}
        try:
            upload = read_upload(file, row["picture"])
            readable.append(read_image(io.BytesIO(upload.content), row["picture"]))
            if upload.notes:
                row["notes"] = list(upload.notes)
        except InputError as error:
            row["error"] = str(error)
        rows.append(row)
    if readable:
        with _one_at_a_time:
            predictions = classifier_of(record, trial).predict(readable).top(top)
        for row, likely in zip((row for row in rows if "error" not in row), predictions, strict=True):
            (row["class"], row["probability"]), row["top"] = likely[0], [list(one) for one in likely]
    return rows
