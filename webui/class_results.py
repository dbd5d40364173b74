"""What a few-shot run has found, read from its files, and which images it speaks of."""

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
    """An image that was tested on.

    Args:
        name: its path within its set.
        sha256: of its file when it was tested.
        true, predicted: its class and the one that it was taken for, by their places.
        confidence: how sure the classifier was, in [0, 1].
        top: the most likely classes and their probabilities.
    """

    name: str
    sha256: str
    true: int
    predicted: int
    confidence: float
    top: list[list[float]]

    # Not a test of pytest's, whatever it is called.
    __test__ = False

    @property
    def is_right(self) -> bool:
        """Whether it was taken for what it is."""
        return self.true == self.predicted


@dataclass(frozen=True)
class Result:
    """One fitted method of a finished run.

    Args:
        record: the run.
        report: what report.json says.
        trial: the method's entry in it.
    """

    record: RunRecord
    report: dict[str, Any]
    trial: dict[str, Any]

    @property
    def classes(self) -> list[str]:
        """The classes' names, which are users' words."""
        return self.report["set"]["classes"]

    @property
    def folder(self) -> Path:
        """Of the method's files."""
        return self.record.path / self.trial["folder"]

    def beside(self, method: str) -> dict[str, Any] | None:
        """Another method's entry, of the same images; None where it was not run."""
        wanted = (method, self.trial["shots"], self.trial["seed"])
        return next((one for one in self.report["members"] if (one["method"], one["shots"], one["seed"]) == wanted), None)

    def same_draw(self) -> Iterator[dict[str, Any]]:
        """All methods' entries of the same images."""
        wanted = (self.trial["shots"], self.trial["seed"])
        return (one for one in self.report["members"] if (one["shots"], one["seed"]) == wanted)

    def tested(self) -> list[TestImage]:
        """What it made of each test image; none for runs that did not write it down."""
        path = self.folder / TESTED
        return _tested(path, path.stat().st_mtime_ns) if path.is_file() else []

    def mistakes(self) -> list[TestImage]:
        """The test images that it got wrong, the surest first."""
        return sorted((one for one in self.tested() if not one.is_right), key=lambda one: -one.confidence)

    def untested(self) -> list[str]:
        """The classes without test images."""
        counts = map(sum, self.trial["test"]["confusion"])
        return [name for name, count in zip(self.classes, counts, strict=True) if not count]

    def in_cell(self, true: int, predicted: int) -> list[TestImage]:
        """The test images of class `true` that were taken for `predicted`, the surest first."""
        matches = (one for one in self.tested() if (one.true, one.predicted) == (true, predicted))
        return sorted(matches, key=lambda one: -one.confidence)


def result_of(record: RunRecord, trial: str | None = None) -> Result | None:
    """What a run has found; None before it is done.

    Args:
        trial: the folder of a fitted method, as the report has it; the one that stands for the run unless it is one.
    """
    path = record.path / REPORT
    if not path.is_file():
        return None
    report = _report(path, path.stat().st_mtime_ns)
    trials = {one["folder"]: one for one in report.get("members", [])}
    chosen = trials.get(trial) or trials.get(report.get("classifier"))
    if chosen is None:
        raise InputError("The report of this run names no fitted method. Make the run again.")
    folder = (record.path / chosen["folder"]).resolve()
    if not folder.is_relative_to(record.path.resolve()):
        raise InputError("The report of this run names files outside of it. Make the run again.")
    return Result(record, report, chosen)


def source_of(record: RunRecord, image: TestImage) -> DatasetSource | None:
    """Where a test image lies, if it still is the one that was tested."""
    try:
        source = named_source(record, image.name)
        content = None if source is None else source.content()
    except (InputError, OSError):
        return None
    return source if content is not None and hashlib.sha256(content).hexdigest() == image.sha256 else None


def named_source(record: RunRecord, name: str) -> DatasetSource | None:
    """The image that a run calls `name`, in the set that it was trained on; None if there is none.

    Raises: InputError if the set is no longer there, or cannot be read.
    """
    data = record.options()["data"]
    given = data["data_dir"]
    parts = PurePosixPath(name).parts
    if given is not None and Path(given).is_dir() and data["dataset"] is None:
        is_inside = not PurePosixPath(name).is_absolute() and ".." not in parts
        return ImageFile(name, Path(given)) if is_inside else None
    # Here, since it loads what reads all kinds of sets.
    from webui.work import labelled

    return labelled.sources(given, data["dataset"]).get(name)


@lru_cache(maxsize=16)
def _report(path: Path, changed: int) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@lru_cache(maxsize=16)
def _tested(path: Path, changed: int) -> list[TestImage]:
    return [TestImage(**one) for one in json.loads(path.read_text(encoding="utf-8"))["pictures"]]
