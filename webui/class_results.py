"""The result of a few-shot run, read from its files, and the images that it refers to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

from pipelines.errors import InputError
from pipelines.fewshot.sources import DatasetSource, ImageFile
from training.runs.fewshot_files import FewShotReport, ImagePrediction, PredictionFile, TrialResult
from training.runs.record import RunRecord
from webui.inference_worker import WORKER
from webui.runs import read_cached

ZERO_SHOT, CONTROL = "zeroshot", "pixels"


@dataclass(frozen=True)
class Result:
    """One fitted method of a finished run.

    Args:
        record: the run.
        report: the content of report.json.
        trial: the method's entry in the report.
    """

    record: RunRecord
    report: FewShotReport
    trial: TrialResult

    @property
    def classes(self) -> Sequence[str]:
        """The class names; escape them before they go into HTML."""
        return self.report.dataset.classes

    @property
    def folder(self) -> Path:
        """The folder of the method's files."""
        return self.record.path / self.trial.folder

    def beside(self, method: str) -> TrialResult | None:
        """The trial of another method on the same split; None if it was not run."""
        return self.report.on_same_split(self.trial, method)

    def same_split(self) -> Iterator[TrialResult]:
        """All trials on the same split."""
        return self.report.same_split(self.trial)

    def tested(self) -> Sequence[ImagePrediction]:
        """The predictions for all test images; empty for runs of earlier versions, which did not record them."""
        path = self.folder / PredictionFile.NAME
        return _predictions(self.folder, path.stat().st_mtime_ns) if path.is_file() else []

    def mistakes(self) -> list[ImagePrediction]:
        """The wrong predictions, highest confidence first."""
        return sorted((one for one in self.tested() if not one.is_right), key=lambda one: -one.confidence)

    def untested(self) -> list[str]:
        """The classes without test images."""
        counts = map(sum, self.trial.test.confusion)
        return [name for name, count in zip(self.classes, counts, strict=True) if not count]

    def in_cell(self, true: int, predicted: int) -> list[ImagePrediction]:
        """The test images of class `true` predicted as `predicted`, highest confidence first."""
        matches = (one for one in self.tested() if (one.true, one.predicted) == (true, predicted))
        return sorted(matches, key=lambda one: -one.confidence)


def result_of(record: RunRecord, trial: str | None = None) -> Result | None:
    """The result of a run; None before it is done.

    Args:
        trial: the folder of a trial in the report; any other value means the trial that was chosen as the classifier.
    Raises: InputError if the report names no trial, or files outside of the run.
    """
    report = read_cached(FewShotReport, record.path)
    if report is None:
        return None
    chosen = report.trial_in(trial) or report.representative
    folder = (record.path / chosen.folder).resolve()
    if not folder.is_relative_to(record.path.resolve()):
        raise InputError("The report of this run names files outside of its folder. Run it again.")
    return Result(record, report, chosen)


def source_of(record: RunRecord, image: ImagePrediction) -> DatasetSource | None:
    """The file of a test image; None if it is gone or has changed since the test."""
    try:
        source = named_source(record, image.name)
        content = None if source is None else source.content()
    except (InputError, OSError):
        return None
    return source if content is not None and hashlib.sha256(content).hexdigest() == image.sha256 else None


def named_source(record: RunRecord, name: str) -> DatasetSource | None:
    """The image `name` of the dataset that a run was trained on; None if there is none.

    Raises: InputError if the dataset is gone or cannot be read.
    """
    data = record.options()["data"]
    given = data["data_dir"]
    parts = PurePosixPath(name).parts
    if given is not None and Path(given).is_dir() and data["dataset"] is None:
        is_inside = not PurePosixPath(name).is_absolute() and ".." not in parts
        return ImageFile(name, Path(given)) if is_inside else None
    return WORKER.call("dataset_image", given, data["dataset"], name)


@lru_cache(maxsize=16)
def _predictions(folder: Path, changed: int) -> Sequence[ImagePrediction]:
    return PredictionFile.read(folder).images
