"""The progress of a run as HTML, read from its files at each request."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from pathlib import Path

from training.runs.fewshot_files import trials_folder
from training.runs.record import RunRecord, newest_step
from training.runs.run_files import CROSS_VALIDATION, FITTING, FOLDS, GB, DryRunReport, RunStatus
from training.subject.checkpoint_selection import Point as Measured
from training.subject.measured import heldout_curve
from webui.curves import Point, Series, plot, running_mean
from webui.runs import RunView

PHASES = {
    "loading": "Loading the model",
    "encoding": "Encoding the photos into latents",
    "drawing class images": "Generating class images for prior preservation",
    "calibrating": "Calibrating: measuring the model's activations on your photos, to initialise the adapter",
    "dry run": "Dry run: three steps, to measure time and memory",
    "looking for settings that fit": "Memory fallback: looking for settings that fit into memory",
    "training": "Training",
    "exporting": "Exporting the adapter in four formats",
    "comparing": "Scoring the checkpoints: generating images with each",
    "certifying": "Checking the exported files with plain diffusers",
    "uploading": "Uploading",
    "writing the report": "Writing the report",
}
# Errors whose messages are written for users.
PLAIN = frozenset({"InputError", "DoesNotFitError", "NotFiniteError", "CertificateError"})
# The running mean of the loss covers this share of the steps.
SMOOTHED = 1 / 16
LONGEST_ERROR = 400


def current_part(view: RunView) -> RunRecord:
    """The record of the current training: the run itself, a fold of cross-validation, or a trial of the experiment."""
    if view.status.phase == CROSS_VALIDATION and view.status.fold is not None:
        return RunRecord(view.record.path / FOLDS / str(view.status.fold - 1))
    trial = _inside(view.record.path, view.status.trial)
    return view.record if trial is None else RunRecord(trial)


def _plotted(view: RunView) -> RunRecord:
    """The record whose losses are plotted: of the current training, else of the last one."""
    record = current_part(view)
    if view.task == "subject" or record != view.record:
        return record
    newest = max(
        view.record.path.glob(f"{trials_folder(view.record.path)}/*/*/*/metrics.jsonl"),
        key=lambda path: path.stat().st_mtime,
        default=None,
    )
    return record if newest is None else RunRecord(newest.parent)


def _inside(folder: Path, below: object) -> Path | None:
    """The folder `below` inside `folder`; None if it is not inside."""
    path = (folder / below).resolve() if isinstance(below, str) else folder
    return path if path.is_dir() and path.is_relative_to(folder.resolve()) and path != folder else None


def head(view: RunView) -> str:
    """The state, a sentence about it, and the files of the run that cannot be read."""
    errors = "".join(_note(html.escape(error)) for error in view.file_errors)
    chip = f'<span class="chip {view.state}">{view.state}</span>'
    return f'<p class="phase">{chip} <b>{_headline(view)}</b></p>{_below(view)}{errors}'


def _headline(view: RunView) -> str:
    return HEADLINES.get(view.state, _headline_of_ended)(view)


def _headline_of_queued(view: RunView) -> str:
    ahead = view.runs_before
    return f"{ahead} {'run' if ahead == 1 else 'runs'} ahead in the queue" if ahead else "Next in the queue"


def _headline_of_done(view: RunView) -> str:
    seconds = view.status.seconds
    return "Done" if seconds is None else f"Done in {duration(seconds)}"


def _headline_of_ended(view: RunView) -> str:
    done, total = view.status.step, view.status.total
    return f"{done} of {total} steps were done" if done and total and view.task == "subject" else "No training step was done"


HEADLINES: dict[str, Callable[[RunView], str]] = {
    "queued": _headline_of_queued,
    "starting": lambda view: "Starting: loading the libraries takes a few seconds",
    "running": lambda view: html.escape(phase_title(view.status)),
    "done": _headline_of_done,
}


def phase_title(status: RunStatus) -> str:
    """The title of the phase in status.json."""
    phase = str(status.phase or "loading")
    if phase == CROSS_VALIDATION and status.fold is not None:
        of_all = "" if status.folds is None else f" of {status.folds}"
        return f"Cross-validation: a short training without photo {status.fold}{of_all}"
    if phase == FITTING and status.method is not None:
        return f"Training {status.method}, {status.shots} shots, seed {status.seed}"
    return PHASES.get(phase, phase)


def _below(view: RunView) -> str:
    """Why the run ended and what to do, or what happens next."""
    saved = newest_step(view.record.checkpoints)
    checkpoint_text = f"Everything up to step {saved} is saved." if saved else "No checkpoint was saved."
    effect = "continues from there" if saved else "starts again with the same settings"
    if view.state in ("interrupted", "stopped"):
        return _note(html.escape(f"{view.reason} {checkpoint_text} Resume {effect}."))
    if view.state == "failed":
        return _note(html.escape(f"{plain_error(view.error)} {checkpoint_text}"))
    if view.state == "queued":
        return _quiet("This machine runs one training at a time. This run starts by itself, even if you close this page.")
    return _quiet("Training continues if you close this page.") if view.is_active else ""


def _note(text: str) -> str:
    return f'<p class="warning">{text}</p>'


def _quiet(text: str) -> str:
    return f'<p class="quiet">{text}</p>'


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


def bar(view: RunView) -> str:
    """A progress bar with the remaining time."""
    if view.state in ("queued", "failed"):
        return ""
    share, words = _share(view)
    done = "" if share is None else f'aria-valuenow="{share:.0%}"'.replace("%", "")
    width = "100%" if share is None else f"{share:.1%}"
    unknown = "unknown" if share is None else ""
    return (
        f'<div class="bar {view.state} {unknown}" role="progressbar" aria-label="progress" aria-valuemin="0" aria-valuemax="100" '
        f'{done}><div style="width:{width}"></div></div><p class="quiet far">{words}</p>'
    )


def _share(view: RunView) -> tuple[float | None, str]:
    """The share that is done, None if unknown, and a text with the steps."""
    inner = current_part(view)
    if inner is not view.record:
        return _share_of_parts(view, *_share_of_part(inner.status()))
    step, total = view.status.step, view.status.total
    if view.state == "done":
        return 1.0, f"{total} of {total} steps" if total and view.task == "subject" else ""
    if not total or _is_before_training(view):
        return None if view.is_active else 0.0, ""
    return step / total, f"{step} of {total} steps{_left_to_train(view)}"


def _left_to_train(view: RunView) -> str:
    left = view.status.seconds_left
    return f", {duration(left)} left, then the adapter is exported and scored" if left and view.state == "running" else ""


def _share_of_parts(view: RunView, part: float, words: str) -> tuple[float, str]:
    """As `_share`, for a run of several trainings, from the share and the text of the current one."""
    step, total, left = view.status.step, view.status.total, view.status.seconds_left
    if view.task == "classify" and total:
        left_words = f", {duration(left)} left" if left else ""
        return (step + part) / total, f"{step} of {total} trainings done; the next one: {words or 'starting'}{left_words}"
    return part, words if view.is_active else ""


def _share_of_part(status: RunStatus) -> tuple[float, str]:
    """As `_share`, for the current training; an empty text if its number of steps is unknown."""
    step, total = status.step or 0, status.total
    return (step / total, f"step {step} of {total}") if total else (0.0, "")


def _is_before_training(view: RunView) -> bool:
    return view.state == "running" and view.status.phase != "training" and view.task == "subject"


def duration(seconds: float) -> str:
    """A duration as text."""
    if seconds < 55:
        return f"{max(5, round(seconds / 5) * 5)} seconds"
    if seconds < 5400:
        minutes = round(seconds / 60)
        return f"{minutes} minute{'s' if minutes > 1 else ''}"
    return f"{seconds / 3600:.1f} hours"


def cost(record: RunRecord) -> str:
    """The measurements of the dry run; empty before it."""
    view = RunView(record)
    report, left_out = view.read_file(DryRunReport), view.status.expected_left_out
    if report is None:
        return ""
    facts = {
        "time": f"about {duration(report.seconds)} of training, {report.seconds_per_step:.2g} s a step",
        "memory": f"{report.peak_memory / GB:.1f} GB peak",
        "disk": f"up to {report.disk / 1e6:,.0f} MB while training",
        "parameters": f"{report.num_trainable_parameters:,} trainable",
    }
    if left_out:
        facts["export as LoRA"] = f"approximate: about {left_out:.0%} of the weight change is expected to be left out"
    rows = "".join(f"<dt>{name}</dt><dd>{words}</dd>" for name, words in facts.items())
    return f'<h3>Cost</h3><dl class="facts">{rows}</dl>'


def losses(view: RunView) -> str:
    """Plots of the training loss with its running mean, the validation loss, and the learning rate; empty without metrics."""
    plotted = RunView(_plotted(view))
    if plotted.metrics_error is not None:
        return ""
    lines = [line for line in plotted.metrics if "loss" in line.values]
    heldout = heldout_curve(plotted.record)
    if not lines and not heldout:
        return ""
    extent = (0.0, float(plotted.status.total or lines[-1].step))
    points: list[Point] = [(line.step, line.values["loss"]) for line in lines]
    smooth = running_mean(points, max(5, round(len(points) * SMOOTHED)))
    learning = [Series("each step", points, "cloud", 1), Series("running mean", smooth, "line", 1)]
    rates = [Series("learning rate", [(line.step, line.values["lr"]) for line in lines if "lr" in line.values], "line", 3)]
    return (
        plot("Training loss (lower is better)", learning, extent)
        + plot("Validation loss (lower is better)", _heldout(heldout), extent, css="half")
        + plot("Learning rate", rates, extent, css="low")
    )


def _heldout(curve: Sequence[Measured]) -> list[Series]:
    return [Series("validation loss", [(point.step, point.heldout) for point in curve], "marks", 2)]


def share_done(view: RunView) -> float | None:
    """The share of the whole run that is done, of runs without a plan that of the current phase; None if unknown."""
    return view.share_done if view.status.share is None else view.status.share


def sentence(view: RunView) -> str:
    """What a run is doing, as one line of text."""
    doing = phase_title(view.status) if view.state == "running" else view.reason or _headline(view)
    share, left = (share_done(view), view.status.seconds_left) if view.state == "running" else (None, None)
    words = [
        view.name,
        doing.partition(":")[0],
        "" if share is None else f"{share:.0%}",
        f"{duration(left)} left" if left else "",
    ]
    return " · ".join(each for each in words if each)
