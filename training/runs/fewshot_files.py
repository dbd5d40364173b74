"""The files of a few-shot run: report.json, and the result.json and test.json of each trial.

Version 1 had other names for some fields, and the folder `members` for `trials`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pipelines.errors import InputError
from pipelines.fewshot.metric_values import ClassificationMetrics, Interval
from pipelines.run_file import VERSION, RunFile, fields_of
from training.runs.naming import method_name

T = TypeVar("T")
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


def _nested(kind: type[T], content: Mapping[str, Any], **changes: Any) -> T:
    """The `kind` in `content`, which may have the names of version 1.

    Args:
        changes: fields in place of those in `content`.
    Raises: InputError if a field is missing.
    """
    values = {RENAMED.get(name, name): value for name, value in content.items()} | changes
    return kind(**fields_of(kind, values, kind.__name__))


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
class TrialResult(RunFile):
    """The result of a trial: one method, fitted to one split.

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
        zero_shot_top1: of the base model without training on the test images, in [0, 1]; None in files of earlier versions.
    """

    NAME: ClassVar[str] = "result.json"
    FILE_VERSION: ClassVar[int] = 2
    RENAMED: ClassVar[Mapping[str, str]] = RENAMED

    shots: int | str
    seed: int
    method: str
    folder: str
    split_sha256: str
    setting: dict[str, float | str]
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
    zero_shot_top1: float | None = None

    @property
    def split_key(self) -> tuple[int | str, int]:
        """Shots and seed: trials with equal keys share one split."""
        return self.shots, self.seed

    @classmethod
    def upgrade(cls, values: dict[str, Any], version: int) -> dict[str, Any]:
        """Make the nested values objects."""
        new = values["new_classes"]
        return values | {
            "validation": ValidationResult(**values["validation"]),
            "test": ClassificationMetrics.from_json(values["test"]),
            "calibrated": ClassificationMetrics.from_json(values["calibrated"]),
            "new_classes": NewClassesResult(**{**new, "top1": Interval(**new["top1"])}) if new else None,
        }


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
        below_zero_shot: number of trials whose accuracy on the test images is below that of the base model without training; None
            in files of earlier versions.
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
    below_zero_shot: int | None = None

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> MethodSummary:
        """The summary in `content`, of any version.

        Raises: InputError if a field is missing.
        """
        new = content.get("new_classes")
        return _nested(cls, content, top1=Interval(**content["top1"]), new_classes=Interval(**new) if new else None)


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
class FewShotReport(RunFile):
    """The results of a run.

    Args:
        dataset: the labelled images.
        model, pretrained: the base model, as `load_clip` takes it.
        templates: of the prompts.
        shots, seeds, methods: every combination of them is a trial; methods that failed are not among them.
        trials: in the order in which they were fitted.
        summary: one entry for each number of shots and method.
        classifier: folder of the trial that represents the run, relative to the run's directory.
        quantization_errors: ||Q(W) - W|| / ||W|| of the base model's quantised encoders, by name.
        failed: why a method could not be fitted, by method.
        validation_accuracies: by method, in a run that has chosen its method by them; empty in others.
    """

    NAME: ClassVar[str] = "report.json"
    FILE_VERSION: ClassVar[int] = 2
    RENAMED: ClassVar[Mapping[str, str]] = RENAMED

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
    quantization_errors: Mapping[str, float] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
    validation_accuracies: Mapping[str, float] = field(default_factory=dict)

    @property
    def representative(self) -> TrialResult:
        """The trial that is loaded for the run.

        Raises: InputError if `classifier` is the folder of no trial.
        """
        trial = self.trial_in(self.classifier)
        if trial is None:
            raise InputError(f"classifier must be the folder of a trial, got {self.classifier!r}. Repeat the run.")
        return trial

    @property
    def choice(self) -> str:
        """Which method a run with --method auto has chosen, in a sentence; empty for other runs."""
        if not self.validation_accuracies:
            return ""
        accuracies = ", ".join(f"{method_name(name)} {share:.1%}" for name, share in self.validation_accuracies.items())
        return f"{method_name(self.representative.method)} was chosen by the accuracy on validation images: {accuracies}."

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
        """The fields as plain values; each trial has its version, as in its own file."""
        return super().to_json() | {"trials": [trial.to_json() for trial in self.trials]}

    @classmethod
    def upgrade(cls, values: dict[str, Any], version: int) -> dict[str, Any]:
        """Make the nested values objects."""
        return values | {
            "dataset": _nested(DatasetSummary, values["dataset"]),
            "trials": tuple(map(TrialResult.from_json, values["trials"])),
            "summary": tuple(map(MethodSummary.from_json, values["summary"])),
        }


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
class PredictionFile(RunFile):
    """The predictions of a trial for all test images.

    Args:
        classes: names of the classes.
        temperature: divisor of the logits.
        images: the predictions.
    """

    NAME: ClassVar[str] = "test.json"
    FILE_VERSION: ClassVar[int] = 2
    RENAMED: ClassVar[Mapping[str, str]] = RENAMED

    classes: Sequence[str]
    temperature: float
    images: Sequence[ImagePrediction] = field(default_factory=tuple)

    @classmethod
    def upgrade(cls, values: dict[str, Any], version: int) -> dict[str, Any]:
        """Make the predictions objects."""
        return values | {"images": tuple(ImagePrediction(**image) for image in values.get("images", ()))}

    def text(self) -> str:
        """The content of the file, with one line for each image."""
        images = ",\n".join(json.dumps(asdict(image)) for image in self.images)
        rest = json.dumps({VERSION: self.FILE_VERSION, "classes": list(self.classes), "temperature": self.temperature})
        return f'{rest[:-1]}, "images": [\n{images}\n]}}\n'
