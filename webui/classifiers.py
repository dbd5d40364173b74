"""The result of a classifier run, read from its files: accuracies, test images, sentences computed from them, and downloads."""

from __future__ import annotations

import csv
import hashlib
import io
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath

from pipelines.built_in import BUILT_IN_CLIP_NAME
from pipelines.errors import InputError
from pipelines.fewshot.sources import DatasetSource, ImageFile
from pipelines.methods import method_names
from pipelines.tables import harmless
from training.runs.fewshot_files import FewShotReport, ImagePrediction, PredictionFile, TrialResult
from training.runs.naming import BASELINES, PIXELS, PROBE, ZERO_SHOT, method_name
from training.runs.record import RunRecord
from training.runs.snapshot import read_cached
from webui import runs
from webui.inference_worker import WORKER
from webui.runs import RunView, views
from webui.workspace import Workspace

# Raw pixels with this accuracy mean that the images of a class are alike.
ACCURATE_PIXELS = 0.7
# A wider 95% interval makes the accuracy a rough estimate; from MANY methods on, the best of them was lucky, too.
ROUGH, MANY = 0.2, 5
RUNNERS_UP = 3
COMPACT, FULL, LORA, TABLE, CARD = "compact", "full", "lora", "table", "card"
DOWNLOADS = {
    COMPACT: "Adapter, compact",
    FULL: "Adapter, full",
    LORA: "LoRA for other programs",
    TABLE: "Table of predictions (CSV)",
    CARD: "Report card",
}


def share(value: float) -> str:
    """`value` in percent, such as 69%; 100% only if it is exactly 1."""
    percent = f"{value:.0%}"
    return "over 99%" if percent == "100%" and value < 1 else percent


def is_clearly_better(one: TrialResult, other: TrialResult) -> bool:
    """Whether the 95% interval of one accuracy lies above that of another."""
    return one.test.top1.low > other.test.top1.high


def classifier_views(workspace: Workspace) -> list[RunView]:
    """All runs that train classifiers, newest first."""
    return [view for view in views(workspace) if view.task == "classify"]


def view_of(workspace: Workspace, run_id: str | None) -> RunView | None:
    """The classifier with this id; None if there is none."""
    view = runs.view_of(workspace, run_id)
    return view if view is not None and view.task == "classify" else None


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
    def best(self) -> TrialResult:
        """The most accurate method on the same split; of several, one that uses the model, with the fewest parameters."""
        return max(self.same_split(), key=lambda one: (one.test.top1.value, one.method != PIXELS, -one.num_trainable_parameters))

    def beside(self, method: str) -> TrialResult | None:
        """The trial of another method on the same split; None if it was not run."""
        return self.report.on_same_split(self.trial, method)

    def same_split(self) -> Iterator[TrialResult]:
        """All trials on the same split."""
        return self.report.same_split(self.trial)

    @cached_property
    def tested(self) -> Sequence[ImagePrediction]:
        """The predictions for all test images; empty for runs of earlier versions, which did not record them."""
        path = self.folder / PredictionFile.NAME
        return _predictions(self.folder, path.stat().st_mtime_ns) if path.is_file() else []

    def mistakes(self) -> list[ImagePrediction]:
        """The wrong predictions, highest confidence first."""
        return sorted((one for one in self.tested if not one.is_right), key=lambda one: -one.confidence)

    def untested(self) -> list[str]:
        """The classes without test images."""
        return [name for name, row in zip(self.classes, self.trial.test.confusion, strict=True) if not sum(row)]

    def in_cell(self, true: int, predicted: int) -> list[ImagePrediction]:
        """The test images of class `true` predicted as `predicted`, highest confidence first."""
        matches = (one for one in self.tested if (one.true, one.predicted) == (true, predicted))
        return sorted(matches, key=lambda one: -one.confidence)


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


@lru_cache(maxsize=16)
def _predictions(folder: Path, changed: int) -> Sequence[ImagePrediction]:
    return PredictionFile.read(folder).images


def headline(result: Result) -> tuple[str, str, str]:
    """The accuracy, a sentence with its interval, and the accuracies of the baselines and of random guessing."""
    tested, best = result.trial.test, result.best
    which = f"the best of {len(list(result.same_split()))} methods, " if result.trial == best else ""
    text = (
        f"test accuracy of {which}{method_name(result.trial.method)}: {round(tested.top1.value * tested.count)} of "
        f"{tested.count} test images are classified correctly (95% interval: {share(tested.top1.low)} to "
        f"{share(tested.top1.high)}). They were not used for training."
    )
    others = [(method, result.beside(method)) for method in (ZERO_SHOT, PROBE, PIXELS) if method != result.trial.method]
    beside = [f"{method_name(method)} {share(one.test.top1.value)}" for method, one in others if one is not None]
    beside.append(f"random guessing {share(result.chance)}")
    return share(tested.top1.value), text, f"On the same images: {', '.join(beside)}."


def findings(result: Result) -> list[tuple[bool, str]]:
    """What the accuracies mean and what to do, as pairs of whether it is a warning, and a sentence."""
    trial, best, count = result.trial, result.best, len(list(result.same_split()))
    sentences = [(True, _choose(trial, best))] if best.test.top1.value > trial.test.top1.value else []
    sentences += [*_on_the_model(result), *_on_the_probe(result), *_on_pixels(result)]
    if trial.scale_reason:
        sentences.append((True, f"The adapter's scale was lowered because training reduced the accuracy. {trial.scale_reason}"))
    if untested := result.untested():
        sentences.append((True, f"No test images for {', '.join(untested)}, so the accuracy says nothing about it."))
    if trial.test.top1.high - trial.test.top1.low > ROUGH:
        sentences.append((False, f"{trial.test.count} test images allow only a rough estimate. Add images to narrow it."))
    if count >= MANY:
        sentences.append((False, f"The best of {count} methods is chosen on the test images. Expect slightly less on new ones."))
    return sentences


def _choose(trial: TrialResult, best: TrialResult) -> str:
    clearly = "clearly" if is_clearly_better(best, trial) else "slightly"
    return f"{method_name(best.method)} is {clearly} better on these images ({share(best.test.top1.value)}). Choose it above."


def _on_the_model(result: Result) -> list[tuple[bool, str]]:
    """Whether the base model knows the classes by their names, and whether training helps."""
    zero_shot, best = result.beside(ZERO_SHOT), result.best
    if best.test.top1.low <= result.chance:
        tip = "Check that every image has the right label and shows its class large. More images per class may help."
        return [(True, f"No method is better than random guessing ({share(result.chance)}). {tip}{_larger_model(result)}")]
    if zero_shot is None:
        return []
    before, after = share(zero_shot.test.top1.value), f"{share(best.test.top1.value)} with {method_name(best.method)}"
    if zero_shot.test.top1.low <= result.chance:
        text = (
            f"The base model does not know these class names: zero-shot, which only reads them, reaches {before}, and random "
            f"guessing {share(result.chance)}. All else was learned from your images, so add more of them.{_larger_model(result)}"
        )
        return [(True, text)]
    if best is zero_shot:
        return [(False, f"The base model knows these classes, and training did not improve on its {before}. Add more images.")]
    if is_clearly_better(best, zero_shot):
        return [(False, f"Training helps: {before} from the class names alone, {after}.")]
    why = "The difference is within the uncertainty of this test; more images would show whether training helps."
    return [(False, f"The base model knows these classes: {before} from the class names alone, {after}. {why}")]


def _larger_model(result: Result) -> str:
    """The advice to use a full CLIP in place of the built-in one."""
    if result.report.model != BUILT_IN_CLIP_NAME:
        return ""
    return (
        " The built-in model is tiny: it knows 200 kinds of objects and simple shapes, at 64 pixels. A full CLIP, such as "
        "ViT-B-16, knows far more: choose it as base model in the expert settings."
    )


def _on_the_probe(result: Result) -> list[tuple[bool, str]]:
    """Whether the linear probe is better than every adapter."""
    probe, adapters = result.beside(PROBE), [one for one in result.same_split() if one.method in method_names()]
    best = max(adapters, key=lambda one: one.test.top1.value, default=None)
    if probe is None or best is None or probe.test.top1.value <= best.test.top1.value:
        return []
    clearly = "clearly" if is_clearly_better(probe, best) else "slightly"
    figures = f"{method_name(best.method)} ({share(probe.test.top1.value)} and {share(best.test.top1.value)})"
    reason = "It ignores the class names and fits the image features directly. Use it, or train the adapter for more steps."
    return [(True, f"The linear probe is {clearly} better than the best adapter, {figures}. {reason}")]


def _on_pixels(result: Result) -> list[tuple[bool, str]]:
    """Whether any method needs the model, compared with raw pixels."""
    pixels, others = result.beside(PIXELS), [one for one in result.same_split() if one.method != PIXELS]
    if pixels is None:
        return [(True, "The raw-pixel control was not run, so it is unknown whether these images need a model at all.")]
    best = max(others, key=lambda one: one.test.top1.value, default=pixels)
    if best.test.top1.low <= result.chance or is_clearly_better(best, pixels):
        return []
    figures = f"{share(pixels.test.top1.value)} without any model, {share(best.test.top1.value)} with {method_name(best.method)}"
    if pixels.test.top1.value < ACCURATE_PIXELS:
        return [(True, f"The model adds little: {figures}. Both are low, so the classes are hard to tell apart.")]
    text = (
        f"The images within a class are so alike that this test cannot show whether the model helps: {figures}. Do not expect "
        "the same accuracy on images taken under other conditions."
    )
    return [(True, text)]


def confused_with(result: Result, label: int) -> str:
    """The class that images of class `label` are most often mistaken for, as a hint; empty without mistakes."""
    wrong = [(count, -other) for other, count in enumerate(result.trial.test.confusion[label]) if other != label and count]
    return f"mostly mistaken for {result.classes[-max(wrong)[1]]}" if wrong else ""


@dataclass(frozen=True)
class MethodRow:
    """A row of the comparison of methods.

    Args:
        name, hint: of the method.
        is_best, is_shown: whether it is the most accurate, and whether the page shows its figures.
        cells: accuracy, interval, trainable parameters, file size and training time.
        reason: why it failed; empty if it did not.
    """

    name: str
    hint: str = ""
    is_best: bool = False
    is_shown: bool = False
    cells: tuple[str, ...] = ()
    reason: str = ""


def method_rows(result: Result) -> list[MethodRow]:
    """All methods, averaged over the splits: the most accurate first, those that failed last."""
    summaries = [one for one in result.report.summary if one.shots == result.trial.shots]
    summaries.sort(key=lambda one: (-one.top1.value, one.method == PIXELS, one.num_trainable_parameters))
    rows = []
    for one in summaries:
        cells = (
            share(one.top1.value),
            f"{share(max(0.0, one.top1.low))} to {share(min(1.0, one.top1.high))}",
            f"{one.num_trainable_parameters:,.0f}",
            f"{one.stored_bytes / 1e6:.1f} MB" if one.stored_bytes >= 1e6 else f"{one.stored_bytes / 1e3:.1f} KB",
            f"{one.seconds:.0f} s",
        )
        hint = BASELINES.get(one.method, ("", ""))[1]
        rows.append(MethodRow(method_name(one.method), hint, one is summaries[0], one.method == result.trial.method, cells))
    return rows + [MethodRow(method_name(name), reason=reason) for name, reason in result.report.failed.items()]


def downloads(result: Result) -> dict[str, Path]:
    """The downloadable files of a result, by the keys of `DOWNLOADS`; cached until the run changes."""
    return dict(_made(result.record.path.absolute(), result.trial.folder, result.folder.stat().st_mtime_ns))


@lru_cache(maxsize=64)
def _made(run: Path, trial: str, changed: int) -> tuple[tuple[str, Path], ...]:
    result = result_of(RunRecord(run), trial)
    stem = f"{run.name}-{result.trial.method}"
    folder = Path(tempfile.mkdtemp(dir=_folder()))
    files: dict[str, Path] = {}
    exported = run / "export" / "lora" if result.trial.folder == result.report.classifier else None
    adapter = result.folder / "adapter"
    for name, source in ((COMPACT, adapter / COMPACT), (FULL, adapter / FULL), (LORA, exported)):
        if source is not None and source.is_dir():
            files[name] = _zipped(source, folder / f"{stem}-{name}.zip")
    if result.tested:
        files[TABLE] = write_table(tested_rows(result), folder / f"{stem}-predictions.csv")
    if (run / "README.md").is_file():
        files[CARD] = _zipped(run, folder / f"{run.name}-report.zip", ("README.md", "report.json", "figures/*.png"))
    return tuple(files.items())


@lru_cache(maxsize=1)
def _folder() -> str:
    """A temporary folder of this process that only its user can read."""
    return tempfile.mkdtemp(prefix="nora-vision-")


def _zipped(folder: Path, path: Path, patterns: Sequence[str] = ("**/*",)) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(file for pattern in patterns for file in folder.glob(pattern) if file.is_file()):
            archive.write(file, f"{path.stem}/{file.relative_to(folder).as_posix()}")
    return path


def tested_rows(result: Result) -> list[list[str]]:
    """A header, and a row for each test image: true class, predicted class, probability and the runners-up."""
    names, count = result.classes, min(RUNNERS_UP, len(result.classes))
    head = [f"{what} {rank}" for rank in range(2, count + 1) for what in ("class", "probability")]
    rows = [["image", "true class", "predicted class", "correct", "probability", *head]]
    for one in result.tested:
        others = [word for rank, value in one.top[1:count] for word in (names[int(rank)], f"{value:.6g}")]
        right = "yes" if one.is_right else "no"
        rows.append([one.name, names[one.true], names[one.predicted], right, f"{one.confidence:.6g}", *others])
    return rows


def write_table(rows: Sequence[Sequence[str]], path: Path | None = None) -> Path:
    """Write a CSV file whose cells a spreadsheet does not evaluate as formulas; by default a new one for download."""
    path = path or Path(tempfile.mkdtemp(dir=_folder())) / "predictions.csv"
    stream = io.StringIO(newline="")
    csv.writer(stream).writerows([map(harmless, row) for row in rows])
    # File names need not be valid UTF-8.
    path.write_text(stream.getvalue(), encoding="utf-8", errors="backslashreplace", newline="")
    return path
