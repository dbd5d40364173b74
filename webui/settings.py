"""The settings of the server, and the workspace of each request."""

from __future__ import annotations

import ipaddress
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import InputError
from webui.workspace import ID, Workspace

if TYPE_CHECKING:
    import gradio as gr


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
