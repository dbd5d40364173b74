"""The sweep of the learning rate, alike for every method."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

# Rates beyond the given ones, on the side of the best one.
MAX_EXTENSIONS = 2
# Significant digits of a rate, so that it is the same number whichever others it was computed from.
DIGITS = 6


def choose_rate(candidates: Sequence[float], score_at: Callable[[float], float | None]) -> tuple[float | None, list[float]]:
    """The rate with the lowest validation score, and the rates that are needed before it can be chosen.

    If the best rate is the smallest or largest one, the next one on that side is needed too, up to `MAX_EXTENSIONS` in all.

    Args:
        candidates: sorted, each above 0; they are rounded to `DIGITS`.
        score_at: the score of a rate, lower is better, infinite for a training that failed; None if it is not known yet.
    Returns: the rate, None if it cannot be chosen yet or every training failed; and the rates without a score.
    """
    rates = list(map(_rounded, candidates))
    for extension in range(MAX_EXTENSIONS + 1):
        scores = {rate: score_at(rate) for rate in rates}
        if missing := [rate for rate, score in scores.items() if score is None]:
            return None, missing
        best = min(rates, key=lambda rate: scores[rate])
        if math.isinf(scores[best]):
            return None, []
        beyond = _beyond(rates, best)
        if beyond is None or extension == MAX_EXTENSIONS:
            break
        rates = sorted([*rates, beyond])
    return best, []


def _beyond(rates: Sequence[float], best: float) -> float | None:
    """The next rate on the side of `best`, in the ratio of the last two; None if `best` is at neither end or alone."""
    if len(rates) < 2 or best not in (rates[0], rates[-1]):
        return None
    neighbour = rates[1] if best == rates[0] else rates[-2]
    return _rounded(best * best / neighbour)


def _rounded(rate: float) -> float:
    return float(f"{rate:.{DIGITS}g}")
