"""Requests of users to a run in progress: empty files in its directory, which it looks for at the end of every step."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from training.runs.record import RunRecord

FOLDER = "requests"
# Generate sample images now; save a checkpoint now.
SAMPLE, SAVE = "sample", "save"
ASKED = (SAMPLE, SAVE)
# A signal stops the run. The file tells a stopped run from an interrupted one if the process ended before it could report.
STOP = "stop"


def ask(record: RunRecord, what: str) -> None:
    """Request `what`, one of `ASKED`, or record that a `STOP` was requested."""
    folder = record.path / FOLDER
    folder.mkdir(exist_ok=True)
    (folder / what).touch()


def was_asked(record: RunRecord, what: str) -> bool:
    """Whether `what` was requested and is not answered yet."""
    return (record.path / FOLDER / what).exists()


def forget(record: RunRecord) -> None:
    """Delete all requests."""
    shutil.rmtree(record.path / FOLDER, ignore_errors=True)


@dataclass(frozen=True)
class Requests:
    """Looks for requests to a run.

    Args:
        folder: of the requests; None on processes other than the main one.
    """

    folder: Path | None

    @classmethod
    def of(cls, record: RunRecord, looks: bool) -> Requests:
        """The requests to the run in `record` from now on; earlier ones are deleted.

        Args:
            looks: whether this process looks for them.
        """
        if looks:
            forget(record)
        return cls(record.path / FOLDER if looks else None)

    def take(self) -> frozenset[str]:
        """The requests, among `ASKED`, since the last call."""
        if self.folder is None or not self.folder.exists():
            return frozenset()
        requested = frozenset(name for name in ASKED if (self.folder / name).exists())
        for name in requested:
            (self.folder / name).unlink(missing_ok=True)
        return requested
