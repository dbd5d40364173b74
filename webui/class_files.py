"""Downloads of a classifier: its adapter, the exported LoRA, the table of predictions, its report card."""

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
    """The downloadable files of a result, by the keys of `TITLES`; cached until the run changes."""
    return dict(_made(result.record.path.absolute(), result.trial.folder, result.folder.stat().st_mtime_ns))


@lru_cache(maxsize=64)
def _made(run: Path, trial: str, changed: int) -> tuple[tuple[str, Path], ...]:
    result = result_of(RunRecord(run), trial)
    stem = f"{run.name}-{result.trial.method}"
    folder = Path(tempfile.mkdtemp(prefix="nora-vision-", dir=_folder()))
    files: dict[str, Path] = {}
    exported = run / "export" / "lora" if result.trial.folder == result.report.classifier else None
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
    """A temporary folder of this process that only its user can read."""
    return tempfile.mkdtemp(prefix="nora-vision-")


def _zipped(folder: Path, path: Path, patterns: Sequence[str] = ("**/*",)) -> Path:
    """Zip the files of a folder that match one of the patterns; returns `path`."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(file for pattern in patterns for file in folder.glob(pattern) if file.is_file()):
            archive.write(file, f"{path.stem}/{file.relative_to(folder).as_posix()}")
    return path


def tested_rows(result: Result) -> list[list[str]]:
    """A header, and a row for each test image: true class, predicted class, probability and the runners-up."""
    names, count = result.classes, min(RUNNERS_UP, len(result.classes))
    head = [f"{what} {rank}" for rank in range(2, count + 1) for what in ("class", "probability")]
    rows = [["image", "true class", "predicted class", "correct", "probability", *head]]
    for one in result.tested():
        others = [word for rank, value in one.top[1:count] for word in (names[int(rank)], f"{value:.6g}")]
        right = "yes" if one.is_right else "no"
        rows.append([one.name, names[one.true], names[one.predicted], right, f"{one.confidence:.6g}", *others])
    return rows


def write_table(path: Path, rows: Sequence[Sequence[str]]) -> Path:
    """Write a CSV file whose cells a spreadsheet does not evaluate as formulas."""
    stream = io.StringIO(newline="")
    csv.writer(stream).writerows([map(harmless, row) for row in rows])
    # File names need not be valid UTF-8.
    path.write_text(stream.getvalue(), encoding="utf-8", errors="backslashreplace", newline="")
    return path


def new_table(rows: Sequence[Sequence[str]]) -> Path:
    """Write the rows to a new CSV file for download; returns its path."""
    return write_table(Path(tempfile.mkdtemp(dir=_folder())) / "predictions.csv", rows)
