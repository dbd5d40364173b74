"""The folders of one user's runs and images. Paths are made from checked ids only, never from other user input."""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import InputError
from training.runs.record import RunRecord
from training.runs.run_files import Launch, RunStatus

# An id of a run or dataset, made here or in a terminal: no separator, no leading dot.
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}")


@dataclass(frozen=True)
class Workspace:
    """One user's runs and datasets. Those of other users cannot be reached through it.

    Args:
        runs: the folder with a folder per run.
        sets: the folder with a folder per dataset.
        user: the name of the account; None without accounts.
        is_local: whether the user may use the folders and models of this machine.
        base_models: the models that other users may use besides the built-in ones.
    """

    runs: Path
    sets: Path
    user: str | None = None
    is_local: bool = False
    base_models: tuple[str, ...] = ()

    @property
    def all_runs(self) -> Path:
        """The folder of all users' runs, which wait in one queue because they share the machine's devices."""
        return self.runs if self.user is None else self.runs.parent

    def run_ids(self) -> list[str]:
        """The ids of all runs, newest first, including those started in a terminal."""
        if not self.runs.is_dir():
            return []
        folders = [path for path in self.runs.iterdir() if _is_run(path)]
        return [path.name for path in sorted(folders, key=lambda path: (began(path), path.name), reverse=True)]

    def run(self, run_id: str) -> RunRecord:
        """The run with the id `run_id`.

        Raises: InputError if it does not exist or the id is invalid.
        """
        path = _below(self.runs, run_id)
        if path is None or not _is_run(path):
            raise InputError("This run does not exist. Choose one from the list.")
        return RunRecord(path)

    def image_set(self, set_id: str) -> Path:
        """The folder of the dataset with the id `set_id`.

        Raises: InputError if it does not exist or the id is invalid.
        """
        path = _below(self.sets, set_id)
        if path is None or path.is_symlink() or not path.is_dir():
            raise InputError("These images no longer exist. Add them again.")
        return path

    def new_run(self) -> Path:
        """An empty folder for a new run."""
        return _new(self.runs)

    def new_image_set(self) -> Path:
        """An empty folder for a new dataset."""
        return _new(self.sets)


def began(run: Path) -> float:
    """When a run was started, in seconds since the epoch, from a file that is written only at the start."""
    for name in (Launch.NAME, "command"):
        if (run / name).exists():
            return (run / name).stat().st_mtime
    return run.stat().st_mtime


def _is_run(path: Path) -> bool:
    marks = (RunStatus.NAME, Launch.NAME)
    return bool(ID.fullmatch(path.name)) and path.is_dir() and not path.is_symlink() and any((path / n).exists() for n in marks)


def _below(root: Path, name: str) -> Path | None:
    return root / name if isinstance(name, str) and ID.fullmatch(name) else None


def _new(root: Path) -> Path:
    path = root / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    path.mkdir(parents=True)
    return path
