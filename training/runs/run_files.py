"""The files of a run directory: their names, and a dataclass with a version for each JSON file.

`ResolvedOptions` and `Provenance` are in `pipelines.run_file`, the files of few-shot runs in `training.runs.fewshot_files`, and
the evaluation of a subject's run in `training.runs.subject_files`.
No model library is imported, so that readers such as the web app stay light.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pipelines.errors import InputError
from pipelines.run_file import RESTORE, RunFile
from pipelines.run_options import STATUS
from pipelines.subject.folder_entries import FolderAccount
from training.runs.progress import PlannedPhase

METRICS = "metrics.jsonl"
SAMPLES, CHECKPOINTS, ADAPTERS, FOLDS = "samples", "checkpoints", "adapters", "folds"
STEP = "step-"
# Phases of a run.
LOADING, ENCODING, CALIBRATING, DRY_RUN = "loading", "encoding", "calibrating", "dry run"
SAMPLING, CLASS_IMAGES, CROSS_VALIDATION, TRAINING = "sampling", "drawing class images", "cross_validation", "training"
EXPORTING, COMPARING, CERTIFYING, UPLOADING = "exporting", "comparing", "certifying", "uploading"
EVALUATING = "evaluating"
FITTING, REPORTING, FINDING_SETTINGS = "fitting", "writing the report", "looking for settings that fit"
GB = 1e9
# A sample counts as a copy if its thumbnail correlates this much with a training image's. Newly generated scenes of the same
# subject stay below; slightly changed copies reach about this value.
COPY_THRESHOLD = 0.9


def step_name(step: int) -> str:
    """The name of the file or folder that belongs to `step`."""
    return f"{STEP}{step:07d}"


def step_of(path: Path) -> int:
    """The step in a name made by `step_name`."""
    return int(path.name.removeprefix(STEP).partition(".")[0])


@dataclass(frozen=True)
class RunStatus(RunFile):
    """The state of a run and its process.

    Args:
        state: "queued", "starting", "running", "done", "stopped" or "failed".
        phase: what it is doing, such as "training".
        step, total: of the training, or of a few-shot run's trials.
        plan: the phases of the run in order; None in files of earlier versions.
        share: of the whole run that is done, in [0, 1]; None before it can be estimated.
        seconds_left: an estimate of the time to the end of the run; None before it is possible.
        fold, folds: with the phase "cross_validation": the fold that is trained, from 1, and how many there are.
        pid, pid_started, heartbeat: the process that wrote the status last: id, start time and time of writing.
        processes: how many processes train.
        error: why it failed or stopped.
        resolution: side of the images in pixels.
        expected_left_out: how much of the weight change an exported LoRA is expected to leave out, as a share of its norm; None
            for an exact export.
        quantization_errors: ||Q(W) - W|| / ||W|| of the base model's quantised components, by name.
        num_trainable_parameters, suggested_step, seconds, published: of a finished run; peak_memory: of its training, in bytes.
        trial, method, shots, seed: the trial that a few-shot run is working on: its folder, adapter method, images per class
            and seed.
    """

    NAME: ClassVar[str] = STATUS
    FILE_VERSION: ClassVar[int] = 2
    RENAMED: ClassVar[Mapping[str, str]] = {"trained_numbers": "num_trainable_parameters", "member": "trial"}

    state: str | None = None
    phase: str | None = None
    step: int | None = None
    total: int | None = None
    plan: list[PlannedPhase] | None = None
    share: float | None = None
    seconds_left: float | None = None
    fold: int | None = None
    folds: int | None = None
    pid: int | None = None
    pid_started: float | None = None
    heartbeat: float | None = None
    processes: int | None = None
    error: str | None = None
    resolution: int | None = None
    expected_left_out: float | None = None
    quantization_errors: dict[str, float] | None = None
    num_trainable_parameters: int | None = None
    suggested_step: int | None = None
    seconds: float | None = None
    peak_memory: int | None = None
    published: str | None = None
    trial: str | None = None
    method: str | None = None
    shots: int | str | None = None
    seed: int | None = None

    @classmethod
    def upgrade(cls, values: dict[str, Any], version: int) -> dict[str, Any]:
        """Make the phases objects. Version 1 named the fold, and the trial of a few-shot run, within its phase."""
        values = values | {"plan": values.get("plan") and [PlannedPhase(**phase) for phase in values["plan"]]}
        if version > 1:
            return values
        phase = str(values.get("phase"))
        if fold := re.fullmatch(r"leaving out (?:image|picture) (\d+)", phase):
            return values | {"phase": CROSS_VALIDATION, "fold": int(fold[1])}
        if trial := re.fullmatch(r"fitting (\S+), (\S+) shots, seed (\d+)", phase):
            return values | {"phase": FITTING, "method": trial[1], "shots": trial[2], "seed": int(trial[3])}
        return values

    def to_json(self) -> dict[str, Any]:
        """The fields that are set, and the error."""
        return {name: value for name, value in super().to_json().items() if value is not None or name == "error"}


@dataclass(frozen=True)
class Point:
    """The loss after `step` steps, with fixed noise: on the held-out image and on images that are trained on."""

    step: int
    heldout: float
    seen: float | None = None


@dataclass(frozen=True)
class StepScores:
    """Scores of the samples of one step.

    Args:
        subject, prompt: mean similarity to the training images and to the prompts.
        copy: the highest correlation of a sample's thumbnail with a training image's.
        nearest: the highest similarity of a sample to a single training image.
        nearest_limit: the value of `nearest` from which a sample counts as a copy.
    """

    subject: float
    prompt: float
    copy: float
    nearest: float
    nearest_limit: float

    @property
    def is_copy(self) -> bool:
        """Whether a sample is nearly a training image, by either measure: each detects copies that the other misses."""
        return self.copy >= COPY_THRESHOLD or self.nearest >= self.nearest_limit

    @property
    def copy_summary(self) -> str:
        """The two measures of copying and their limits, for people."""
        nearest = f"nearest image {self.nearest:.3f} (limit {self.nearest_limit:.3f})"
        return f"{nearest}, nearest thumbnail {self.copy:.3f} (limit {COPY_THRESHOLD:.3f})"


@dataclass(frozen=True)
class Suggestion(RunFile):
    """The recommended step.

    Args:
        step: the recommended step.
        last: the last step of the training.
        reasons: the reason as sentences, the most important one first, then the figures behind it.
        warnings: sentences about overfitting and the like.
        curve: the held-out loss.
        scores: of the samples, by step, 0 being the base model.
        adapter: folder of the recommended step's adapter within the run; None if it was not saved.
    """

    NAME: ClassVar[str] = "suggestion.json"
    FILE_VERSION: ClassVar[int] = 2

    step: int
    last: int
    reasons: list[str]
    warnings: list[str]
    curve: list[Point] = field(default_factory=list)
    scores: dict[int, StepScores] = field(default_factory=dict)
    adapter: str | None = None

    @property
    def why(self) -> str:
        """All reasons as one text."""
        return " ".join(self.reasons)

    @classmethod
    def upgrade(cls, values: dict[str, Any], version: int) -> dict[str, Any]:
        """Version 1 had one text, `why`, in place of `reasons`."""
        if version == 1 and "why" in values:
            values = values | {"reasons": [values["why"]]}
        points = [Point(**point) for point in values.get("curve", [])]
        scores = {int(step): StepScores(**each) for step, each in values.get("scores", {}).items()}
        return values | {"curve": points, "scores": scores}


@dataclass(frozen=True)
class Certificate(RunFile):
    """The comparison with stock diffusers; differences in levels of 255.

    Args:
        passed: whether all of it holds.
        largest_difference, mean_difference: for each file, between stock diffusers' images and the trained pipeline's.
        effect, mean_effect: the largest and the mean change that the adapter makes to the base model's images.
        kohya_findings: what A1111 or ComfyUI would misread.
        problems: a sentence for each failure.
        prompts, sampling, dtype, device: how the images were generated.
        converted: files that diffusers reads only in part, and that were converted to its format before it read them.
        exact: whether all files are meant to be the adapter exactly.
        approximate: the files that hold an approximation.
    """

    NAME: ClassVar[str] = "certificate.json"

    passed: bool
    largest_difference: dict[str, float]
    mean_difference: dict[str, float]
    effect: float
    mean_effect: float
    kohya_findings: list[str]
    problems: list[str]
    prompts: list[str]
    sampling: dict[str, Any]
    dtype: str
    device: str
    converted: list[str] = field(default_factory=list)
    exact: bool = True
    approximate: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class DryRunReport(RunFile):
    """Time, memory and disk space measured by a dry run.

    Args:
        num_trainable_parameters: of the adapter.
        seconds_per_step: the median of the steps after the first.
        seconds: estimate for all steps.
        peak_memory: bytes, calibration included; on a GPU those of tensors, on the CPU those of the process.
        checkpoint: bytes of one checkpoint.
        disk: bytes of all checkpoints that exist at once, at most.
        disk_free: bytes.
        memory_limit: bytes that `peak_memory` may reach; None without a limit.
    """

    NAME: ClassVar[str] = "dry_run.json"
    FILE_VERSION: ClassVar[int] = 2
    RENAMED: ClassVar[Mapping[str, str]] = {"trained_numbers": "num_trainable_parameters"}

    num_trainable_parameters: int
    seconds_per_step: float
    seconds: float
    peak_memory: int
    checkpoint: int
    disk: int
    disk_free: int
    memory_limit: int | None

    def summary(self) -> str:
        """Two lines for people."""
        return (
            f"Dry run: {self.num_trainable_parameters:,} trainable parameters, {self.seconds_per_step:.3g} s per step, about "
            f"{self.seconds / 60:.1f} min for all steps.\nPeak memory {self.peak_memory / GB:.2f} GB; checkpoints need up to "
            f"{self.disk / GB:.3f} GB, {self.disk_free / GB:.1f} GB are free."
        )


@dataclass(frozen=True)
class FallbackStep:
    """Settings that were tried to make a run fit in memory.

    Args:
        flags: the settings by name, besides the flags given.
        fits: whether the dry run with them fitted.
        peak_memory: bytes; None if the dry run did not finish.
        seconds_per_step: likewise.
        reason: the error, if it does not fit.
    """

    flags: dict[str, Any]
    fits: bool
    peak_memory: int | None = None
    seconds_per_step: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class MemoryFallback(RunFile):
    """The settings tried, in order; the last one fits, if any does."""

    NAME: ClassVar[str] = "ladder.json"
    FILE_VERSION: ClassVar[int] = 2

    attempts: list[FallbackStep]

    @classmethod
    def object_of(cls, content: Any) -> Mapping[str, Any]:
        """Version 1 was the list of attempts itself."""
        return {"attempts": content} if isinstance(content, list) else super().object_of(content)

    @classmethod
    def upgrade(cls, values: dict[str, Any], version: int) -> dict[str, Any]:
        """Make the attempts objects."""
        return values | {"attempts": [FallbackStep(**attempt) for attempt in values["attempts"]]}


@dataclass(frozen=True)
class ImageChecks(RunFile):
    """What was found in the images of a run and in its folders; see `pipelines.subject.image_checks.ImageCheckReport`.

    Args:
        pictures: path, size, findings and verdict of each image.
        findings: on the images as a set.
        folder, class_folder: every file of the folders with its use; None without a folder.
        long_prompts: prompts that the tokenizers cut.
    """

    NAME: ClassVar[str] = "photos.json"

    pictures: list[dict[str, Any]] = field(default_factory=list)
    findings: list[dict[str, Any]] = field(default_factory=list)
    folder: FolderAccount | None = None
    class_folder: FolderAccount | None = None
    long_prompts: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def upgrade(cls, values: dict[str, Any], version: int) -> dict[str, Any]:
        """Make the accounts of the folders objects."""
        folders = {name: values.get(name) for name in ("folder", "class_folder")}
        return values | {name: content and FolderAccount.from_json(content) for name, content in folders.items()}

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        folders = {"folder": self.folder, "class_folder": self.class_folder}
        return super().to_json() | {name: account and account.to_json() for name, account in folders.items()}


@dataclass(frozen=True)
class Launch(RunFile):
    """How the web app started a run.

    Args:
        task: "subject", "classify" or "arena".
        command: the words of the command.
        created: when, in seconds since the epoch.
        options: those that differ from the defaults, by group.
    """

    NAME: ClassVar[str] = "launch.json"

    task: str | None = None
    command: list[str] = field(default_factory=list)
    created: float | None = None
    options: dict[str, dict[str, Any]] | None = None


@dataclass(frozen=True)
class LoggedMetrics:
    """One line of metrics.jsonl; in the file, the values stand beside step and time.

    Args:
        step: of the training.
        time: when it was written, in seconds since the epoch.
        values: of the metrics, by name.
    """

    step: int
    time: float
    values: dict[str, float]

    def line(self) -> str:
        """The line with its line break."""
        return json.dumps({"step": self.step, "time": self.time, **self.values}) + "\n"

    @classmethod
    def from_line(cls, line: str) -> LoggedMetrics:
        """Read a line.

        Raises: InputError if it is not an object with a step.
        """
        try:
            values = json.loads(line)
            return cls(values.pop("step"), values.pop("time", 0.0), values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{METRICS} has a line that cannot be read: {line.strip()[:80]!r} ({error}). {RESTORE}") from error


def read_metrics(folder: Path) -> list[LoggedMetrics]:
    """The lines of metrics.jsonl in `folder`, oldest first, without a last line that a crash cut short.

    Raises: InputError if a line cannot be read.
    """
    try:
        text = (folder / METRICS).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    return [LoggedMetrics.from_line(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
