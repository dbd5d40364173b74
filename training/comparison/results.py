"""The results of the cells that have ended: those of an arena, and those that it takes over from others."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.errors import InputError
from pipelines.text_files import read_text, write_text_atomically
from training.comparison.cells import Cell
from training.comparison.measures import observations_of, seconds_per_step, validation_score
from training.runs.arena_files import RESULTS, CellRecord, CellResult
from training.runs.run_files import CHECKPOINTS


class CellResults:
    """The results of the cells of an arena, by their keys. They are in one file, which another arena can take over.

    Args:
        arena: its directory.
        others: files of results of other arenas. The arena's own results come before theirs.
        retry_failed: whether cells that have failed are to be run again.
    Raises: InputError if a file cannot be read.
    """

    def __init__(self, arena: Path, others: Sequence[Path] = (), retry_failed: bool = False) -> None:
        self._arena, self._others, self._retry_failed = arena, others, retry_failed
        self.read()

    def read(self) -> None:
        """Read the files, again when no other arena writes them any more. Raises: InputError if one cannot be read."""
        written = [self._arena / RESULTS] if (self._arena / RESULTS).exists() else []
        results = [result for path in (*self._others, *written) for result in read_results(path)]
        self._by_key = {one.key: one for one in results if not (self._retry_failed and one.state == "failed")}

    def of(self, cell: Cell) -> CellResult | None:
        """The result of `cell`; None if it has not ended, or is to be run again."""
        return self._by_key.get(cell.key)

    def add(self, result: CellResult) -> None:
        """Add the result of a cell that has ended as it is read from the file, and write the file."""
        self._by_key[result.key] = CellResult.from_line(result.line)
        self.write()

    def write(self) -> None:
        """Write the file."""
        self._arena.mkdir(parents=True, exist_ok=True)
        write_text_atomically(self._arena / RESULTS, "".join(result.line for result in self._by_key.values()))


def read_results(path: Path) -> list[CellResult]:
    """The results in a file.

    Raises: InputError if it is missing or cannot be read.
    """
    if not path.is_file():
        raise InputError(
            f"results must name files such as the {RESULTS} of an arena, but {str(path)!r} is no file. Check the path."
        )
    return [CellResult.from_line(line, str(path)) for line in read_text(path).splitlines()]


def result_of(cell: Cell, record: CellRecord, arena: Path) -> CellResult:
    """The result of a cell that has ended. The checkpoints of one that has ended well are deleted: it is never resumed.

    Raises: InputError if its run directory lacks what it measures.
    """
    measured: dict[str, Any] = {}
    if record.state == "done":
        measured = _measured(cell, arena)
        for checkpoints in list(cell.folder(arena).rglob(CHECKPOINTS)):
            shutil.rmtree(checkpoints)
    return CellResult(**cell.description(), key=cell.key, state=record.state, reason=record.reason, **measured)


def _measured(cell: Cell, arena: Path) -> dict[str, Any]:
    """What a cell has measured, by the name of the field of `CellResult`."""
    if cell.purpose == "pace":
        return {"seconds_per_step": seconds_per_step(cell.task, cell.folder(arena))}
    if cell.purpose == "sweep":
        return {"score": validation_score(cell.task, cell.folder(arena))}
    return {"observations": tuple(observations_of(cell, arena))}
