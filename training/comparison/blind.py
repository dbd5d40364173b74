"""Sheets of generated images that a person can judge without knowing the methods."""

from __future__ import annotations

import csv
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase

from PIL import Image

from pipelines.images import labelled_grid
from training.runs.arena_files import BLIND, KEY, RATINGS, Observation
from training.runs.subject_files import EVALUATION

# Images of each method on a sheet.
COLUMNS = 8


def write_sheets(observations: Sequence[Observation], arena: Path, seed: int = 0) -> list[Path]:
    """Write a sheet for each subject and seed: a row of images for each method, in an order of its own, named by a letter.

    The key of the letters is in a file apart, and an empty table of ratings beside the sheets.

    Args:
        arena: the directory of the arena; the images are in `evaluation/subject/` of its cells.
        seed: of the orders.
    Returns: the sheets.
    """
    rows: dict[str, dict[str, list[Path]]] = defaultdict(dict)
    for one in observations:
        images = sorted((arena / one.cell / EVALUATION / "subject").glob("*.png")) if one.task == "subject" else []
        if images:
            rows[f"{one.dataset}-seed-{one.seed}"][one.variant] = images[:COLUMNS]
    if not rows:
        return []
    folder, key = arena / BLIND, {}
    folder.mkdir(exist_ok=True)
    for sheet, images_by_variant in sorted(rows.items()):
        order = sorted(images_by_variant)
        random.Random(f"{seed} {sheet}").shuffle(order)
        key[sheet] = {letters(index): variant for index, variant in enumerate(order)}
        images = [(letter, [_opened(path) for path in images_by_variant[variant]]) for letter, variant in key[sheet].items()]
        labelled_grid(images, [""] * COLUMNS).save(folder / f"{sheet}.png")
    (folder / KEY).write_text(json.dumps(key, indent=2) + "\n", encoding="utf-8")
    _write_ratings(key, folder / RATINGS)
    return [folder / f"{sheet}.png" for sheet in key]


def letters(index: int) -> str:
    """A, B, ..., Z, AA, AB, ..."""
    return (letters(index // 26 - 1) if index >= 26 else "") + ascii_uppercase[index % 26]


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _write_ratings(key: dict[str, dict[str, str]], path: Path) -> None:
    """An empty table for the ratings, unless somebody has begun to fill one."""
    if path.exists():
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sheet", "row", "likeness (1 to 5)", "prompt (1 to 5)"])
        writer.writerows([sheet, letter, "", ""] for sheet, rows in key.items() for letter in rows)
