"""Where one user's runs and images lie. Paths come from the ids made here, never from a user's words."""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import InputError
from training.runs.record import RunRecord
from training.runs.run_files import RunStatus

# What we make, and what a terminal names runs; no separator, nothing hidden, never "..".
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}")
LAUNCH = "launch.json"


@dataclass(frozen=True)
class Workspace:
    """One user's runs and image sets; no other user's can be reached through it.

    Args:
        runs: the folder of runs, one folder each.
        sets: the folder of uploaded images, one folder each.
        user: the account's name; None where there are no accounts.
        is_local: whether folders and models of the machine may be named.
        base_models: what runs may start from besides the built-in models where they may not.
    """

    runs: Path
    sets: Path
    user: str | None = None
    is_local: bool = False
    base_models: tuple[str, ...] = ()

    @property
    def all_runs(self) -> Path:
        """The folder of all users' runs, or of their folders of runs: what shares the machine's devices."""
        return self.runs if self.user is None else self.runs.parent

    def run_ids(self) -> list[str]:
        """The ids of all runs, whoever started them, newest first."""
        if not self.runs.is_dir():
            return []
        folders = [path for path in self.runs.iterdir() if _is_run(path)]
        return [path.name for path in sorted(folders, key=lambda path: (began(path), path.name), reverse=True)]

    def run(self, run_id: str) -> RunRecord:
        """The run called `run_id`.

        Raises: InputError if there is none, or the id is no id.
        """
        path = _below(self.runs, run_id)
        if path is None or not _is_run(path):
            raise InputError("There is no such run. Choose one from the list.")
        return RunRecord(path)

    def image_set(self, set_id: str) -> Path:
        """The folder of the image set called `set_id`.

        Raises: InputError if there is none, or the id is no id.
        """
        path = _below(self.sets, set_id)
        if path is None or path.is_symlink() or not path.is_dir():
            raise InputError("These images no longer exist. Add them again.")
        return path

    def new_run(self) -> Path:
        """An empty folder for a new run."""
        return _new(self.runs)

    def new_image_set(self) -> Path:
        """An empty folder for images."""
        return _new(self.sets)


def began(run: Path) -> float:
    """When the folder of a run was begun, seconds since the epoch: the age of the oldest file that is written once."""
    for name in (LAUNCH, "command"):
        if (run / name).exists():
            return (run / name).stat().st_mtime
    return run.stat().st_mtime


def _is_run(path: Path) -> bool:
    marks = (RunStatus.NAME, LAUNCH)
    return bool(ID.fullmatch(path.name)) and path.is_dir() and not path.is_symlink() and any((path / n).exists() for n in marks)


def _below(root: Path, name: str) -> Path | None:
    return root / name if isinstance(name, str) and ID.fullmatch(name) else None


def _new(root: Path) -> Path:
    path = root / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    path.mkdir(parents=True)
    return path
