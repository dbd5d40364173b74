"""Saving and loading fitted classifiers, as safetensors and JSON.

The folder of a classifier contains classifier.json, and an adapter of the encoders, a predictor on their features, or neither.
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
FORMAT, ZERO_SHOT = 2, "zeroshot"
BATCH = 64
SHA256 = re.compile("[0-9a-f]{64}")


def _are_words(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(word, str) and word.strip() for word in value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


# The allowed values of each field of classifier.json, as text and as a check.
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
    "scale": ("a number in [0, 1]", lambda value: _is_number(value) and 0 <= value <= 1),
    "format": (f"{FORMAT}, the format that this version reads", lambda value: type(value) is int and value == FORMAT),
}


@dataclass(frozen=True)
class ClassifierFile:
    """The content of classifier.json.

    Args:
        method: a baseline's name, or an adapter method's.
        model, pretrained: the base model, as `load_clip` takes it.
        base_sha256: of its weights, by `module_digest`.
        classes: the classes' names, as the prompts use them.
        keys: the classes' names in the dataset, in the same order.
        templates: of the prompts, with {} for the class's name.
        temperature: divisor of the logits, fitted on the validation images.
        scale: of the adapter, in [0, 1]; 1 for other methods.
        format: of the file.
    Raises: InputError naming the field, its allowed values and its value.
    """

    method: str
    model: str
    pretrained: str | None
    base_sha256: str
    classes: tuple[str, ...]
    keys: tuple[str, ...]
    templates: tuple[str, ...]
    temperature: float = 1.0
    scale: float = 1.0
    format: int = FORMAT

    def __post_init__(self) -> None:
        for name, (words, allows) in ALLOWED.items():
            if not allows(getattr(self, name)):
                raise InputError(f"{name} must be {words}, got {getattr(self, name)!r}.")
        for name in ("classes", "keys", "templates"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.keys) != len(self.classes):
            raise InputError(f"keys must have one entry for each of the {len(self.classes)} classes, got {len(self.keys)}.")
        if self.scale != 1 and not self.adapted:
            raise InputError(f"scale must be 1 for the method {self.method!r}, which has no adapter, got {self.scale}.")
        self.prompts()

    @property
    def adapted(self) -> bool:
        """Whether the method adapts the encoders."""
        return self.method in method_names()

    def prompts(self) -> Prompts:
        """The prompts of the classes."""
        return Prompts(self.classes, self.templates)

    def write(self, path: Path) -> None:
        """Write the file, which `read` reads."""
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> ClassifierFile:
        """The file that `write` wrote, or one of format 1, which has `strength` instead of `scale`.

        Raises: InputError naming the file and the field that is missing, unknown or has a value that is not allowed.
        """
        content = read_json(path.read_bytes(), repr(str(path)))
        if content.get("format") == 1 and "strength" in content:
            content = {**content, "format": FORMAT, "scale": content["strength"]}
            del content["strength"]
        names = {field.name for field in fields(cls)}
        if set(content) != names:
            missing, unknown = sorted(names - set(content)), sorted(set(content) - names)
            raise InputError(
                f"{str(path)!r} must have the fields {', '.join(sorted(names))}; missing: {', '.join(missing) or 'none'}, "
                f"unknown: {', '.join(unknown) or 'none'}. Fit the classifier again."
            )
        try:
            return cls(**content)
        except InputError as error:
            raise InputError(f"{str(path)!r} cannot be used: {error} Correct it, or fit the classifier again.") from error


def save_classifier(
    folder: Path,
    metadata: ClassifierFile,
    adapter: dict[str, nn.Module] | None = None,
    predictor: Predictor | None = None,
) -> None:
    """Write a classifier's folder, classifier.json last.

    Args:
        adapter: the adapted encoders, for adapter methods.
        predictor: for all other methods; optional for zeroshot.
    Raises: ValueError if the method needs the other of the two, or got both.
    """
    fits = (adapter is not None) == metadata.adapted and (predictor is not None) != metadata.adapted
    if not fits and not (metadata.method == ZERO_SHOT and adapter is None):
        given = [name for name, part in (("adapter", adapter), ("predictor", predictor)) if part is not None]
        needed = "an adapter" if metadata.adapted else "a predictor"
        raise ValueError(
            f"The method {metadata.method!r} must be saved with {needed} only, got {' and '.join(given) or 'neither'}."
        )
    if adapter is not None:
        adapter_files.save(adapter, folder / ADAPTER)
    if predictor is not None:
        save_predictor(predictor, folder / PREDICTOR)
    metadata.write(folder / CLASSIFIER)


def classifier_folder(path: str | Path) -> Path:
    """The folder of the classifier at `path`, a classifier's folder or a run's directory.

    Raises: InputError if there is no classifier, or the run's report names a folder outside of the run.
    """
    path = Path(path)
    if (path / CLASSIFIER).is_file():
        return path
    report = path / REPORT
    if not report.is_file():
        raise InputError(
            f"There is no classifier at {str(path)!r}, neither {CLASSIFIER} nor {REPORT}. Give the directory of a finished "
            "run, or one of the folders RUN/trials/SHOTS/SEED/METHOD."
        )
    named = read_json(report.read_bytes(), repr(str(report))).get("classifier")
    folder = (path / named).resolve() if isinstance(named, str) else None
    if folder is None or Path(named).is_absolute() or not folder.is_relative_to(path.resolve()):
        raise InputError(
            f"classifier in {str(report)!r} must name a folder within the run, got {named!r}. Give one of the folders "
            "RUN/trials/SHOTS/SEED/METHOD instead."
        )
    if not (folder / CLASSIFIER).is_file():
        raise InputError(
            f"{str(report)!r} names {named!r}, which has no {CLASSIFIER}. Restore it, or give the folder of another trial."
        )
    return path / named


@dataclass(frozen=True)
class Predictions:
    """The predictions of a classifier for images.

    Args:
        probabilities: (n, classes) float32, on the CPU.
        classes: their names.
        names: of the images: paths, or indices such as "images[2]".
    """

    probabilities: torch.Tensor
    classes: tuple[str, ...]
    names: tuple[str, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """The most likely class of each image."""
        return tuple(self.classes[index] for index in self.probabilities.argmax(dim=1).tolist())

    def top(self, count: int) -> list[list[tuple[str, float]]]:
        """The `count` most likely classes of each image with their probabilities, most likely first."""
        values, indices = self.probabilities.topk(min(count, len(self.classes)), dim=1)
        return [
            [(self.classes[index], value) for index, value in zip(row, likely, strict=True)]
            for row, likely in zip(indices.tolist(), values.tolist(), strict=True)
        ]

    def table(self) -> list[list[str]]:
        """Rows of a CSV: a header, then for each image its name, class and probability, and the probabilities of all classes."""
        rows = [["image", "class", "probability", *self.classes]]
        for name, label, row in zip(self.names, self.labels, self.probabilities.tolist(), strict=True):
            rows.append([name, label, *(f"{value:.6g}" for value in (max(row), *row))])
        return rows


@dataclass(frozen=True)
class FewShotClassifier:
    """An image classifier for its trained classes, and for further ones given by name.

        probabilities = softmax(logits / temperature),    for an adapter  logits = scale cos(image, prompts)

    Args:
        clip: the base model, with the adapter if there is one.
        predictor: computes logits from features or raw pixels.
        prompts: of the classes, in the predictor's order.
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
        """The classifier of a run, or of one of its trials.

        Args:
            path: a run's directory, or a folder that `save_classifier` wrote.
            model, pretrained: the base model as `load_clip` takes it, if it has moved since the run. `model` alone is loaded
                with its own weights; `pretrained` alone is loaded into the model of the run.
        Raises: InputError or AdapterFileError naming the file or the base model that cannot be used.
        """
        folder = classifier_folder(path)
        metadata = ClassifierFile.read(folder / CLASSIFIER)
        if model is None and pretrained is None:
            _check_base(metadata, folder)
        weights = metadata.pretrained if model is None and pretrained is None else pretrained
        clip = _loaded(metadata, folder, model, weights, _usable(device))
        if (digest := module_digest(clip.model)) != metadata.base_sha256:
            raise InputError(
                f"The weights of {clip.name} are not those that {str(folder)!r} was fitted on: their sha256 must be "
                f"{metadata.base_sha256}, got {digest}. Give the same model and weights."
            )
        if metadata.adapted:
            adapters.set_scale(adapters.load(clip, folder / ADAPTER), metadata.scale)
            clip.model.eval().requires_grad_(False)
        stored = folder / PREDICTOR
        if metadata.adapted or (metadata.method == ZERO_SHOT and not stored.is_file()):
            predictor = _of_prompts(clip, metadata.prompts())
        else:
            predictor = _stored_predictor(stored, clip, metadata)
        return cls(clip, predictor, metadata.prompts(), metadata.temperature)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes."""
        return self.prompts.classes

    def predict(self, images: GivenImages, batch_size: int = BATCH) -> Predictions:
        """The probability of every class for each image.

        Args:
            images: one image or several, each a PIL image, the path of a file, or a tensor (3, h, w), uint8 or floating
                point in [0, 1]; several may be one tensor (n, 3, h, w).
            batch_size: number of images encoded at once.
        Raises: InputError naming the image that cannot be used.
        """
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}.")
        of_pixels = self.predictor.reads == "pixels"
        given = GivenImageSet(images, raw_pixels if of_pixels else self.clip.preprocess)
        if of_pixels:
            inputs = torch.stack([given[index][0] for index in range(len(given))])
        else:
            inputs, _ = image_features(self.clip, given, batch_size, before_projection=self.predictor.reads == "embeddings")
        probabilities = (self.predictor.logits(inputs) / self.temperature).softmax(dim=1).cpu()
        return Predictions(probabilities, self.classes, given.names)

    def with_classes(self, *names: str) -> FewShotClassifier:
        """The classifier with further classes, appended and represented by their prompts alone.

        The logits of the other classes do not change.

        Raises: InputError for the name of an existing class, or a method that needs images of every class.
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
        raise InputError(
            f"device must be available to PyTorch on this machine, such as cpu, got {str(device)!r}: {error}"
        ) from error


def _loaded(
    metadata: ClassifierFile, folder: Path, model: str | None, pretrained: str | None, device: str | torch.device
) -> Clip:
    """The given base model, or the one that the classifier was fitted on."""
    try:
        return load_clip(model or metadata.model, pretrained, device)
    except InputError as error:
        if model is not None:
            raise
        raise InputError(
            f"The base model that {str(folder)!r} was fitted on cannot be loaded: {error} If it has moved, give "
            "--model, and --pretrained for its weights."
        ) from error


def _check_base(metadata: ClassifierFile, folder: Path) -> None:
    """Raise InputError if the base model was given as a path that no longer exists."""
    model, weights = metadata.model, metadata.pretrained or ""
    given = (
        ("model", "--model", model, Path(model).is_absolute()),
        ("weights", "--pretrained", weights, weights.endswith(".safetensors")),
    )
    for role, option, path, is_path in given:
        if is_path and not Path(path).exists():
            raise InputError(
                f"The classifier {str(folder)!r} was fitted on the {role} {path!r}, which no longer exists. Give {option} with "
                "its new path."
            )


def _of_prompts(clip: Clip, prompts: Prompts) -> Predictor:
    """logits = scale T x, with the unit features T of the classes' prompts, computed once."""
    weight = float(clip.logit_scale) * prompt_features(clip, prompts)
    return Predictor(LinearHead.unbiased(weight), num_trainable_parameters=0, open_vocabulary=True)


def _stored_predictor(path: Path, clip: Clip, metadata: ClassifierFile) -> Predictor:
    """The predictor at `path`, after checking its numbers of classes and features."""
    if not path.is_file():
        raise InputError(f"The method {metadata.method!r} needs {str(path)!r}, which is missing. Restore it, or fit it again.")
    predictor = load_predictor(path)
    count, width = predictor.head.get_buffer("weight").shape
    if count != len(metadata.classes):
        raise InputError(
            f"{str(path)!r} must have {len(metadata.classes)} classes, as {CLASSIFIER} has, got {count}. Fit it again."
        )
    given = width if predictor.reads == "pixels" else prompt_features(clip, Prompts(metadata.classes[:1])).shape[1]
    if width != given:
        raise InputError(
            f"{str(path)!r} was fitted on features of width {width}, but those of {clip.name} have width {given}. Give the model "
            "that it was fitted on."
        )
    return predictor
