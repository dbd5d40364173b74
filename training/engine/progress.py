"""The progress of a training in status.json."""

from __future__ import annotations

import math
import time

from training.runs.run import RunDirectory
from training.runs.run_files import TRAINING

STATUS_SECONDS = 1.0


class TrainingProgress:
    """Writes the progress of a training to status.json about once a second."""

    def __init__(self, run: RunDirectory, first: int, total: int) -> None:
        self.run, self.first, self.total = run, first, total
        self.reported = -math.inf
        run.begin(TRAINING, step=first, total=total)

    def report(self, step: int, at_once: bool = False) -> None:
        """Report `step` completed steps.

        Args:
            at_once: even if the last report was less than a second ago, so that no checkpoint is newer than the status.
        """
        now = time.monotonic()
        if now - self.reported < STATUS_SECONDS and step < self.total and not at_once:
            return
        self.reported = now
        self.run.reach(step, self.total, self.first)
