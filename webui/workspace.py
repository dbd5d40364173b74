"""The server's settings, and the folders of one user's runs and images, whose paths are made from checked ids only."""

from __future__ import annotations

import ipaddress
import re
import secrets
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import InputError
from training.runs.record import RunRecord
from training.runs.run_files import Launch, RunStatus
from training.runs.snapshot import began

if TYPE_CHECKING:
    import gradio as gr

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
        if path is None or not _is_folder(path):
            raise InputError("These images no longer exist. Add them again.")
        return path

    def is_image_set(self, folder: str | Path) -> bool:
        """Whether `folder`, an absolute path, is that of one of the user's datasets, which need not exist."""
        return Path(folder).parent == self.sets.absolute()

    def set_in(self, folder: str | None) -> str | None:
        """The id of the user's dataset in `folder`, an absolute path; None if it is another folder or gone."""
        path = Path(folder or "")
        return path.name if self.is_image_set(path) and ID.fullmatch(path.name) and _is_folder(path) else None

    def new_run(self) -> Path:
        """An empty folder for a new run."""
        return _new(self.runs)

    def new_image_set(self) -> Path:
        """An empty folder for a new dataset."""
        return _new(self.sets)


@dataclass(frozen=True)
class Settings:
    """The settings of the server.

    Args:
        runs_dir: the folder of runs; with accounts, it has a subfolder per account.
        sets_dir: the folder of uploaded images; with accounts, it has a subfolder per account.
        host: the address to listen on.
        port: the port to listen on; None for the first free one.
        accounts: the file of names and hashed passwords; None if nobody has to sign in.
        base_models: the models that guests may use besides the built-in ones.
    """

    runs_dir: Path = Path("runs")
    sets_dir: Path = Path("uploads")
    host: str = "127.0.0.1"
    port: int | None = None
    accounts: Path | None = None
    base_models: tuple[str, ...] = ()

    @property
    def is_local(self) -> bool:
        """Whether only the user of this machine can reach the app, and may therefore use its folders and models."""
        return self.accounts is None and is_loopback(self.host)

    def workspace(self, request: gr.Request | None) -> Workspace:
        """The workspace of the user who sent `request`.

        Raises: InputError if accounts are in use and the user is not signed in.
        """
        return self.workspace_of(None if request is None else request.username)

    def workspace_of(self, user: str | None) -> Workspace:
        """The workspace of a signed-in user.

        Raises: InputError if accounts are in use and `user` is not the name of one.
        """
        if self.accounts is None:
            return Workspace(self.runs_dir, self.sets_dir, None, self.is_local, self.base_models)
        if not user or not ID.fullmatch(user):
            raise InputError("You are not signed in. Reload the page and sign in.")
        return Workspace(self.runs_dir / user, self.sets_dir / user, user, self.is_local, self.base_models)


def app_command() -> str:
    """The command that starts the app, as the user typed it."""
    return "nora-vision app" if sys.argv[0] == "nora-vision app" else "python app.py"


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or an address with or without brackets, can be reached only from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False


def _is_run(path: Path) -> bool:
    marks = (RunStatus.NAME, Launch.NAME)
    return bool(ID.fullmatch(path.name)) and _is_folder(path) and any((path / n).exists() for n in marks)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _below(root: Path, name: str) -> Path | None:
    return root / name if isinstance(name, str) and ID.fullmatch(name) else None


def _new(root: Path) -> Path:
    path = root / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    path.mkdir(parents=True)
    return path
