"""Validation during the training of an adapter: its accuracy over time, without any effect on the training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic

import torch

from pipelines.fewshot.metrics import top1
from training.fewshot.experiment import SplitImages
from training.runs.run import RunDirectory


class FittingClock:
    """The time since it was created, without pauses."""

    def __init__(self) -> None:
        self._began, self._paused = monotonic(), 0.0

    @property
    def seconds(self) -> float:
        """Seconds since the start, without those of finished pauses."""
        return monotonic() - self._began - self._paused

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose time is not counted."""
        began = monotonic()
        try:
            yield
        finally:
            self._paused += monotonic() - began


@dataclass(frozen=True)
class ValidationCallback:
    """Logs the accuracy of an adapter at scale 1 on the validation images, and the seconds of fitting until then.

    Args:
        run: the trial's directory.
        images: of the split.
        logits: of the validation images, (n, classes), by the model in training.
        clock: of fitting; the validation is not counted.
    """

    run: RunDirectory
    images: SplitImages
    logits: Callable[[], torch.Tensor]
    clock: FittingClock

    def __call__(self, step: int) -> None:
        """Validate after `step` steps. Returns no score: which checkpoints stay does not depend on it."""
        seconds = self.clock.seconds
        with self.clock.paused():
            labels = torch.tensor([image.label for image in self.images.validation])
            self.run.log(step, validation_top1=top1(self.logits(), labels), seconds=seconds)
