"""The progress of training in status.json."""

from __future__ import annotations

import math
import time

from training.runs.run import RunDirectory

STATUS_SECONDS = 1.0


class TrainingProgress:
    """Writes the progress of training to status.json about once a second."""

    def __init__(self, run: RunDirectory, first: int, total: int) -> None:
        self.run, self.first, self.total = run, first, total
        self.began, self.reported = time.monotonic(), -math.inf

    def report(self, step: int) -> None:
        """Report `step` completed steps."""
        now = time.monotonic()
        if now - self.reported < STATUS_SECONDS and step < self.total:
            return
        self.reported = now
        left = (now - self.began) / (step - self.first) * (self.total - step)
        self.run.update_status(phase="training", step=step, total=self.total, seconds_left=round(left, 1))
