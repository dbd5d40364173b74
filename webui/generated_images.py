"""A user's generated images: PNG files that contain their settings. Only the newest are kept."""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from pipelines.errors import InputError
from pipelines.images import read_settings, save_image
from webui.workspace import Workspace

MAX_IMAGES_KEPT = 200
# The leading dot keeps it from being the id of a dataset.
FOLDER = ".drawn"
NAME = re.compile(r"\d{19}-[0-9a-f]{6}\.png")


@dataclass(frozen=True)
class GeneratedImages:
    """One user's generated images; they outlive the tab, the session and the server.

    Args:
        folder: the folder of the images.
    """

    folder: Path

    @classmethod
    def of(cls, workspace: Workspace) -> GeneratedImages:
        """The generated images of the workspace's user."""
        return cls(workspace.sets / FOLDER)

    def add(self, image: Image.Image, settings: dict[str, Any]) -> Path:
        """Save an image with its settings; returns the file. Deletes the oldest images beyond `MAX_IMAGES_KEPT`."""
        path = self.folder / f"{time.time_ns():019d}-{secrets.token_hex(3)}.png"
        save_image(image, path, settings)
        for old in self.newest()[MAX_IMAGES_KEPT:]:
            old.unlink(missing_ok=True)
        return path

    def newest(self) -> list[Path]:
        """All images, newest first."""
        if not self.folder.is_dir():
            return []
        return sorted((path for path in self.folder.iterdir() if NAME.fullmatch(path.name)), reverse=True)

    def find(self, name: str) -> Path:
        """The image with the file name `name`.

        Raises: InputError if it does not exist.
        """
        path = self.folder / name if isinstance(name, str) and NAME.fullmatch(name) else None
        if path is None or not path.is_file():
            raise InputError(f"This image no longer exists: only the newest {MAX_IMAGES_KEPT} are kept. Generate it again.")
        return path


def one_line(settings: dict[str, Any]) -> str:
    """An image's settings in one line; escape it before it goes into HTML."""
    used = " + ".join(f"{each['name']} x {each['scale']:g}" for each in settings.get("adapters", [])) or "base model"
    return f"{settings['prompt']}; {used}; seed {settings['seed']}"


def settings_of(path: Path) -> tuple[dict[str, Any], int]:
    """The settings in an image's file (see `pipelines.images.read_settings`), and its width in pixels."""
    with Image.open(path, formats=("PNG",)) as image:
        return read_settings(path), image.width
