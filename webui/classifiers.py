"""The classifier of a finished run: its accuracies and test images, its downloads, and training again with corrected images."""

from __future__ import annotations

import hashlib
import json
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd

from pipelines.errors import InputError
from pipelines.fewshot.sources import DatasetSource, ImageFile
from pipelines.methods import method_names
from pipelines.tables import harmless
from training.options.fewshot import ALL
from training.options.values import merged, without
from training.runs.fewshot_files import FewShotReport, ImagePrediction, MethodSummary, PredictionFile, TrialResult
from training.runs.naming import PIXELS
from training.runs.record import RunRecord
from training.runs.snapshot import read_cached
from webui import launching
from webui.datasets import Dataset
from webui.inference_worker import WORKER
from webui.labelled_datasets import dataset_in, uploaded_classes, uploaded_dataset
from webui.uploads import Added, add_groups, add_images
from webui.workspace import Workspace

RUNNERS_UP = 3
COMPACT, FULL, LORA, TABLE, CARD = "compact", "full", "lora", "table", "card"
DOWNLOADS = {
    COMPACT: "Adapter, compact",
    FULL: "Adapter, full",
    LORA: "LoRA for other programs",
    TABLE: "Table of predictions (CSV)",
    CARD: "Report card",
}
# Options that depend on the images of one run; a run with other images does not take them over.
DATASET_OPTIONS = ("data_dir", "dataset", "class_names", "shots", "test_share")
GONE = "The training images of this run are gone. Choose or upload images under Images and train again."


def share(value: float) -> str:
    """`value` in percent, such as 69%; 100% only if it is exactly 1."""
    percent = f"{value:.0%}"
    return "over 99%" if percent == "100%" and value < 1 else percent


@dataclass(frozen=True)
class Result:
    """One method of a finished run.

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
        """The class names."""
        return self.report.dataset.classes

    @property
    def folder(self) -> Path:
        """The folder of the method's files."""
        return self.record.path / self.trial.folder

    @property
    def chance(self) -> float:
        """The accuracy of random guessing."""
        return 1 / len(self.classes)

    @property
    def same_split(self) -> list[TrialResult]:
        """All trials on the same split."""
        return list(self.report.same_split(self.trial))

    @property
    def best(self) -> TrialResult:
        """The most accurate method on the same split."""
        return _most_accurate(self.same_split)

    @property
    def best_adapter(self) -> TrialResult | None:
        """The most accurate adapter on the same split; None if no adapter was trained."""
        return _most_accurate(one for one in self.same_split if one.method in method_names())

    @property
    def best_with_model(self) -> TrialResult | None:
        """The most accurate method on the same split but raw pixels; None if that is the only one."""
        return _most_accurate(one for one in self.same_split if one.method != PIXELS)

    def beside(self, method: str) -> TrialResult | None:
        """The trial of another method on the same split; None if it was not run."""
        return self.report.on_same_split(self.trial, method)

    @property
    def ranking(self) -> list[MethodSummary]:
        """All methods with the same number of images, averaged over the splits, the most accurate first."""
        summaries = (one for one in self.report.summary if one.shots == self.trial.shots)
        return sorted(summaries, key=lambda one: (-one.top1.value, one.method == PIXELS, one.num_trainable_parameters))

    @cached_property
    def tested(self) -> Sequence[ImagePrediction]:
        """The predictions for all test images; empty for runs of earlier versions, which did not record them."""
        content = read_cached(PredictionFile, self.folder)
        return () if content is None else content.images

    @property
    def mistakes(self) -> list[ImagePrediction]:
        """The wrong predictions, highest confidence first."""
        return sorted((one for one in self.tested if not one.is_right), key=lambda one: -one.confidence)

    def in_cell(self, true: int, predicted: int) -> list[ImagePrediction]:
        """The test images of class `true` predicted as `predicted`, highest confidence first."""
        matches = (one for one in self.tested if (one.true, one.predicted) == (true, predicted))
        return sorted(matches, key=lambda one: -one.confidence)


def _most_accurate(trials: Iterable[TrialResult]) -> TrialResult | None:
    """The most accurate trial; of several, one that uses the model, with the fewest parameters."""
    return max(trials, key=lambda one: (one.test.top1.value, one.method != PIXELS, -one.num_trainable_parameters), default=None)


def result_of(record: RunRecord, trial: str | None = None) -> Result | None:
    """The result of a run; None before it is done.

    Args:
        trial: the folder of a trial in the report; any other value means the most accurate trial on the split of the
            representative one.
    Raises: InputError if the report names no trial, or files outside of the run.
    """
    report = read_cached(FewShotReport, record.path)
    if report is None:
        return None
    chosen = report.trial_in(trial) or Result(record, report, report.representative).best
    if not (record.path / chosen.folder).resolve().is_relative_to(record.path.resolve()):
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
    if given is not None and Path(given).is_dir() and data["dataset"] is None:
        is_inside = not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
        return ImageFile(name, Path(given)) if is_inside else None
    return WORKER.call("dataset_image", given, data["dataset"], name)


def downloads(result: Result) -> Mapping[str, Path]:
    """The downloadable files of a result, by the keys of `DOWNLOADS`; cached until the run changes."""
    return _made(result.record.path.absolute(), result.trial.folder, result.folder.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _made(run: Path, trial: str, changed: int) -> Mapping[str, Path]:
    result = result_of(RunRecord(run), trial)
    folder, stem = Path(tempfile.mkdtemp(dir=_folder())), f"{run.name}-{result.trial.method}"
    sources = {name: result.folder / "adapter" / name for name in (COMPACT, FULL)}
    if trial == result.report.classifier:
        sources[LORA] = run / "export" / "lora"
    files = {name: _zipped(path, folder / f"{stem}-{name}.zip") for name, path in sources.items() if path.is_dir()}
    if result.tested:
        files[TABLE] = write_table(tested_rows(result), folder / f"{stem}-predictions.csv")
    if (run / "README.md").is_file():
        files[CARD] = _zipped(run, folder / f"{run.name}-report.zip", ("README.md", "report.json", "figures/*.png"))
    return files


@lru_cache(maxsize=1)
def _folder() -> str:
    """A temporary folder of this process that only its user can read."""
    return tempfile.mkdtemp(prefix="nora-vision-")


def _zipped(folder: Path, path: Path, patterns: Sequence[str] = ("**/*",)) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(file for pattern in patterns for file in folder.glob(pattern) if file.is_file()):
            archive.write(file, f"{path.stem}/{file.relative_to(folder).as_posix()}")
    return path


def tested_rows(result: Result) -> list[dict[str, str]]:
    """A row for each test image: true class, predicted class, probability and the runners-up."""
    rows = []
    for one in result.tested:
        row = {"image": one.name, "true class": result.classes[one.true], "predicted class": result.classes[one.predicted]}
        row |= {"correct": "yes" if one.is_right else "no", "probability": f"{one.confidence:.6g}"}
        runners_up = [(result.classes[int(label)], value) for label, value in one.top[1:RUNNERS_UP]]
        rows.append(row | _ranked(runners_up, 2))
    return rows


def predicted_table(rows: Sequence[Mapping[str, Any]]) -> Path | None:
    """A new CSV file with a row for each image that was classified; None if none was."""
    table = [{"image": row["image"]} | _ranked(row["top"], 1) for row in rows if "class" in row]
    return write_table(table, Path(tempfile.mkdtemp(dir=_folder())) / "predictions.csv") if table else None


def _ranked(likely: Iterable[tuple[str, float]], first: int) -> dict[str, str]:
    cells = {}
    for rank, (name, value) in enumerate(likely, first):
        cells |= {f"class {rank}": name, f"probability {rank}": f"{value:.6g}"}
    return cells


def write_table(rows: Sequence[Mapping[str, str]], path: Path) -> Path:
    """Write a CSV file whose cells a spreadsheet does not evaluate as formulas; returns `path`."""
    # File names need not be valid UTF-8.
    pd.DataFrame(rows).map(harmless).to_csv(path, index=False, errors="backslashreplace")
    return path


def train_again(workspace: Workspace, record: RunRecord, files: Mapping[str, Sequence[Path]]) -> tuple[str, str]:
    """Add images labelled by the user to the training images of a run, and start a run with the same options.

    The images are added to the uploaded dataset that the run used. Examples and local folders are never changed: the images
    that the run used are copied to a new dataset first. The new run keeps the test images of the old one and trains on all
    others.

    Args:
        files: the corrected images by the name of their class.
    Returns: the ids of the dataset and of the run.
    Raises: InputError if the run's images are gone, or no image was corrected.
    """
    if not any(files.values()):
        raise InputError("No image was corrected. Choose the true class below an image that was classified wrongly.")
    result = result_of(record)
    if result is None:
        raise InputError("This run is not done yet. Wait until it is.")
    set_id = dataset_in(workspace, record.options().get("data", {}).get("data_dir"))
    dataset = uploaded_dataset(workspace, set_id) or _copied(workspace, result)
    folders, added = {one.name: one.folder for one in dataset.content().classes}, Added()
    if missing := [name for name in files if name not in folders]:
        raise InputError(f"The class {missing[0]} is no longer in the dataset. Add it again under Images.")
    add_groups(dataset, [(folders[name], "train", paths) for name, paths in files.items()], added)
    if not added.names:
        raise InputError(f"None of the images could be added: {added.refused[0]}")
    options, all_images = launching.duplicate(workspace, record.path.name), {"data": {"shots": [ALL]}}
    values = uploaded_classes(dataset).fitted(merged(without(options, {"data": DATASET_OPTIONS}), all_images), all_images)
    return dataset.folder.name, launching.start(workspace, "classify", values)


def _copied(workspace: Workspace, result: Result) -> Dataset:
    """A new dataset with the images that a run used and the same test split. Raises: InputError if they are gone."""
    path = result.record.path / "splits" / f"{result.trial.shots}-shots-seed-{result.trial.seed}.json"
    split = json.loads(path.read_text(encoding="utf-8"))
    names, dataset = dict(zip(split["keys"], result.classes, strict=False)), Dataset(workspace.new_image_set())
    try:
        for part in ("test", "train", "val"):
            for (_, key), images in groupby(sorted(split[part], key=itemgetter(1)), itemgetter(1, 2)):
                sources = [named_source(result.record, name) for name, *_ in images]
                folder = dataset.add_class(names.get(key, key))
                added = add_images(dataset, list(filter(None, sources)), folder, "test" if part == "test" else "train")
                if added.refused or None in sources:
                    raise InputError(next(iter(added.refused), ""))
    except (InputError, OSError) as error:
        dataset.delete()
        raise InputError(f"{GONE} {error}".strip()) from error
    return dataset
