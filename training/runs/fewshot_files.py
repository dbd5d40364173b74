"""The files of a few-shot run: report.json, and the result.json and test.json of each trial.

`from_json` also reads version 1, which had other names for some fields and kept the trials in the folder `members`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pipelines.errors import InputError
from pipelines.fewshot.metric_values import ClassificationMetrics, Interval
from training.runs.durable import write_text_atomically

VERSION = 2
REPORT, RESULT, TEST = "report.json", "result.json", "test.json"
TRIALS, TRIALS_OF_VERSION_1 = "trials", "members"
# Present names of the fields of version 1.
RENAMED = {
    "set": "dataset",
    "pictures": "images",
    "copies": "duplicates",
    "members": "trials",
    "runs": "num_seeds",
    "strength": "scale",
    "guard": "scale_reason",
    "trained_numbers": "num_trainable_parameters",
}


def trials_folder(run_path: Path) -> str:
    """The name of the folder with the trials of the run in `run_path`."""
    return TRIALS_OF_VERSION_1 if (run_path / TRIALS_OF_VERSION_1).is_dir() else TRIALS


def _values(kind: type, content: object) -> dict[str, Any]:
    """The fields of `kind` in `content` under their present names; unknown fields are ignored.

    Raises: InputError if `content` has a later version, is no table, or lacks a field.
    """
    if not isinstance(content, Mapping):
        raise InputError(f"{kind.__name__} must be a JSON object, got {type(content).__name__}.")
    if content.get("version", VERSION) != VERSION:
        raise InputError(
            f"The version of {kind.__name__} must be at most {VERSION}, got {content['version']!r}. Update this program."
        )
    renamed = {RENAMED.get(name, name): value for name, value in content.items()}
    names = [one.name for one in fields(kind)]
    missing = [one.name for one in fields(kind) if one.default is MISSING and one.default_factory is MISSING]
    missing = [name for name in missing if name not in renamed]
    if missing:
        raise InputError(f"{kind.__name__} lacks the fields {', '.join(missing)}. Repeat the run.")
    return {name: renamed[name] for name in names if name in renamed and name != "version"}


@dataclass(frozen=True)
class ValidationResult:
    """Accuracy on the validation images.

    Args:
        top1: of the trial, in [0, 1].
        zero_shot_top1: of the base model without training, in [0, 1].
        count: number of validation images.
    """

    top1: float
    zero_shot_top1: float
    count: int


@dataclass(frozen=True)
class NewClassesResult:
    """Accuracy on test images of the held-out classes, classified among the held-out classes only.

    Args:
        top1: of the trial, with Wilson's interval.
        zero_shot_top1: of the base model without training, in [0, 1].
        harmonic_mean: of the accuracies on trained and on held-out classes.
        count: number of test images.
    """

    top1: Interval
    zero_shot_top1: float
    harmonic_mean: float
    count: int


@dataclass(frozen=True)
class TrialResult:
    """result.json of a trial: one method, fitted to one split.

    Args:
        shots: training images per class, or "all".
        seed: of the split.
        method: a baseline's name, or an adapter method's.
        folder: of the trial's files, relative to the run's directory.
        split_sha256: of the split file.
        setting: hyperparameters chosen on the validation images.
        scale: of the adapter, in [0, 1]; 1 for baselines.
        scale_reason: why the scale is below 1; None if it is 1.
        num_trainable_parameters: number of trainable parameters.
        stored_bytes: size of the weights on disk.
        seconds, peak_memory: cost of fitting alone, in seconds and bytes.
        temperature: divisor of the logits, fitted on the validation images.
        validation: accuracy on the validation images.
        test: metrics on the test images, before calibration.
        calibrated: metrics on the test images, with `temperature`.
        new_classes: accuracy on held-out classes; None without held-out classes, or if the method cannot add classes.
    """

    shots: int | str
    seed: int
    method: str
    folder: str
    split_sha256: str
    setting: dict[str, float]
    scale: float
    scale_reason: str | None
    num_trainable_parameters: int
    stored_bytes: int
    seconds: float
    peak_memory: float
    temperature: float
    validation: ValidationResult
    test: ClassificationMetrics
    calibrated: ClassificationMetrics
    new_classes: NewClassesResult | None
    version: int = VERSION

    @property
    def split_key(self) -> tuple[int | str, int]:
        """Shots and seed: trials with equal keys share one split."""
        return self.shots, self.seed

    def to_json(self) -> dict[str, Any]:
        """Plain values, which `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: object) -> TrialResult:
        """The result in `content`, of any version.

        Raises: InputError if a field is missing.
        """
        values = _values(cls, content)
        values["validation"] = ValidationResult(**values["validation"])
        values["test"], values["calibrated"] = (ClassificationMetrics.from_json(values[name]) for name in ("test", "calibrated"))
        if new := values["new_classes"]:
            values["new_classes"] = NewClassesResult(**{**new, "top1": Interval(**new["top1"])})
        return cls(**values)


@dataclass(frozen=True)
class MethodSummary:
    """One method at one number of shots: means over its seeds.

    Args:
        shots: training images per class, or "all".
        method: a baseline's name, or an adapter method's.
        num_seeds: number of trials.
        top1: with Student's interval over the seeds; for one seed, Wilson's.
        calibration_error, calibrated_calibration_error: expected calibration error before and after calibration.
        num_trainable_parameters, stored_bytes, seconds, peak_memory: as of `TrialResult`.
        new_classes: accuracy on held-out classes; None as of `TrialResult`.
        harmonic_mean: of the accuracies on trained and on held-out classes; None likewise.
    """

    shots: int | str
    method: str
    num_seeds: int
    top1: Interval
    calibration_error: float
    calibrated_calibration_error: float
    num_trainable_parameters: float
    stored_bytes: float
    seconds: float
    peak_memory: float
    new_classes: Interval | None = None
    harmonic_mean: float | None = None

    @classmethod
    def from_json(cls, content: object) -> MethodSummary:
        """The summary in `content`, of any version.

        Raises: InputError if a field is missing.
        """
        values = _values(cls, content)
        values["top1"] = Interval(**values["top1"])
        if values.get("new_classes"):
            values["new_classes"] = Interval(**values["new_classes"])
        return cls(**values)


@dataclass(frozen=True)
class DatasetSummary:
    """The labelled images of a run.

    Args:
        name: of the dataset.
        classes: names of the trained classes.
        new_classes: names of the held-out classes.
        images: number of images.
        duplicates: a sentence for each group of identical images.
        notes: sentences on how the dataset was read.
    """

    name: str
    classes: Sequence[str]
    new_classes: Sequence[str]
    images: int
    duplicates: Sequence[str]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class FewShotReport:
    """report.json of a run.

    Args:
        dataset: the labelled images.
        model, pretrained: the base model, as `load_clip` takes it.
        templates: of the prompts.
        shots, seeds, methods: every combination of them is a trial.
        trials: in the order in which they were fitted.
        summary: one entry for each number of shots and method.
        classifier: folder of the trial that represents the run, relative to the run's directory.
    """

    dataset: DatasetSummary
    model: str
    pretrained: str | None
    templates: Sequence[str]
    shots: Sequence[int | str]
    seeds: Sequence[int]
    methods: Sequence[str]
    trials: Sequence[TrialResult]
    summary: Sequence[MethodSummary]
    classifier: str
    version: int = VERSION

    @property
    def representative(self) -> TrialResult:
        """The trial that is loaded for the run.

        Raises: InputError if `classifier` is the folder of no trial.
        """
        trial = self.trial_in(self.classifier)
        if trial is None:
            raise InputError(f"classifier must be the folder of a trial, got {self.classifier!r}. Repeat the run.")
        return trial

    def trial_in(self, folder: str | None) -> TrialResult | None:
        """The trial whose files are in `folder`; None if there is none."""
        return next((trial for trial in self.trials if trial.folder == folder), None)

    def same_split(self, trial: TrialResult) -> Iterator[TrialResult]:
        """All trials on the split of `trial`."""
        return (other for other in self.trials if other.split_key == trial.split_key)

    def on_same_split(self, trial: TrialResult, method: str) -> TrialResult | None:
        """The trial of `method` on the split of `trial`; None if that method was not run."""
        return next((other for other in self.same_split(trial) if other.method == method), None)

    def to_json(self) -> dict[str, Any]:
        """Plain values, which `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: object) -> FewShotReport:
        """The report in `content`, of any version.

        Raises: InputError if a field is missing.
        """
        values = _values(cls, content)
        values["dataset"] = DatasetSummary(**_values(DatasetSummary, values["dataset"]))
        values["trials"] = tuple(map(TrialResult.from_json, values["trials"]))
        values["summary"] = tuple(map(MethodSummary.from_json, values["summary"]))
        return cls(**values)


@dataclass(frozen=True)
class ImagePrediction:
    """The prediction for one test image; classes are indices.

    Args:
        name: the image's path within its dataset.
        sha256: of the image file when it was tested.
        true, predicted: the label and the predicted class.
        confidence: calibrated probability of the most likely class, in [0, 1].
        top: the most likely classes with their calibrated probabilities.
    """

    name: str
    sha256: str
    true: int
    predicted: int
    confidence: float
    top: Sequence[Sequence[float]]

    @property
    def is_right(self) -> bool:
        """Whether the prediction is the label."""
        return self.true == self.predicted


@dataclass(frozen=True)
class PredictionFile:
    """test.json of a trial: the prediction for every test image.

    Args:
        classes: names of the classes.
        temperature: divisor of the logits.
        images: the predictions.
    """

    classes: Sequence[str]
    temperature: float
    images: Sequence[ImagePrediction] = field(default_factory=tuple)
    version: int = VERSION

    @classmethod
    def from_json(cls, content: object) -> PredictionFile:
        """The predictions in `content`, of any version.

        Raises: InputError if a field is missing.
        """
        values = _values(cls, content)
        return cls(**{**values, "images": tuple(ImagePrediction(**image) for image in values.get("images", ()))})

    def write(self, path: Path) -> None:
        """Write the file atomically, with one line for each image."""
        images = ",\n".join(json.dumps(asdict(image)) for image in self.images)
        rest = json.dumps({"version": self.version, "classes": list(self.classes), "temperature": self.temperature})
        write_text_atomically(path, f'{rest[:-1]}, "images": [\n{images}\n]}}\n')
