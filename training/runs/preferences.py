"""A run's file of the choices that users made between its images, without knowing their steps."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from filelock import FileLock

from pipelines.run_file import RunFile


@dataclass(frozen=True)
class Preference:
    """A choice between two images with the same prompt and seed.

    Args:
        prompt, seed: of both images.
        steps: the steps of the images; 0 is the base model.
        preferred: the step of the preferred image; None if they were about equal.
    """

    prompt: str
    seed: int
    steps: tuple[int, int]
    preferred: int | None


@dataclass(frozen=True)
class Preferences(RunFile):
    """All choices, oldest first."""

    NAME: ClassVar[str] = "preferences.json"

    choices: list[Preference] = field(default_factory=list)

    @classmethod
    def add(cls, folder: Path, choice: Preference) -> None:
        """Append a choice to the file in `folder`."""
        with FileLock(folder / f".{cls.NAME}.lock"):
            cls([*(cls.read(folder) or cls()).choices, choice]).write(folder)

    def counts(self) -> dict[int, tuple[int, int]]:
        """By step, how often its image was preferred and how often it was compared."""
        compared = Counter(step for choice in self.choices for step in choice.steps)
        preferred = Counter(choice.preferred for choice in self.choices)
        return {step: (preferred[step], count) for step, count in compared.items()}

    @classmethod
    def upgrade(cls, values: dict[str, Any], version: int) -> dict[str, Any]:
        """Make the choices objects."""
        choices = [Preference(**choice | {"steps": tuple(choice["steps"])}) for choice in values.get("choices", [])]
        return values | {"choices": choices}
