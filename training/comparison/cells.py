"""A cell of an arena: one run of an ordinary recipe, in a directory whose name depends on everything that the result does."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from pipelines.adapter_options import method_flags, options_of
from pipelines.digests import file_digest
from pipelines.optimizers import ADAMW
from pipelines.run_options import Task
from training.comparison.variants import MethodVariant
from training.options import SubjectOptions
from training.options.command_line import options_from_flags
from training.options.fewshot import FewShotOptions
from training.runs.arena_files import CELLS, CellDescription, CellRecord
from training.runs.recipe_process import recipe_command

RECIPES: dict[Task, str] = {"subject": "training.dreambooth_nora", "few-shot": "training.fewshot_nora"}
# Options that name folders. What is in them is a part of the key.
FOLDERS = ("instance_data_dir", "data_dir", "cache_dir", "output_dir", "pretrained_model_name_or_path", "model")
# Groups that do not change a result.
WITHOUT_EFFECT = ("output",)


@dataclass(frozen=True)
class Cell(CellDescription):
    """A cell that can be started.

    Args:
        flags: of the recipe, without the run directory.
        key: a hash of the options, the images and the base model.
    """

    flags: tuple[str, ...]
    key: str

    @property
    def is_measured(self) -> bool:
        """Whether its results are in the report."""
        return self.purpose in ("final", "base-to-new")

    def folder(self, arena: Path) -> Path:
        """Its run directory in the directory `arena`."""
        rate = "" if self.learning_rate is None else f"-rate-{self.learning_rate:.3g}"
        seed = "" if self.seed is None else f"-seed-{self.seed}"
        name = f"{self.purpose}{rate}{seed}-{self.key[:10]}"
        return arena / CELLS / self.task / file_name(self.dataset) / file_name(self.variant) / name

    def description(self) -> dict[str, Any]:
        """What it is for, by the names of the fields of `CellDescription`."""
        return {each.name: getattr(self, each.name) for each in fields(CellDescription)}

    def record_to_start(self, arena: Path) -> CellRecord:
        """The record with which it is started: its earlier one if it was stopped, and a new one otherwise."""
        record = CellRecord.read(self.folder(arena))
        if record is not None and record.state != "failed":
            return record
        command = recipe_command(RECIPES[self.task], [*self.flags, "--output_dir", str(self.folder(arena))])
        return CellRecord(**self.description(), command=command, state="running")


def file_name(text: str) -> str:
    """`text` with all characters but letters, digits and some others replaced, for names of files."""
    return re.sub(r"[^\w.=,-]+", "_", text)


@lru_cache(maxsize=256)
def folder_digest(folder: Path) -> str:
    """A hash of the names and contents of all files in `folder`, or of a single file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else [folder]
    lines = (f"{path.relative_to(folder)} {file_digest(path)}" for path in files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@cache
def parsed(task: Task, flags: tuple[str, ...]) -> SubjectOptions | FewShotOptions:
    """The options of the recipe with `flags`.

    Raises: InputError for an invalid option.
    """
    return options_from_flags(SubjectOptions if task == "subject" else FewShotOptions, flags)


@cache
def cell_key(task: Task, flags: tuple[str, ...], variant: MethodVariant, inputs: tuple[str, ...]) -> str:
    """A hash of the options of a run and of its inputs.

    Of the options of adapter methods only those of the variant's method count, so that a new method changes no other key.

    Args:
        inputs: digests of the images and of the base model.
    """
    options = parsed(task, flags)
    general = {name: value for name, value in _general(options.to_dict(), task) if name not in FOLDERS}
    if isinstance(options, FewShotOptions):
        # As it is resolved. AdamW is left out, as in the keys of before there was a choice.
        del general["optimizer"]
        if not variant.is_baseline and (optimizer := options.optimizer(variant.method)) != ADAMW:
            general["optimizer"] = optimizer
    of_method: dict[str, Any] = {}
    if not variant.is_baseline:
        group = options.adapter if task == "subject" else options.method
        built_in = task == "few-shot" and options.model.is_built_in
        of_method = options_of(group, task, built_in, variant.method)
    content = json.dumps([task, general, of_method, inputs], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def _general(groups: Mapping[str, Mapping[str, Any]], task: Task) -> Iterator[tuple[str, Any]]:
    """The options of all groups with an effect that are not options of adapter methods."""
    of_methods = _method_flags(task)
    for name, group in groups.items():
        if name not in WITHOUT_EFFECT:
            yield from ((option, value) for option, value in group.items() if option not in of_methods)


_method_flags = lru_cache(method_flags)
