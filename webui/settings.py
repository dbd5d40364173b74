"""What the server was started with, and whose workspace a request may see."""

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
    """How the app runs.

    Args:
        runs_dir: the folder of runs; with accounts, of one folder of runs an account.
        sets_dir: the same for uploaded images.
        host: where it listens.
        port: the same; None for the first that is free.
        accounts: the file of names and hashed passwords; None without passwords.
        base_models: what runs may start from besides the built-in models, when others than the machine's own user are there.
    """

    runs_dir: Path = Path("runs")
    sets_dir: Path = Path("uploads")
    host: str = "127.0.0.1"
    port: int | None = None
    accounts: Path | None = None
    base_models: tuple[str, ...] = ()

    @property
    def is_local(self) -> bool:
        """Whether only the machine's own user can be there: then folders and models of the machine may be named."""
        return self.accounts is None and is_loopback(self.host)

    def workspace(self, request: gr.Request | None) -> Workspace:
        """The workspace of whoever sent `request`.

        Raises: InputError if accounts are in use and the request is nobody's.
        """
        if self.accounts is None:
            return Workspace(self.runs_dir, self.sets_dir, None, self.is_local, self.base_models)
        user = None if request is None else request.username
        if not user or not ID.fullmatch(user):
            raise InputError("You are not signed in. Reload the page and sign in.")
        return Workspace(self.runs_dir / user, self.sets_dir / user, user, self.is_local, self.base_models)


def app_command() -> str:
    """The command that starts the app, as the user of this process types it."""
    return "nora-vision app" if sys.argv[0] == "nora-vision app" else "python app.py"


def is_loopback(host: str) -> bool:
    """Whether nothing but this machine reaches `host`, a name or an address with or without brackets."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False
