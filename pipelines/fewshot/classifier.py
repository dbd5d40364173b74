"""A fitted classifier in files, and loaded from them: safetensors and JSON, and nothing else.

A classifier's folder holds classifier.json, and an adapter of the towers, a predictor of their features, or neither.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nora_vision.files import write_json
from pipelines import adapter_files
from pipelines.cache import module_digest
from pipelines.clip import Clip, load_clip
from pipelines.errors import InputError
from pipelines.fewshot import adapters
from pipelines.fewshot.baselines import BASELINES
from pipelines.fewshot.baselines.predictors import LinearHead, Predictor, load_predictor, save_predictor
from pipelines.fewshot.baselines.vocabulary import with_classes
from pipelines.fewshot.features import image_features, prompt_features, raw_pixels
from pipelines.fewshot.inputs import GivenImages, GivenImageSet
from pipelines.fewshot.prompts import Prompts
from pipelines.fewshot.split_files import read_json
from pipelines.methods import method_names

CLASSIFIER, REPORT, PREDICTOR, ADAPTER = "classifier.json", "report.json", "predictor.safetensors", "adapter"
FORMAT, ZERO_SHOT = 1, "zeroshot"
BATCH = 64
SHA256 = re.compile("[0-9a-f]{64}")


def _are_words(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(word, str) and word.strip() for word in value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


# What each field of classifier.json may be, in words and as a check.
ALLOWED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "method": (
        f"one of {', '.join((*method_names(), *BASELINES))}",
        lambda value: isinstance(value, str) and (value in method_names() or value in BASELINES),
    ),
    "model": ("the name or folder of a CLIP model", lambda value: isinstance(value, str) and bool(value)),
    "base_sha256": ("64 hexadecimal digits", lambda value: isinstance(value, str) and bool(SHA256.fullmatch(value))),
    "pretrained": ("a tag, a file or null", lambda value: value is None or (isinstance(value, str) and bool(value))),
    "classes": ("a list of two names or more", lambda value: _are_words(value) and len(value) > 1),
    "keys": ("a list of names", _are_words),
    "templates": ("a list of prompt templates", _are_words),
    "temperature": ("a number above 0", lambda value: _is_number(value) and value > 0),
    "strength": ("a number in [0, 1]", lambda value: _is_number(value) and 0 <= value <= 1),
    "format": (f"{FORMAT}, all that this version reads", lambda value: type(value) is int and value == FORMAT),
}


@dataclass(frozen=True)
class ClassifierFile:
    """What classifier.json says.

    Args:
        method: a baseline's name, or an adapter method's.
        model, pretrained: the base model, as `load_clip` takes it.
        base_sha256: of its weights, as `module_digest` tells it.
        classes: the classes' names, as prompts speak of them.
        keys: what the classes are called where they were found; as many.
        templates: of the prompts, with {} where the class's name goes.
        temperature: that logits are divided by, fitted on validation.
        strength: of an adapter, in [0, 1]; 1 for all else.
        format: of the file.
    Raises: InputError naming the field, what it may be, and what it is.
    """

    method: str
    model: str
    pretrained: str | None
    base_sha256: str
    classes: tuple[str, ...]
    keys: tuple[str, ...]
    templates: tuple[str, ...]
    temperature: float = 1.0
    strength: float = 1.0
    format: int = FORMAT

    def __post_init__(self) -> None:
        for name, (words, allows) in ALLOWED.items():
            if not allows(getattr(self, name)):
                raise InputError(f"{name} must be {words}, got {getattr(self, name)!r}.")
        for name in ("classes", "keys", "templates"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.keys) != len(self.classes):
            raise InputError(f"keys must be as many as the {len(self.classes)} classes, got {len(self.keys)}.")
        if self.strength != 1 and not self.adapted:
            raise InputError(f"strength must be 1 for the method {self.method!r}, which has no adapter, got {self.strength}.")
        self.prompts()

    @property
    def adapted(self) -> bool:
        """Whether an adapter changes the towers."""
        return self.method in method_names()

    def prompts(self) -> Prompts:
        """The prompts of the classes."""
        return Prompts(self.classes, self.templates)

    def write(self, path: Path) -> None:
        """Write the file, which `read` takes."""
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> ClassifierFile:
        """What `write` wrote.

        Raises: InputError naming the file, and the field that is missing, unknown, or not what it may be.
        """
        told = read_json(path.read_bytes(), repr(str(path)))
        names = {field.name for field in fields(cls)}
        if set(told) != names:
            missing, unknown = sorted(names - set(told)), sorted(set(told) - names)
            raise InputError(
                f"{str(path)!r} must have the fields {', '.join(sorted(names))}; missing: {', '.join(missing) or 'none'}, "
                f"unknown: {', '.join(unknown) or 'none'}. Fit the classifier again."
            )
        try:
            return cls(**told)
        except InputError as error:
            raise InputError(f"{str(path)!r} cannot be used: {error} Mend it, or fit the classifier again.") from error


def save_classifier(
    folder: Path,
    told: ClassifierFile,
    adapter: dict[str, nn.Module] | None = None,
    predictor: Predictor | None = None,
) -> None:
    """Write a classifier's folder, classifier.json last.

    Args:
        adapter: the adapted encoders, for a method that is an adapter's.
        predictor: for every other method but zeroshot, which may do without.
    Raises: ValueError if the method and what is given do not belong together.
    """
    fits = (adapter is not None) == told.adapted and (predictor is not None) != told.adapted
    if not fits and not (told.method == ZERO_SHOT and adapter is None):
        given = [name for name, own in (("adapter", adapter), ("predictor", predictor)) if own is not None]
        needed = "an adapter" if told.adapted else "a predictor"
        raise ValueError(f"The method {told.method!r} is saved with {needed} alone, got {' and '.join(given) or 'neither'}.")
    if adapter is not None:
        adapter_files.save(adapter, folder / ADAPTER)
    if predictor is not None:
        save_predictor(predictor, folder / PREDICTOR)
    told.write(folder / CLASSIFIER)


def classifier_folder(path: str | Path) -> Path:
    """The classifier's folder at `path`: itself, or the one that the report of the run at `path` names.

    Raises: InputError if there is none, or the report names a folder outside the run.
    """
    path = Path(path)
    if (path / CLASSIFIER).is_file():
        return path
    report = path / REPORT
    if not report.is_file():
        raise InputError(
            f"There is no classifier at {str(path)!r}, neither {CLASSIFIER} nor {REPORT}. Give the directory of a finished "
            "run, or one of the folders RUN/members/SHOTS/SEED/METHOD."
        )
    named = read_json(report.read_bytes(), repr(str(report))).get("classifier")
    folder = (path / named).resolve() if isinstance(named, str) else None
    if folder is None or Path(named).is_absolute() or not folder.is_relative_to(path.resolve()):
        raise InputError(
            f"classifier in {str(report)!r} must name a folder within the run, got {named!r}. Give one of the folders "
            "RUN/members/SHOTS/SEED/METHOD instead."
        )
    if not (folder / CLASSIFIER).is_file():
        raise InputError(f"{str(report)!r} names {named!r}, where there is no {CLASSIFIER}. Put it back, or give another.")
    return path / named


@dataclass(frozen=True)
class Predictions:
    """What a classifier makes of images.

    Args:
        probabilities: (n, classes) float32, on the CPU.
        classes: their names.
        names: what each image is called: its path, or its place.
    """

    probabilities: torch.Tensor
    classes: tuple[str, ...]
    names: tuple[str, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """The most likely class of each image."""
        return tuple(self.classes[place] for place in self.probabilities.argmax(dim=1).tolist())

    def top(self, count: int) -> list[list[tuple[str, float]]]:
        """The `count` most likely classes of each image and their probabilities, the most likely first."""
        values, places = self.probabilities.topk(min(count, len(self.classes)), dim=1)
        return [
            [(self.classes[place], value) for place, value in zip(own_places, own_values, strict=True)]
            for own_places, own_values in zip(places.tolist(), values.tolist(), strict=True)
        ]

    def table(self) -> list[list[str]]:
        """Rows for a CSV: a header, then each image's name, class, its probability, and the probability of every class."""
        rows = [["picture", "class", "probability", *self.classes]]
        for name, label, own in zip(self.names, self.labels, self.probabilities.tolist(), strict=True):
            rows.append([name, label, *(f"{value:.6g}" for value in (max(own), *own))])
        return rows


@dataclass(frozen=True)
class FewShotClassifier:
    """A classifier of images into the classes that it has learned, and others that are named.

        probabilities = softmax(logits / temperature),    for an adapter  logits = scale cos(image, prompts)

    Args:
        clip: the base model, with the adapter if there is one.
        predictor: what makes logits of features, or of raw pixels.
        prompts: about the classes, in the predictor's order.
        temperature: above 0.
    """

    clip: Clip
    predictor: Predictor
    prompts: Prompts
    temperature: float = 1.0

    @classmethod
    def from_run(
        cls,
        path: str | Path,
        model: str | None = None,
        pretrained: str | None = None,
        device: str | torch.device = "cpu",
    ) -> FewShotClassifier:
        """The classifier of a run, or of one of its members' folders.

        Args:
            path: a run's directory, or a folder that `save_classifier` wrote.
            model, pretrained: the base model as `load_clip` takes it, where it lies elsewhere than when the run was made. A
                model alone is taken with its own weights; weights alone are those of the run's model.
        Raises: InputError or AdapterFileError naming the file or the base model that cannot be used.
        """
        folder = classifier_folder(path)
        told = ClassifierFile.read(folder / CLASSIFIER)
        if model is None and pretrained is None:
            _check_base(told, folder)
        weights = told.pretrained if model is None and pretrained is None else pretrained
        clip = _loaded(told, folder, model, weights, _usable(device))
        if (found := module_digest(clip.model)) != told.base_sha256:
            raise InputError(
                f"The weights of {clip.name} are not those that {str(folder)!r} was fitted on: their sha256 must be "
                f"{told.base_sha256}, got {found}. Name the same model and weights as then."
            )
        if told.adapted:
            adapters.set_strength(adapters.load(clip, folder / ADAPTER), told.strength)
            clip.model.eval().requires_grad_(False)
        stored = folder / PREDICTOR
        if told.adapted or (told.method == ZERO_SHOT and not stored.is_file()):
            predictor = _of_prompts(clip, told.prompts())
        else:
            predictor = _stored_predictor(stored, clip, told)
        return cls(clip, predictor, told.prompts(), told.temperature)

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes' names."""
        return self.prompts.classes

    def predict(self, images: GivenImages, batch_size: int = BATCH) -> Predictions:
        """The probability of every class for each image.

        Args:
            images: one image or several, each a PIL image, the path of a file, or a tensor (3, h, w), uint8 or floating
                point in [0, 1]; several may be one tensor (n, 3, h, w).
            batch_size: images that are read and encoded at a time.
        Raises: InputError naming the image that cannot be used.
        """
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}.")
        of_pixels = self.predictor.reads == "pixels"
        given = GivenImageSet(images, raw_pixels if of_pixels else self.clip.preprocess)
        if of_pixels:
            inputs = torch.stack([given[place][0] for place in range(len(given))])
        else:
            inputs, _ = image_features(self.clip, given, batch_size)
        probabilities = (self.predictor.logits(inputs) / self.temperature).softmax(dim=1).cpu()
        return Predictions(probabilities, self.classes, given.names)

    def with_classes(self, *names: str) -> FewShotClassifier:
        """The same classifier with more classes, which come last and are known by their prompts alone.

        The logits of the other classes stay as they are.

        Raises: InputError for a name that is there already, or a method that needs images of every class.
        """
        if not names:
            return self
        prompts = self.prompts.with_classes(*names)
        predictor = with_classes(self.predictor, self.clip, Prompts(names, prompts.templates))
        return replace(self, predictor=predictor, prompts=prompts)


def _usable(device: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device must be one that PyTorch can use here, such as cpu, got {str(device)!r}: {error}") from error


def _loaded(told: ClassifierFile, folder: Path, model: str | None, pretrained: str | None, device: str | torch.device) -> Clip:
    """The base model given, else the one that the classifier was fitted on, which an error says."""
    try:
        return load_clip(model or told.model, pretrained, device)
    except InputError as error:
        if model is not None:
            raise
        raise InputError(
            f"The base model that {str(folder)!r} was fitted on cannot be loaded: {error} If it lies elsewhere now, give "
            "--model, and --pretrained for its weights."
        ) from error


def _check_base(told: ClassifierFile, folder: Path) -> None:
    """Refuse a classifier whose base model was a path that is gone."""
    model, weights = told.model, told.pretrained or ""
    given = (
        ("model", "--model", model, Path(model).is_absolute()),
        ("weights", "--pretrained", weights, weights.endswith(".safetensors")),
    )
    for role, option, path, is_path in given:
        if is_path and not Path(path).exists():
            raise InputError(
                f"The classifier {str(folder)!r} was fitted on the {role} {path!r}, which is no longer there. Give {option} with "
                "the path where it lies now."
            )


def _of_prompts(clip: Clip, prompts: Prompts) -> Predictor:
    """logits = scale T x, with the unit features T of the classes' prompts, computed once."""
    weight = float(clip.logit_scale) * prompt_features(clip, prompts)
    return Predictor(LinearHead.unbiased(weight), trained_numbers=0, open_vocabulary=True)


def _stored_predictor(path: Path, clip: Clip, told: ClassifierFile) -> Predictor:
    """The predictor at `path`, checked against the classes and the features that it is to have."""
    if not path.is_file():
        raise InputError(f"There is no {str(path)!r}, which the method {told.method!r} needs. Put it back, or fit it again.")
    predictor = load_predictor(path)
    count, width = predictor.head.get_buffer("weight").shape
    if count != len(told.classes):
        raise InputError(f"{str(path)!r} must be of {len(told.classes)} classes as {CLASSIFIER} is, got {count}. Fit it again.")
    given = width if predictor.reads == "pixels" else prompt_features(clip, Prompts(told.classes[:1])).shape[1]
    if width != given:
        raise InputError(
            f"{str(path)!r} was fitted on features {width} wide, those of {clip.name} are {given}. Give the model that it was "
            "fitted on."
        )
    return predictor
