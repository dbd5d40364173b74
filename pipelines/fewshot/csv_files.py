"""Read a CSV of labelled images: one row per image with its path, its label and optionally its part of a split."""

from __future__ import annotations

import csv
import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import InputError
from pipelines.fewshot.layouts import counted, is_or_are, listed
from pipelines.fewshot.split_words import PARTS, Part, part_of_value, split_column
from pipelines.images import has_image_name
from pipelines.text_files import read_text

DELIMITERS = ",;\t"
PATH, LABEL = "path", "label"


@dataclass(frozen=True)
class Row:
    """A labelled image.

    Args:
        line: number of the row's last line.
        name: path of the image, relative to the CSV's folder or absolute.
        label: its class.
        part: of the split; None if the CSV defines no split.
    """

    line: int
    name: str
    label: str
    part: Part | None


@dataclass(frozen=True)
class _Table:
    """The stripped cells of a CSV by line and column; `path` and `label` are lower case, other columns as in the file."""

    columns: tuple[str, ...]
    rows: tuple[tuple[int, dict[str, str]], ...]


def read_rows(path: Path) -> tuple[list[Row], list[str]]:
    """The rows of the CSV at `path`, and notes on its columns.

    The first line names the columns: path, label, and optionally a split column. That column is called split, subset, set, part,
    partition or usage, or it contains only words for the parts of a split. Column names are case-insensitive.

    Raises: InputError naming the file, and the line or column that cannot be used.
    """
    where = repr(str(path))
    table = _table(path, where)
    others = [column for column in dict.fromkeys(table.columns) if column not in (PATH, LABEL)]
    values = {column: [row[column] for _, row in table.rows if row[column]] for column in others}
    column = split_column(others, values, where)
    rows: list[Row] = []
    line_of: dict[str, int] = {}
    for line, cells in table.rows:
        name, label, at = Path(cells[PATH]).as_posix(), cells[LABEL], f"Line {line} of {where}"
        _check_file(path.parent / name, f"{at} lists {name!r} of class {label!r}")
        if name in line_of:
            raise InputError(f"{at} lists {name!r} of class {label!r} again, after line {line_of[name]}. Remove one.")
        line_of[name] = line
        rows.append(Row(line, name, label, None if column is None else _part(cells[column], at, column)))
    return rows, _notes(rows, column, [other for other in others if other != column and (other or values[other])])


def _part(value: str, at: str, column: str) -> Part:
    if not value:
        raise InputError(f"{at} has no value for {column!r}, but other lines have. Give every line one of {', '.join(PARTS)}.")
    return part_of_value(value, at, column)


def _check_file(path: Path, what: str) -> None:
    if not path.is_file():
        raise InputError(f"{what}, but there is no such file. Correct the path.")
    if not has_image_name(path.name):
        raise InputError(f"{what}, but its suffix is not that of an image. Convert the image or remove the line.")


def _notes(rows: list[Row], column: str | None, unused: list[str]) -> list[str]:
    notes = []
    if column is not None:
        counts = Counter(row.part for row in rows)
        counted_parts = ", ".join(f"{part} {counted(counts[part])}" for part in PARTS if counts[part])
        notes.append(f"Split by the column {column!r}: {counted_parts}.")
    if unused:
        noun = "column" if len(unused) == 1 else "columns"
        notes.append(f"The {noun} {listed(unused)} {is_or_are(len(unused))} not used.")
    return notes


def _table(path: Path, where: str) -> _Table:
    text = read_text(path)
    header = text.partition("\n")[0]
    delimiter = max(DELIMITERS, key=header.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        return _checked(reader, where, header.strip())
    except csv.Error as error:
        raise InputError(
            f"{where} cannot be read after line {reader.line_num} ({error}). Correct or remove the next line."
        ) from error


def _checked(reader: csv.DictReader, where: str, header: str) -> _Table:
    columns = _columns(reader, where, header)
    reader.fieldnames = columns
    rows = []
    for row in reader:
        if None in row or not all((row[column] or "").strip() for column in (PATH, LABEL)):
            raise InputError(f"Line {reader.line_num} of {where} must have a path and a label, got {row}. Correct or remove it.")
        rows.append((reader.line_num, {column: (value or "").strip() for column, value in row.items()}))
    return _Table(columns, tuple(rows))


def _columns(reader: csv.DictReader, where: str, header: str) -> tuple[str, ...]:
    """The names of the columns. Raises: InputError if two are the same, or path or label is missing."""
    columns = tuple(_column(header_cell) for header_cell in reader.fieldnames or ())
    # Spreadsheets may add columns without a name after the last one.
    twice = [column for column, count in Counter(column.casefold() for column in columns if column).items() if count > 1]
    if twice:
        raise InputError(f"The first line of {where} names the column {twice[0]!r} more than once, got {header!r}. Rename one.")
    if not {PATH, LABEL} <= set(columns):
        raise InputError(f"The first line of {where} must name the columns path and label, got {header!r}. Add them.")
    return columns


def _column(header_cell: str) -> str:
    """The name of a column: `path` and `label` in lower case, others as in the file."""
    name = header_cell.strip()
    return name.casefold() if name.casefold() in (PATH, LABEL) else name
