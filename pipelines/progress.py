"""Progress bars of functions that report how much is done."""

from __future__ import annotations

from collections.abc import Callable

from tqdm.auto import tqdm


def shown_by(bar: tqdm) -> Callable[[int, int], None]:
    """A function that shows on `bar` how many of a total are done."""

    def progress(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return progress
