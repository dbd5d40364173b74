"""A run as its files and processes show it: its state, the actions that it allows, and why it ended.

Files are read again only when they have changed, so that a list of many runs is cheap to refresh.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from pipelines.errors import InputError
from pipelines.run_file import ResolvedOptions, RunFile
from training.runs import run_requests
from training.runs.fewshot_files import FewShotReport
from training.runs.naming import RunTitle, default_title
from training.runs.record import RunRecord, process_of
from training.runs.run_files import (
    ADAPTERS,
    METRICS,
    STEP,
    TRAINING,
    Certificate,
    DryRunReport,
    ImageChecks,
    Launch,
    LoggedMetrics,
    RunStatus,
    Suggestion,
    read_metrics,
)
from training.runs.run_log import LOG, ended_by, last_error
from training.runs.waiting import BEGINNING_SECONDS, QUEUE, runs_before

Task = Literal["subject", "classify", "arena"]
State = Literal["queued", "starting", "running", "interrupted", "stopped", "failed", "done"]
Action = Literal["stop", "sample", "save", "resume", "duplicate", "delete"]
ACTIVE = frozenset({"queued", "starting", "running"})
ENDED: tuple[Action, ...] = ("resume", "duplicate", "delete")
ACTIONS: dict[State, tuple[Action, ...]] = {
    "queued": ("stop",),
    "starting": ("stop",),
    "running": ("stop", "sample", "save"),
    "interrupted": ENDED,
    "stopped": ENDED,
    "failed": ENDED,
    "done": ("duplicate", "delete"),
}
File = TypeVar("File", bound=RunFile)
Revision = tuple[int, int, int]
# The files that are shown, besides the status.
SHOWN_FILES: tuple[type[RunFile], ...] = (
    ResolvedOptions, Launch, RunTitle, ImageChecks, DryRunReport, Suggestion, Certificate, FewShotReport,
)  # fmt: skip
INTERRUPTED = {
    "SIGKILL": "Its process was killed, probably by the system because memory ran out.",
    None: "Its process ended without reporting an error. Perhaps the machine was switched off.",
}


@dataclass(frozen=True)
class RunSnapshot:
    """One run at one moment.

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
        changed = revision(self.record.path / kind.NAME)
        return None if changed is None else _read_error(kind, self.record.path, changed)

    @cached_property
    def file_errors(self) -> list[str]:
        """The errors of all files that are shown; that of the status is in `reason`."""
        errors = (*(self.file_error(kind) for kind in SHOWN_FILES), self.metrics_error)
        return [error for error in errors if error is not None]

    @cached_property
    def metrics(self) -> list[LoggedMetrics]:
        """The logged metrics; empty if metrics.jsonl is missing or cannot be read."""
        changed = revision(self.record.path / METRICS)
        return [] if changed is None or self.metrics_error is not None else _read_metrics(self.record.path, changed)

    @cached_property
    def metrics_error(self) -> str | None:
        """Why metrics.jsonl cannot be read and what to do; None if it can be read or is missing."""
        changed = revision(self.record.path / METRICS)
        return None if changed is None else _metrics_error(self.record.path, changed)

    @cached_property
    def task(self) -> Task:
        """The task of its recipe, or that it is an arena, whose options are for the models of both tasks."""
        if "models" in self.options:
            return "arena"
        return self.launch.task or ("classify" if "target_layers" in self.options else "subject")

    @cached_property
    def title(self) -> str:
        """The user's title, else its trigger word and class word, or its classes; contains user input."""
        given = self.read_file(RunTitle)
        return default_title(self.options or self.launch_options, self.task) if given is None else given.title

    @cached_property
    def state(self) -> State:
        """Its state. A run whose process ended without reporting it was stopped, has failed or was interrupted."""
        reported = self.status.state or "starting"
        if reported not in ACTIVE or process_of(self.status) is not None:
            return reported if reported in ACTIONS else "interrupted"
        if run_requests.was_asked(self.record, run_requests.STOP):
            return "stopped"
        if self._begins:
            return reported
        return "failed" if reported == "starting" and last_error(self.record) else "interrupted"

    @property
    def _begins(self) -> bool:
        """Whether its process was started just now and has not written its first status."""
        waited = time.time() - (self.status.heartbeat or self.created)
        return self.status.pid is None and self.file_error(RunStatus) is None and waited < BEGINNING_SECONDS

    @property
    def is_active(self) -> bool:
        """Whether it is queued, starting or running."""
        return self.state in ACTIVE

    @property
    def actions(self) -> tuple[Action, ...]:
        """The actions that its state allows; none until the process of a stopped run has begun, and ends itself."""
        if self.state == "stopped" != self.status.state and self._begins:
            return ()
        trains = self.task == "subject" and self.status.phase == TRAINING
        refused = () if trains else run_requests.ASKED
        return tuple(each for each in ACTIONS[self.state] if each not in refused and (self.task, each) != ("arena", "duplicate"))

    @cached_property
    def runs_before(self) -> int | None:
        """The number of runs ahead of it, including the active one; None unless it is queued."""
        if self.state != "queued":
            return None
        path = self.record.path.absolute()
        roots = [root for root in (path.parent / QUEUE, path.parents[1] / QUEUE) if root.is_dir()]
        return next((position for root in roots if (position := runs_before(root, path)) is not None), None)

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
    def version(self) -> tuple[object, ...]:
        """Differs whenever its title or state has changed or its process has written something; a heartbeat changes nothing."""
        if not self.is_active:
            return self.id, self.title, self.state, self.actions
        path, samples = self.record.path, self.record.samples
        written = (path / METRICS, path / LOG, path / ADAPTERS, samples, *samples.glob(f"{STEP}*"))
        return self.id, self.title, self.state, replace(self.status, heartbeat=None), *map(revision, written)

    def chosen(self, group: str, name: str) -> Any:
        """An option of the run: the resolved value, else the value set on the page; None if neither is set."""
        for options in (self.options, self.launch_options):
            fields = options.get(group)
            if isinstance(fields, dict) and fields.get(name) is not None:
                return fields[name]
        return None


def began(run: Path) -> float:
    """When a run was started, in seconds since the epoch, from a file that is written only at the start."""
    changed = next((state for name in (Launch.NAME, "command") if (state := revision(run / name))), None) or revision(run)
    return 0.0 if changed is None else changed[0] / 1e9


def read_cached(kind: type[File], folder: Path) -> File | None:
    """A file of a run, read again only if it has changed; None if it is missing.

    Raises: InputError if it cannot be read.
    """
    changed = revision(folder / kind.NAME)
    return None if changed is None else _read(kind, folder, changed)


@lru_cache(maxsize=512)
def _read(kind: type[File], folder: Path, changed: Revision) -> File | None:
    return kind.read(folder)


@lru_cache(maxsize=256)
def _read_metrics(folder: Path, changed: Revision) -> list[LoggedMetrics]:
    return read_metrics(folder)


# The list of runs needs only these of most files. They are small, so those of many runs are remembered, unlike the files.
@lru_cache(maxsize=16384)
def _read_error(kind: type[RunFile], folder: Path, changed: Revision) -> str | None:
    try:
        _read(kind, folder, changed)
    except InputError as error:
        return str(error)
    return None


@lru_cache(maxsize=2048)
def _metrics_error(folder: Path, changed: Revision) -> str | None:
    try:
        _read_metrics(folder, changed)
    except InputError as error:
        return str(error)
    return None


def revision(path: Path) -> Revision | None:
    """Values that change with each version of a file or folder; None if there is none."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_mtime_ns, stat.st_ino, stat.st_size


def without_kind(error: str) -> str:
    """An error of status.json without the name of its exception class."""
    kind, separator, words = error.partition(": ")
    return words if separator and kind.isidentifier() and words else error
