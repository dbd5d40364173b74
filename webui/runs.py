"""A run as the page shows it: its state and the actions that it allows, derived from its files at each request."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from pipelines.errors import InputError
from pipelines.methods import DEFAULT, title_of
from pipelines.run_file import ResolvedOptions, RunFile
from training.options.data import SAMPLE_PROMPT
from training.runs import run_requests
from training.runs.fewshot_files import FewShotReport
from training.runs.record import RunRecord, process_of
from training.runs.run_files import (
    METRICS,
    Certificate,
    DryRunReport,
    ImageChecks,
    Launch,
    LoggedMetrics,
    RunStatus,
    Suggestion,
    read_metrics,
)
from training.runs.run_log import ended_by, last_error
from training.runs.waiting import QUEUE, runs_before
from webui.workspace import Workspace, began

Task = Literal["subject", "classify"]
State = Literal["queued", "starting", "running", "interrupted", "stopped", "failed", "done"]
Action = Literal["stop", "sample", "save", "resume", "duplicate", "delete"]
ACTIVE = frozenset({"queued", "starting", "running"})
ACTIONS: dict[State, tuple[Action, ...]] = {
    "queued": ("stop",),
    "starting": ("stop",),
    "running": ("stop", "sample", "save"),
    "interrupted": ("resume", "duplicate", "delete"),
    "stopped": ("resume", "duplicate", "delete"),
    "failed": ("resume", "duplicate", "delete"),
    "done": ("duplicate", "delete"),
}
TRAINING = "training"
File = TypeVar("File", bound=RunFile)
Revision = tuple[int, int, int]
# The files that the page shows, besides the status.
SHOWN_FILES: tuple[type[RunFile], ...] = (
    ResolvedOptions, Launch, ImageChecks, DryRunReport, Suggestion, Certificate, FewShotReport,
)  # fmt: skip
# The longest time from the creation of a run's folder to the first status of its process.
BEGINNING_SECONDS = 20.0
LONGEST_NAME, NAMED_CLASSES = 48, 3
SAMPLE_CLASSES = "handwritten digits"
INTERRUPTED = {
    "SIGKILL": "Its process was killed, probably by the system because memory ran out.",
    None: "Its process ended without reporting an error. Perhaps the machine was switched off.",
}


@dataclass(frozen=True)
class RunView:
    """A snapshot of one run, created for each request.

    Args:
        record: its directory.
    """

    record: RunRecord

    @property
    def id(self) -> str:
        """Its folder's name."""
        return self.record.path.name

    @cached_property
    def status(self) -> RunStatus:
        """The status; without any field set if there is none or it cannot be read."""
        return self.read_file(RunStatus) or RunStatus()

    @cached_property
    def options(self) -> dict[str, Any]:
        """The resolved options by group; empty before the run has begun."""
        return (self.read_file(ResolvedOptions) or ResolvedOptions()).groups

    @cached_property
    def launch(self) -> Launch:
        """How the page started it; without any field set for runs from a terminal."""
        return self.read_file(Launch) or Launch()

    @property
    def launch_options(self) -> dict[str, Any]:
        """The options that it was started with on the page; empty for runs from a terminal."""
        return self.launch.options or {}

    def read_file(self, kind: type[File]) -> File | None:
        """A file of the run; None if it is missing or cannot be read, for which `file_error` has the reason."""
        try:
            return read_cached(kind, self.record.path)
        except InputError:
            return None

    def file_error(self, kind: type[RunFile]) -> str | None:
        """Why a file of the run cannot be read and what to do; None if it can be read or is missing."""
        revision = _revision(self.record.path / kind.NAME)
        return None if revision is None else _read_error(kind, self.record.path, revision)

    @cached_property
    def file_errors(self) -> list[str]:
        """The errors of all files that the page shows; that of the status is in `reason`."""
        errors = (*(self.file_error(kind) for kind in SHOWN_FILES), self.metrics_error)
        return [error for error in errors if error is not None]

    @cached_property
    def metrics(self) -> list[LoggedMetrics]:
        """The logged metrics; empty if metrics.jsonl is missing or cannot be read."""
        revision = _revision(self.record.path / METRICS)
        if revision is None or self.metrics_error is not None:
            return []
        return _read_metrics(self.record.path, revision)

    @cached_property
    def metrics_error(self) -> str | None:
        """Why metrics.jsonl cannot be read and what to do; None if it can be read or is missing."""
        revision = _revision(self.record.path / METRICS)
        return None if revision is None else _metrics_error(self.record.path, revision)

    @cached_property
    def task(self) -> Task:
        """The task of its recipe."""
        return self.launch.task or ("classify" if "target_layers" in self.options else "subject")

    @cached_property
    def state(self) -> State:
        """Its state. A run whose process ended without reporting it was stopped, has failed or was interrupted."""
        reported = self.status.state or "starting"
        if reported not in ACTIVE or self._has_process:
            return reported if reported in ACTIONS else "interrupted"
        if not (self.record.path / RunStatus.NAME).exists() and time.time() - self.created < BEGINNING_SECONDS:
            return "starting"
        if run_requests.was_asked(self.record, run_requests.STOP):
            return "stopped"
        return "failed" if reported == "starting" and last_error(self.record) else "interrupted"

    @property
    def _has_process(self) -> bool:
        """Whether the process that wrote the last status is alive."""
        return process_of(self.status) is not None

    @property
    def is_active(self) -> bool:
        """Whether it is queued, starting or running."""
        return self.state in ACTIVE

    @property
    def actions(self) -> tuple[Action, ...]:
        """The actions that its state allows."""
        allowed = ACTIONS[self.state]
        trains = self.task == "subject" and self.status.phase == TRAINING
        return allowed if trains else tuple(action for action in allowed if action not in run_requests.ASKED)

    @cached_property
    def runs_before(self) -> int | None:
        """The number of runs ahead of it, including the active one; None unless it is queued."""
        if self.state != "queued":
            return None
        path = self.record.path.absolute()
        roots = [root for root in (path.parent / QUEUE, path.parents[1] / QUEUE) if root.is_dir()]
        positions = [position for root in roots if (position := runs_before(root, path)) is not None]
        return positions[0] if positions else None

    @cached_property
    def error(self) -> str | None:
        """The error as "Kind: message"; None unless the run has failed."""
        if self.state != "failed":
            return None
        return str(self.status.error or last_error(self.record) or "It ended without an error message.")

    @cached_property
    def reason(self) -> str | None:
        """Why it was interrupted, stopped or has failed, as a sentence; None for other states."""
        if self.state == "interrupted":
            return self.file_error(RunStatus) or INTERRUPTED.get(ended_by(self.record), INTERRUPTED[None])
        if self.state == "stopped":
            return "You stopped it."
        return None if self.error is None else without_kind(self.error)

    @property
    def created(self) -> float:
        """When it was started, seconds since the epoch."""
        created_at = self.launch.created
        return created_at if isinstance(created_at, int | float) else began(self.record.path)

    @property
    def ended(self) -> float | None:
        """The last heartbeat, seconds since the epoch; None while it is active."""
        return None if self.is_active else self.status.heartbeat

    @property
    def share_done(self) -> float | None:
        """The progress of its current phase in [0, 1]; None if unknown."""
        step, total = self.status.step, self.status.total
        return min(1.0, step / total) if isinstance(step, int) and isinstance(total, int) and total > 0 else None

    def chosen(self, group: str, name: str) -> Any:
        """An option of the run: the resolved value, else the value set on the page; None if neither is set."""
        for options in (self.options, self.launch_options):
            fields = options.get(group)
            if isinstance(fields, dict) and fields.get(name) is not None:
                return fields[name]
        return None

    @cached_property
    def name(self) -> str:
        """Its instance prompt or classes, shortened; contains user input."""
        name = self._classes() if self.task == "classify" else str(self.chosen("data", "instance_prompt") or SAMPLE_PROMPT)
        return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"

    def _classes(self) -> str:
        given = self.chosen("data", "class_names")
        names = [str(each).partition("=")[2] for each in given] if isinstance(given, list) else []
        if names:
            more = len(names) - NAMED_CLASSES
            return ", ".join(names[:NAMED_CLASSES]) + (f" and {more} more" if more > 0 else "")
        folder = self.chosen("data", "dataset") or self.chosen("data", "data_dir")
        return str(folder).rstrip("/").rpartition("/")[2] if folder else SAMPLE_CLASSES

    @property
    def title(self) -> str:
        """Its title in lists."""
        when = time.strftime("%d %b %H:%M:%S", time.localtime(self.created))
        method = title_of(self.chosen("adapter", "method") or DEFAULT) if self.task == "subject" else ""
        return f"{self.name}, {method}{', ' if method else ''}{when} ({self.state})"


def read_cached(kind: type[File], folder: Path) -> File | None:
    """A file of a run, read again only if it has changed; None if it is missing.

    Raises: InputError if it cannot be read.
    """
    revision = _revision(folder / kind.NAME)
    return None if revision is None else _read(kind, folder, revision)


@lru_cache(maxsize=512)
def _read(kind: type[File], folder: Path, revision: Revision) -> File | None:
    return kind.read(folder)


@lru_cache(maxsize=256)
def _read_metrics(folder: Path, revision: Revision) -> list[LoggedMetrics]:
    return read_metrics(folder)


# The list of runs needs only these of most files. They are small, so those of many runs are remembered, unlike the files.
@lru_cache(maxsize=16384)
def _read_error(kind: type[RunFile], folder: Path, revision: Revision) -> str | None:
    return _error_of(lambda: _read(kind, folder, revision))


@lru_cache(maxsize=2048)
def _metrics_error(folder: Path, revision: Revision) -> str | None:
    return _error_of(lambda: _read_metrics(folder, revision))


def _error_of(read: Callable[[], object]) -> str | None:
    try:
        read()
    except InputError as error:
        return str(error)
    return None


def _revision(path: Path) -> Revision | None:
    """Values that change with each version of a file; None if there is no file."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_mtime_ns, stat.st_ino, stat.st_size


def without_kind(error: str) -> str:
    """An error of status.json without the name of its exception class."""
    kind, separator, words = error.partition(": ")
    return words if separator and kind.isidentifier() and words else error


def views(workspace: Workspace) -> list[RunView]:
    """All runs of the workspace, newest first."""
    return [RunView(workspace.run(run_id)) for run_id in workspace.run_ids()]
