"""What can be taken along of a classifier: its adapter, the exported LoRA, a table of what it made of the test, its card."""

from __future__ import annotations

import csv
import io
import tempfile
import zipfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from pipelines.tables import harmless
from training.runs.record import RunRecord
from webui.class_results import Result, result_of

# What the page calls each, and how its file is called.
COMPACT, FULL, LORA, TABLE, CARD = "compact", "full", "lora", "table", "card"
TITLES = {
    COMPACT: "Adapter, compact",
    FULL: "Adapter, full",
    LORA: "LoRA for other programs",
    TABLE: "Table of predictions (CSV)",
    CARD: "Report card",
}
RUNNERS_UP = 3


def downloads(result: Result) -> dict[str, Path]:
    """The files that there are of a result, by the names of `TITLES`; the same ones for as long as the run stays as it is."""
    return dict(_made(result.record.path.absolute(), result.trial["folder"], result.folder.stat().st_mtime_ns))


@lru_cache(maxsize=64)
def _made(run: Path, trial: str, changed: int) -> tuple[tuple[str, Path], ...]:
    result = result_of(RunRecord(run), trial)
    stem = f"{run.name}-{result.trial['method']}"
    folder = Path(tempfile.mkdtemp(prefix="nora-vision-", dir=_folder()))
    files: dict[str, Path] = {}
    exported = run / "export" / "lora" if result.trial["folder"] == result.report["classifier"] else None
    adapter = result.folder / "adapter"
    for name, source in ((COMPACT, adapter / COMPACT), (FULL, adapter / FULL), (LORA, exported)):
        if source is not None and source.is_dir():
            files[name] = _zipped(source, folder / f"{stem}-{name}.zip")
    if result.tested():
        files[TABLE] = write_table(folder / f"{stem}-predictions.csv", tested_rows(result))
    if (run / "README.md").is_file():
        files[CARD] = _zipped(run, folder / f"{run.name}-report.zip", ("README.md", "report.json", "figures/*.png"))
    return tuple(files.items())


@lru_cache(maxsize=1)
def _folder() -> str:
    """Of this process, readable by its user alone."""
    return tempfile.mkdtemp(prefix="nora-vision-")


def _zipped(folder: Path, path: Path, patterns: Sequence[str] = ("**/*",)) -> Path:
    """The files of a folder that fit one of the patterns, in a zip."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(file for pattern in patterns for file in folder.glob(pattern) if file.is_file()):
            archive.write(file, f"{path.stem}/{file.relative_to(folder).as_posix()}")
    return path


def tested_rows(result: Result) -> list[list[str]]:
    """A header, and a row for each test image: what it shows, what it was taken for, how surely, and the runners-up."""
    names, count = result.classes, min(RUNNERS_UP, len(result.classes))
    head = [f"{what} {rank}" for rank in range(2, count + 1) for what in ("class", "probability")]
    rows = [["picture", "true class", "predicted class", "right", "probability", *head]]
    for one in result.tested():
        others = [word for rank, value in one.top[1:count] for word in (names[int(rank)], f"{value:.6g}")]
        right = "yes" if one.is_right else "no"
        rows.append([one.name, names[one.true], names[one.predicted], right, f"{one.confidence:.6g}", *others])
    return rows


def write_table(path: Path, rows: Sequence[Sequence[str]]) -> Path:
    """Write a CSV in which no cell is a formula to a spreadsheet."""
    stream = io.StringIO(newline="")
    csv.writer(stream).writerows([map(harmless, row) for row in rows])
    # Names of files need not be UTF-8.
    path.write_text(stream.getvalue(), encoding="utf-8", errors="backslashreplace", newline="")
    return path


def new_table(rows: Sequence[Sequence[str]]) -> Path:
    """The same in a new file that can be downloaded."""
    return write_table(Path(tempfile.mkdtemp(dir=_folder())) / "predictions.csv", rows)
