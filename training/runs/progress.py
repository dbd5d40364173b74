"""The share of a run that is done and the time that it still takes, from a plan of its phases that measured times correct."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class PlannedPhase:
    """A phase of a run.

    Args:
        name: as in `RunStatus.phase`.
        seconds: its duration: an estimate, or measured once it has ended; None before either. Of a run that is done, all are
            measured, those of its last session.
        number: from 1, of a phase that is repeated, such as the folds of cross-validation.
    """

    name: str
    seconds: float | None = None
    number: int | None = None


class RunProgress:
    """Follows a run through its plan.

    Args:
        clock: in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.plan: list[PlannedPhase] = []
        self.share: float | None = None
        self._clock = clock
        self._current, self._first, self._fraction = -1, 0.0, 0.0
        self._began, self._begun = clock(), set[int]()

    def expect(self, plan: Sequence[PlannedPhase], share: float | None = None) -> None:
        """Set the phases in order; those that have begun stay as they are.

        Args:
            share: the share that an earlier session of the run has reported; the share never falls.
        """
        begun = self.plan[: self._current + 1]
        self.plan = begun + list(plan[len(begun) :])
        self.share = share if self.share is None else self.share

    def estimate(self, seconds: Mapping[str, float]) -> None:
        """Set the estimates, by name, of the phases that were not measured; those that were skipped count as done."""
        self.plan = [
            replace(phase, seconds=seconds[phase.name])
            if phase.name in seconds and (index >= self._current or phase.seconds is None)
            else phase
            for index, phase in enumerate(self.plan)
        ]

    def measured(self, name: str) -> float:
        """The duration of the phase `name`, which has ended; 0 if it was not measured."""
        return next((phase.seconds for phase in self.plan[: self._current] if phase.name == name and phase.seconds), 0.0)

    def enter(self, name: str, number: int | None = None) -> None:
        """Begin the next phase `name`, or one that was skipped; one that the plan does not have belongs to the current one.

        An empty plan gets the phase.
        """
        self.plan = self.plan or [PlannedPhase(name, number=number)]
        matching = [i for i, phase in enumerate(self.plan) if (phase.name, phase.number) == (name, number)]
        index = next((i for i in matching if i > self._current), None)
        if index is None:
            skipped = next((i for i in matching if i not in self._begun), None)
            if skipped is None:
                return
            index = self._moved(skipped)
        now = self._clock()
        if self._current >= 0:
            self.plan[self._current] = replace(self.plan[self._current], seconds=now - self._began)
        self._current, self._began, self._first, self._fraction = index, now, 0.0, 0.0
        self._begun.add(index)

    def _moved(self, skipped: int) -> int:
        """Move a skipped phase behind the current one; returns its new index."""
        self.plan.insert(self._current, self.plan.pop(skipped))
        self._begun = {index - (index > skipped) for index in self._begun}
        self._current -= 1
        return self._current + 1

    def end(self) -> None:
        """End the run: every phase then has its measured duration, 0 if it was skipped."""
        if self._current >= 0:
            self.plan[self._current] = replace(self.plan[self._current], seconds=self._clock() - self._began)
        self.plan = [phase if index in self._begun else replace(phase, seconds=0.0) for index, phase in enumerate(self.plan)]

    def reach(self, fraction: float, first: float = 0.0) -> None:
        """Report that `fraction` of the current phase is done, of which a session before has done `first`."""
        self._fraction, self._first = fraction, first

    def fields(self) -> dict[str, Any]:
        """The fields of `RunStatus` that this sets."""
        left, share = self.seconds_left(), None
        if left is not None:
            done = self._seconds_of_current() * self._fraction if self._fraction else self._clock() - self._began
            done += sum(phase.seconds or 0.0 for phase in self.plan[: self._current])
            share = done / (done + left) if done + left else 1.0
        elif self._counts():
            share = (self._current + self._fraction) / len(self.plan)
        if share is not None:
            self.share = max(self.share or 0.0, share)
        return {"plan": self.plan, "share": self.share, "seconds_left": None if left is None else round(left, 1)}

    def seconds_left(self) -> float | None:
        """The estimated time to the end; None if the duration of a phase is unknown."""
        total, rest = self._seconds_of_current(), [phase.seconds for phase in self.plan[self._current + 1 :]]
        if total is None or None in rest:
            return None
        left = (1 - self._fraction) * total if self._fraction else max(0.0, total - (self._clock() - self._began))
        return left + sum(rest)

    def _counts(self) -> bool:
        """Whether the share is that of the phases, whose durations are unknown: some are repeated, and one of them has begun."""
        return self._current >= 0 and self.plan[self._current].number is not None

    def _seconds_of_current(self) -> float | None:
        """The duration of the current phase: the estimate, and more and more what the measured pace gives."""
        if self._current < 0:
            return None
        estimate, in_session = self.plan[self._current].seconds, self._fraction - self._first
        if in_session <= 0:
            return estimate
        measured, trust = (self._clock() - self._began) / in_session, in_session / (1 - self._first)
        return measured if estimate is None else trust * measured + (1 - trust) * estimate
