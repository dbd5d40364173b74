"""What people ask of a run while it is at work: a file each in its directory, looked for at the end of every step."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from training.runs.record import RunRecord

FOLDER = "requests"
# Draw the sample images now; write a checkpoint now.
SAMPLE, SAVE = "sample", "save"
ASKED = (SAMPLE, SAVE)
# The signal does it; the file says, when the process could not, that its end was asked for.
STOP = "stop"


def ask(record: RunRecord, what: str) -> None:
    """Ask for `what`, one of `ASKED`, or note that a `STOP` was asked for."""
    folder = record.path / FOLDER
    folder.mkdir(exist_ok=True)
    (folder / what).touch()


def was_asked(record: RunRecord, what: str) -> bool:
    """Whether `what` was asked for, and nobody has seen to it yet."""
    return (record.path / FOLDER / what).exists()


def forget(record: RunRecord) -> None:
    """Forget all that was asked of the run before."""
    shutil.rmtree(record.path / FOLDER, ignore_errors=True)


@dataclass(frozen=True)
class Requests:
    """Looks for what is asked of a run.

    Args:
        folder: where; None on all processes but the main one, which are told.
    """

    folder: Path | None

    @classmethod
    def of(cls, record: RunRecord, looks: bool) -> Requests:
        """Those of the run in `record` from now on, by a process that `looks` or does not."""
        if looks:
            forget(record)
        return cls(record.path / FOLDER if looks else None)

    def taken(self) -> frozenset[str]:
        """What of `ASKED` was asked for since this was called last; each is there once."""
        if self.folder is None or not self.folder.exists():
            return frozenset()
        found = frozenset(name for name in ASKED if (self.folder / name).exists())
        for name in found:
            (self.folder / name).unlink(missing_ok=True)
        return found
