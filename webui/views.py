"""A run as the page shows it: its state and what can be done with it, derived from its files each time they are looked at."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from training.record import RunRecord
from webui.workspace import LAUNCH, Workspace

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
IN_WORDS: dict[State, str] = {
    "queued": "waiting for its turn",
    "starting": "starting",
    "running": "running",
    "interrupted": "interrupted",
    "stopped": "stopped",
    "failed": "failed",
    "done": "done",
}


@dataclass(frozen=True)
class RunView:
    """One run, read when it is looked at; a view is made anew for each look.

    Args:
        record: its directory.
    """

    record: RunRecord

    @property
    def id(self) -> str:
        """Its folder's name."""
        return self.record.path.name

    @cached_property
    def status(self) -> dict[str, Any]:
        """The fields of status.json."""
        return self.record.status()

    @cached_property
    def options(self) -> dict[str, Any]:
        """The resolved options by group; empty before the run has begun."""
        return self.record.options()

    @cached_property
    def launch(self) -> dict[str, Any]:
        """What the page started it with (see `webui.launching`); empty for runs from a terminal."""
        return self.record.read_json(LAUNCH)

    @cached_property
    def task(self) -> Task:
        """Which of the two tasks it is."""
        return self.launch.get("task") or ("classify" if "places" in self.options else "subject")

    @cached_property
    def state(self) -> State:
        """Where it is; a process that is gone without having said so was interrupted."""
        told = self.status.get("state", "starting")
        return "interrupted" if told in ACTIVE and not self.record.has_live_process() else told

    @property
    def is_active(self) -> bool:
        """Whether something is at work on it, or will be by itself."""
        return self.state in ACTIVE

    @property
    def actions(self) -> tuple[Action, ...]:
        """What can be done with it now."""
        return ACTIONS[self.state]

    @property
    def title(self) -> str:
        """What lists call it."""
        return f"{self.id} ({IN_WORDS[self.state]})"


def views(workspace: Workspace) -> list[RunView]:
    """All runs of the workspace, newest first."""
    return [RunView(workspace.run(run_id)) for run_id in workspace.run_ids()]
