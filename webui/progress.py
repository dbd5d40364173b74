"""How a run is going, in words and HTML: everything read from its files, nothing remembered."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from training.runs.record import RunRecord
from training.subject.checkpoint_selection import Point as Measured
from training.subject.measured import FOLDS, heldout_curve
from webui.curves import Point, Series, plot, running_mean
from webui.views import STATE_TEXTS, RunView

DRY_RUN = "dry_run.json"
PHASES = {
    "loading": "Loading the model",
    "encoding": "Turning the photos into the model's own form",
    "drawing class images": "Drawing images of the same kind of thing, so that the model does not forget it",
    "calibrating": "Looking at what your photos set in motion in the model, to place the adapter there",
    "dry run": "Trying three steps, to see what the whole training takes",
    "looking for settings that fit": "Looking for settings that fit into the memory there is",
    "training": "Training",
    "exporting": "Saving the adapter in four forms",
    "comparing": "Drawing images with earlier steps, to compare them",
    "certifying": "Checking that other programs draw the same from the saved files",
    "uploading": "Uploading",
    "writing the report": "Writing the report",
}
LEAVING_OUT = re.compile(r"leaving out image (\d+)")
FITTING = re.compile(r"fitting (\S+), (\S+) shots, seed (\d+)")
# Errors that say themselves what is wrong and what to do.
PLAIN = frozenset({"InputError", "DoesNotFitError", "NotFiniteError", "CertificateError"})
# Of the trained steps, what one point of the loss's line is the mean of.
SMOOTHED = 1 / 16
LONGEST_ERROR = 400


def part_at_work(view: RunView) -> RunRecord:
    """The record of what is being trained now: the run itself, one of its short trainings, or one of its methods."""
    leaving_out = LEAVING_OUT.fullmatch(str(view.status.get("phase")))
    if leaving_out:
        return RunRecord(view.record.path / FOLDS / str(int(leaving_out[1]) - 1))
    trial = _inside(view.record.path, view.status.get("member"))
    return view.record if trial is None else RunRecord(trial)


def _plotted(view: RunView) -> RunRecord:
    """The record whose losses are shown: of what is at work, else of what was last."""
    record = part_at_work(view)
    if view.task == "subject" or record != view.record:
        return record
    newest = max(view.record.path.glob("members/*/*/*/metrics.jsonl"), key=lambda path: path.stat().st_mtime, default=None)
    return record if newest is None else RunRecord(newest.parent)


def _inside(folder: Path, below: object) -> Path | None:
    """The folder `below` in `folder`, if it lies there."""
    path = (folder / below).resolve() if isinstance(below, str) else folder
    return path if path.is_dir() and path.is_relative_to(folder.resolve()) and path != folder else None


def head(view: RunView) -> str:
    """The state as one word, and what that means now as a sentence."""
    chip = f'<span class="chip {view.state}">{STATE_TEXTS[view.state]}</span>'
    return f'<p class="phase">{chip} <b>{_headline(view)}</b></p>{_below(view)}'


def _headline(view: RunView) -> str:
    return HEADLINES.get(view.state, _headline_of_ended)(view)


def _headline_of_queued(view: RunView) -> str:
    ahead = view.runs_before
    return f"{ahead} {'run' if ahead == 1 else 'runs'} before it" if ahead else "It is next"


def _headline_of_done(view: RunView) -> str:
    seconds = view.status.get("seconds")
    return "Done" if seconds is None else f"Done in {duration(seconds)}"


def _headline_of_ended(view: RunView) -> str:
    done, total = view.status.get("step"), view.status.get("total")
    return f"{done} of {total} steps were done" if done and total and view.task == "subject" else "Nothing was trained yet"


HEADLINES: dict[str, Callable[[RunView], str]] = {
    "queued": _headline_of_queued,
    "starting": lambda view: "Starting: the model's libraries are being loaded, which takes some seconds",
    "running": lambda view: html.escape(phase_in_words(str(view.status.get("phase", "loading")))),
    "done": _headline_of_done,
}


def phase_in_words(phase: str) -> str:
    """What a run that is at work does, for people, from its status."""
    leaving_out, fitting = LEAVING_OUT.fullmatch(phase), FITTING.fullmatch(phase)
    if leaving_out:
        return f"Cross-validation: training without photo {leaving_out[1]}"
    if fitting:
        return f"Fitting {fitting[1]}, {fitting[2]} images a class, seed {fitting[3]}"
    return PHASES.get(phase, phase)


def _below(view: RunView) -> str:
    """What there is to say besides: why it ended, and what can be done."""
    saved = newest_checkpoint(view.record)
    safe = f"Everything up to step {saved} is saved." if saved else "No step was saved yet."
    goes_on = "goes on from there" if saved else "starts again with the same settings"
    if view.state in ("interrupted", "stopped"):
        return _note(f"{view.reason} {safe} Resume {goes_on}.")
    if view.state == "failed":
        return _note(html.escape(f"{plain_error(view.error)} {safe}"))
    if view.state == "queued":
        return _quiet("One run at a time works on this machine. It begins by itself, whether this page is open or not.")
    return _quiet("It goes on whether this page is open or not.") if view.is_active else ""


def _note(text: str) -> str:
    return f'<p class="warning">{text}</p>'


def _quiet(text: str) -> str:
    return f'<p class="quiet">{text}</p>'


def newest_checkpoint(record: RunRecord) -> int:
    """The step that a resumed run goes on from; 0 for none."""
    return max((int(path.name.removeprefix("step-")) for path in record.checkpoints.glob("step-*")), default=0)


def plain_error(error: str | None) -> str:
    """What went wrong and what to do, from a run's "Kind: message"."""
    kind, _, message = (error or "").partition(": ")
    if kind == "DiskFullError":
        return "The disk is full. Free some space, then press Resume."
    if "out of memory" in message.lower() or kind in ("OutOfMemoryError", "MemoryError"):
        return "The memory was not enough. On the screen Check choose the preset Fast or fewer photos a step, and start again."
    if kind in PLAIN:
        return message
    sentence = (
        f"It ended with an error: {kind} {message[:LONGEST_ERROR]}".strip() if error else "It ended without an error message"
    )
    return f"{sentence.rstrip('.:')}. Press Resume to try again; if it ends so again, the log below has the rest."


def bar(view: RunView) -> str:
    """How far it is, as a bar, and how long it will take."""
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
    """The share that is done, None where nobody knows, and the figures in words."""
    inner = part_at_work(view)
    if inner is not view.record:
        return _share_of_parts(view, *_share_of_part(inner.status()))
    step, total = view.status.get("step"), view.status.get("total")
    if view.state == "done":
        return 1.0, f"{total} of {total} steps" if total and view.task == "subject" else ""
    if not total or _is_before_training(view):
        return None if view.is_active else 0.0, ""
    return step / total, f"{step} of {total} steps{_left_to_train(view)}"


def _left_to_train(view: RunView) -> str:
    left = view.status.get("seconds_left")
    return f", {duration(left)} left, then it is saved and compared" if left and view.state == "running" else ""


def _share_of_parts(view: RunView, part: float, words: str) -> tuple[float, str]:
    """The same of a run that is made of parts, by the share and the figures of the one that is at work."""
    step, total, left = (view.status.get(name) for name in ("step", "total", "seconds_left"))
    if view.task == "classify" and total:
        left_words = f", {duration(left)} left" if left else ""
        return (step + part) / total, f"{step} of {total} fits are done, the next is at {words or 'its start'}{left_words}"
    return part, words if view.is_active else ""


def _share_of_part(status: Mapping[str, Any]) -> tuple[float, str]:
    """The same of the part that is at work; no words where its steps are not known yet."""
    step, total = status.get("step", 0), status.get("total")
    return (step / total, f"step {step} of {total}") if total else (0.0, "")


def _is_before_training(view: RunView) -> bool:
    return view.state == "running" and view.status.get("phase") != "training" and view.task == "subject"


def duration(seconds: float) -> str:
    """A time in words."""
    if seconds < 55:
        return f"{max(5, round(seconds / 5) * 5)} seconds"
    if seconds < 5400:
        minutes = round(seconds / 60)
        return f"{minutes} minute{'s' if minutes > 1 else ''}"
    return f"{seconds / 3600:.1f} hours"


def cost(record: RunRecord) -> str:
    """What the dry run has measured; empty before it."""
    report = record.read_json(DRY_RUN)
    if not report:
        return ""
    facts = {
        "time": f"about {duration(report['seconds'])} of training, {report['seconds_per_step']:.2g} s a step",
        "memory": f"{report['peak_memory'] / 1e9:.1f} GB at the most",
        "disk": f"up to {report['disk'] / 1e6:,.0f} MB while it trains",
        "learned": f"{report['trained_numbers']:,} numbers",
    }
    rows = "".join(f"<dt>{name}</dt><dd>{words}</dd>" for name, words in facts.items())
    return f'<h3>What it takes</h3><dl class="facts">{rows}</dl>'


def losses(view: RunView) -> str:
    """The loss of each step with its running mean, that of photos held out, and the learning rate, one below the other."""
    record = _plotted(view)
    lines = [line for line in record.metrics() if "loss" in line]
    heldout = heldout_curve(record)
    if not lines and not heldout:
        return ""
    extent = (0.0, float(record.status().get("total") or lines[-1]["step"]))
    points: list[Point] = [(line["step"], line["loss"]) for line in lines]
    smooth = running_mean(points, max(5, round(len(points) * SMOOTHED)))
    learning = [Series("each step", points, "cloud", 1), Series("running mean", smooth, "line", 1)]
    rates = [Series("learning rate", [(line["step"], line["lr"]) for line in lines if "lr" in line], "line", 3)]
    return (
        plot("Training loss by step (lower is better)", learning, extent)
        + plot("Validation loss (held-out photo)", _heldout(heldout), extent, css="half")
        + plot("Learning rate", rates, extent, css="low")
    )


def _heldout(curve: Sequence[Measured]) -> list[Series]:
    return [Series("measured now and then", [(point.step, point.heldout) for point in curve], "marks", 2)]
