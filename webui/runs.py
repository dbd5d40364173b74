"""A run as the page shows it: its name and face, its state in words, its progress and its key figures."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean

from pipelines.errors import InputError
from pipelines.fewshot.metric_values import Interval
from pipelines.image_formats import IMAGE_SUFFIXES
from pipelines.methods import DEFAULT
from training.options.data import SAMPLE_PROMPT, SAMPLE_SUBJECT
from training.runs import naming
from training.runs import run_files as phases
from training.runs.fewshot_files import FewShotReport, MethodSummary
from training.runs.record import newest_step
from training.runs.run_files import RunStatus, Suggestion
from training.runs.snapshot import Revision, RunSnapshot, revision
from training.subject.measured import subject_images
from webui.workspace import Workspace

Point = tuple[float, float]
# The title of each phase, and the part of the plan that it belongs to.
PHASES = {
    phases.LOADING: ("Loading the model", "Preparing"),
    phases.ENCODING: ("Encoding the photos into latents", "Preparing"),
    phases.SAMPLING: ("Generating images before the training", "Preparing"),
    phases.CLASS_IMAGES: ("Generating class images for prior preservation", "Preparing"),
    phases.DRY_RUN: ("Dry run: three steps, to measure time and memory", "Preparing"),
    phases.CALIBRATING: ("Calibrating: measuring the model's activations on your photos, to initialise the adapter", "Preparing"),
    phases.FINDING_SETTINGS: ("Memory fallback: looking for settings that fit into memory", "Preparing"),
    phases.CROSS_VALIDATION: ("Cross-validation", "Cross-validation"),
    phases.TRAINING: ("Training", "Training"),
    phases.EXPORTING: ("Exporting the adapter in four formats", "Export"),
    phases.COMPARING: ("Scoring the checkpoints: generating images with each", "Scoring"),
    phases.EVALUATING: ("Evaluating: comparing the adapter with the base model", "Evaluation"),
    phases.CERTIFYING: ("Checking the exported files with plain diffusers", "Certificate"),
    phases.UPLOADING: ("Uploading", "Upload"),
    phases.FITTING: ("Training", "Training"),
    phases.REPORTING: ("Writing the report", "Report"),
}
STARTING = "Starting: loading the libraries takes a few seconds"
# Errors whose messages are written for users.
PLAIN = frozenset({"InputError", "DoesNotFitError", "NotFiniteError", "CertificateError"})
LONGEST_ERROR = 400
# What a run counts.
NOUNS = {"subject": "step", "classify": "training", "arena": "run"}
# The displayed training loss is the mean over this many steps.
LAST_STEPS = 16


@dataclass(frozen=True)
class RunView(RunSnapshot):
    """A snapshot of one run in words, created for each request."""

    @property
    def method(self) -> str:
        """The display name of the adapter method, or of all methods of a classifier or an arena."""
        if self.task == "subject":
            return naming.method_name(self.chosen("adapter", "method") or DEFAULT)
        methods = self.chosen("method", "methods" if self.task == "arena" else "method")
        return ", ".join(map(naming.variant_title, methods)) if isinstance(methods, list) else ""

    @property
    def prompt(self) -> str:
        """The instance prompt of a subject run."""
        return str(self.chosen("data", "instance_prompt") or SAMPLE_PROMPT)

    @property
    def when(self) -> str:
        """When it was started."""
        return time.strftime("%d %b %H:%M", time.localtime(self.created))

    @property
    def label(self) -> str:
        """Its title in selectors, where several runs have the same."""
        return " · ".join(filter(None, (self.title, self.method if self.task == "subject" else "", self.when)))

    @property
    def face(self) -> Path | None:
        """The image that represents it: its first training image; None if there is none."""
        images = subject_images(self.record)
        if images:
            return images[0].path
        if self.task == "subject":
            return _first_image(Path(self.chosen("data", "instance_data_dir") or SAMPLE_SUBJECT))
        folder = self.chosen("data", "subjects_dir" if self.task == "arena" else "data_dir")
        figures = sorted((self.record.path / "figures").glob("*.png"))
        return (_first_image(Path(folder)) if folder else None) or next(iter(figures), None)

    def file_stem(self, step: int) -> str:
        """The name of a downloaded adapter's file without its suffix."""
        return naming.file_stem(self.title, step)

    @property
    def plan(self) -> list[tuple[str, str]]:
        """The parts of its plan in order, and whether each is "done", "now" or "later"; empty if it is not known."""
        names = list(dict.fromkeys(PHASES[phase.name][1] for phase in self.status.plan or () if phase.name in PHASES))
        now = PHASES.get(str(self.status.phase), ("", ""))[1]
        if self.state != "running" or now not in names or self.task != "subject":
            return []
        at = names.index(now)
        return [(name, "done" if i < at else "now" if i == at else "later") for i, name in enumerate(names)]

    @property
    def share(self) -> float | None:
        """The share of the whole run that is done; None if it is unknown."""
        if self.state == "done":
            return 1.0
        return None if self.state in ("queued", "starting") else self.status.share

    @property
    def time_left(self) -> str:
        """The time to its end; empty if it is not known."""
        left, heartbeat = self.status.seconds_left, self.status.heartbeat
        if self.state != "running" or left is None:
            return ""
        return f"{duration(max(0.0, left - (time.time() - (heartbeat or 0.0))))} left"

    @property
    def progress(self) -> str:
        """The share, the steps and the time left, as text."""
        step, total = self.status.step, self.status.total
        is_counted = self.task != "subject" or self.status.phase == phases.TRAINING
        steps = f"{NOUNS[self.task]} {step} of {total}" if total and is_counted else ""
        share = "" if self.share is None else f"{self.share:.0%}"
        return " · ".join(filter(None, (share, steps, self.time_left)))

    @property
    def headline(self) -> str:
        """Its state in words."""
        done, total, seconds = max(self.status.step or 0, self.saved), self.status.total, self.status.seconds
        has_steps = done and total and self.task != "classify"
        past = f"{done} of {total} {NOUNS[self.task]}s were done" if has_steps else "No training step was done"
        sentences = {
            "queued": in_queue(self.runs_before) if self.runs_before else STARTING,
            "starting": STARTING,
            "running": phase_title(self.status),
            "done": "Done" if seconds is None else f"Done in {duration(seconds)}",
        }
        return sentences.get(self.state, past)

    @property
    def saved(self) -> int:
        """The step of its newest checkpoint; 0 without one."""
        return newest_step(self.record.checkpoints)

    @property
    def ending(self) -> str:
        """Why it ended and what to do; empty unless it was interrupted, stopped or has failed."""
        steps = f"Everything up to step {self.saved} is saved." if self.saved else "No checkpoint was saved."
        effect = "continues from there" if self.saved else "starts again with the same settings"
        if self.task == "arena":
            steps, effect = "Runs that have ended are not repeated.", "continues with the others"
        if self.state in ("interrupted", "stopped"):
            return f"{self.reason} {steps} Resume {effect}."
        return f"{plain_error(self.error)} {steps}" if self.state == "failed" else ""

    @property
    def sentence(self) -> str:
        """What it is doing, or why it ended, in one line."""
        doing = self.reason or self.headline.partition(":")[0]
        share = f"{self.share:.0%}" if self.state == "running" and self.share is not None else ""
        return " · ".join(filter(None, (self.title, doing, share, self.time_left)))

    @property
    def figures(self) -> list[tuple[str, str]]:
        """Its key figures as pairs of name and value."""
        rows = _of_subject(self) if self.task == "subject" else _of_several(self)
        return [(name, value) for name, value in rows if value]


def views(workspace: Workspace) -> list[RunView]:
    """All runs of the workspace, newest first."""
    return [RunView(workspace.run(run_id)) for run_id in workspace.run_ids()]


def view_of(workspace: Workspace, run_id: str | None) -> RunView | None:
    """The run `run_id`; None if there is none or it was deleted."""
    try:
        return RunView(workspace.run(run_id)) if run_id else None
    except InputError:
        return None


def _first_image(folder: Path) -> Path | None:
    """The first image in `folder`, or in its first subfolder with one."""
    changed = revision(folder)
    return None if changed is None else _first_image_in(folder, changed)


@lru_cache(maxsize=1024)
def _first_image_in(folder: Path, changed: Revision) -> Path | None:
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    images = (path for path in entries if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    return next(images, None) or next(filter(None, (_first_image(path) for path in entries if path.is_dir())), None)


def in_queue(ahead: int) -> str:
    """The position in the queue in words."""
    return f"{ahead} {'run' if ahead == 1 else 'runs'} ahead in the queue"


def phase_title(status: RunStatus) -> str:
    """The title of the phase in status.json."""
    phase = str(status.phase or phases.LOADING)
    if phase == phases.CROSS_VALIDATION and status.fold is not None:
        of_all = "" if status.folds is None else f" of {status.folds}"
        return f"Cross-validation, fold {status.fold}{of_all}: a short training without photo {status.fold}"
    if phase == phases.FITTING and status.method is not None:
        return f"Training {naming.method_name(status.method)}, {status.shots} images per class, seed {status.seed}"
    return PHASES.get(phase, (phase, ""))[0]


def plain_error(error: str | None) -> str:
    """What went wrong and what to do, from an error "Kind: message"."""
    kind, _, message = (error or "").partition(": ")
    if kind == "DiskFullError":
        return "The disk is full. Free some space, then press Resume."
    if "out of memory" in message.lower() or kind in ("OutOfMemoryError", "MemoryError"):
        return "Out of memory. Lower the batch size or the resolution in the expert settings, and start again."
    if kind in PLAIN:
        return message
    sentence = f"Error: {kind} {message[:LONGEST_ERROR]}".strip() if error else "The run ended without an error message"
    return f"{sentence.rstrip('.:')}. Press Resume to try again. If it fails again, see the log below."


def duration(seconds: float) -> str:
    """A duration as text."""
    if seconds < 100:
        return f"{max(5, round(seconds / 5) * 5)} seconds"
    if seconds < 5400:
        return f"{round(seconds / 60)} minutes"
    return f"{seconds / 3600:.1f} hours"


def _of_subject(view: RunView) -> list[tuple[str, str]]:
    by_name, suggestion = series(view), view.read_file(Suggestion)
    losses = [value for _, value in by_name.get("loss", [])][-LAST_STEPS:]
    heldout = [value for step, value in by_name.get("heldout_loss", []) if step > 0]
    done, total = view.status.step, view.status.total
    return [
        ("Method", view.method),
        ("Steps", f"{done} of {total}" if total else ""),
        ("Loss", f"{fmean(losses):.3f}" if losses else ""),
        ("Lowest validation loss", f"{min(heldout):.3f}" if heldout else ""),
        ("Recommended checkpoint", "" if suggestion is None else str(suggestion.step)),
    ]


def _of_several(view: RunView) -> list[tuple[str, str]]:
    done, total = view.status.step, view.status.total
    started = [("Methods", view.method), (f"{NOUNS[view.task]}s".capitalize(), f"{done} of {total}" if total else "")]
    return [(naming.method_name(row.method), in_percent(row.top1)) for row in accuracies(view)] or started


def accuracies(view: RunView) -> Sequence[MethodSummary]:
    """The summary rows of a classifier's report, one per method and number of shots; empty before the report exists."""
    report = view.read_file(FewShotReport)
    return [] if report is None else report.summary


def in_percent(interval: Interval) -> str:
    """A proportion with its 95% confidence interval, in percent."""
    return f"{interval.value:.0%} ({max(0.0, interval.low):.0%} to {min(1.0, interval.high):.0%})"


def series(view: RunView) -> dict[str, list[Point]]:
    """All logged metrics by name, as (step, value) in order. If a step was logged twice, the last value counts."""
    by_name: dict[str, dict[float, float]] = defaultdict(dict)
    for logged in view.metrics:
        for name, value in logged.values.items():
            by_name[name][logged.step] = value
    return {name: sorted(points.items()) for name, points in by_name.items()}
