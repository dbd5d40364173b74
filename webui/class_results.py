"""The result of a few-shot run, read from its files, and the images that it refers to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from pipelines.errors import InputError
from pipelines.fewshot.sources import DatasetSource, ImageFile
from training.runs.record import RunRecord

REPORT, TESTED = "report.json", "test.json"
ZERO_SHOT, CONTROL = "zeroshot", "pixels"


@dataclass(frozen=True)
class TestImage:
    """The prediction for one test image.

    Args:
        name: its path within the dataset.
        sha256: the hash of its file at test time.
        true, predicted: indices of the true and the predicted class.
        confidence: probability of the predicted class, in [0, 1].
        top: pairs of class index and probability, most likely first.
    """

    name: str
    sha256: str
    true: int
    predicted: int
    confidence: float
    top: list[list[float]]

    # Keeps pytest from collecting this class.
    __test__ = False

    @property
    def is_right(self) -> bool:
        """Whether the prediction is correct."""
        return self.true == self.predicted


@dataclass(frozen=True)
class Result:
    """One fitted method of a finished run.

    Args:
        record: the run.
        report: the content of report.json.
        trial: the method's entry in the report.
    """

    record: RunRecord
    report: dict[str, Any]
    trial: dict[str, Any]

    @property
    def classes(self) -> list[str]:
        """The class names; escape them before they go into HTML."""
        return self.report["set"]["classes"]

    @property
    def folder(self) -> Path:
        """The folder of the method's files."""
        return self.record.path / self.trial["folder"]

    def beside(self, method: str) -> dict[str, Any] | None:
        """The entry of another method on the same split; None if it was not run."""
        wanted = (method, self.trial["shots"], self.trial["seed"])
        return next((one for one in self.report["members"] if (one["method"], one["shots"], one["seed"]) == wanted), None)

    def same_split(self) -> Iterator[dict[str, Any]]:
        """The entries of all methods on the same split."""
        wanted = (self.trial["shots"], self.trial["seed"])
        return (one for one in self.report["members"] if (one["shots"], one["seed"]) == wanted)

    def tested(self) -> list[TestImage]:
        """The predictions for all test images; empty for runs of earlier versions, which did not record them."""
        path = self.folder / TESTED
        return _tested(path, path.stat().st_mtime_ns) if path.is_file() else []

    def mistakes(self) -> list[TestImage]:
        """The wrong predictions, highest confidence first."""
        return sorted((one for one in self.tested() if not one.is_right), key=lambda one: -one.confidence)

    def untested(self) -> list[str]:
        """The classes without test images."""
        counts = map(sum, self.trial["test"]["confusion"])
        return [name for name, count in zip(self.classes, counts, strict=True) if not count]

    def in_cell(self, true: int, predicted: int) -> list[TestImage]:
        """The test images of class `true` predicted as `predicted`, highest confidence first."""
        matches = (one for one in self.tested() if (one.true, one.predicted) == (true, predicted))
        return sorted(matches, key=lambda one: -one.confidence)


def result_of(record: RunRecord, trial: str | None = None) -> Result | None:
    """The result of a run; None before it is done.

    Args:
        trial: the folder of a trial in the report; any other value means the trial that was chosen as the classifier.
    Raises: InputError if the report names no trial, or files outside of the run.
    """
    path = record.path / REPORT
    if not path.is_file():
        return None
    report = _report(path, path.stat().st_mtime_ns)
    trials = {one["folder"]: one for one in report.get("members", [])}
    chosen = trials.get(trial) or trials.get(report.get("classifier"))
    if chosen is None:
        raise InputError("The report of this run lists no trial. Run it again.")
    folder = (record.path / chosen["folder"]).resolve()
    if not folder.is_relative_to(record.path.resolve()):
        raise InputError("The report of this run names files outside of its folder. Run it again.")
    return Result(record, report, chosen)


def source_of(record: RunRecord, image: TestImage) -> DatasetSource | None:
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
    # Imported here because it loads the readers of all dataset formats.
    from webui.work import labelled

    return labelled.sources(given, data["dataset"]).get(name)


@lru_cache(maxsize=16)
def _report(path: Path, changed: int) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@lru_cache(maxsize=16)
def _tested(path: Path, changed: int) -> list[TestImage]:
    return [TestImage(**one) for one in json.loads(path.read_text(encoding="utf-8"))["pictures"]]
