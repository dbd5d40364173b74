"""What an arena does with each task: its datasets, the cells of a sweep, and the cells that are measured."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Protocol

from pipelines.adapter_options import method_flags
from pipelines.built_in import BUILT_IN_CLIP, BUILT_IN_CLIP_NAME, model_path
from pipelines.errors import InputError
from pipelines.run_options import Task
from pipelines.subject.folder_scan import scan_folder
from training.comparison.cells import Cell, cell_key, folder_digest, parsed
from training.comparison.variants import RATE, MethodVariant
from training.options.arena import DIGITS, FEWEST_PHOTOS, ArenaOptions
from training.runs.arena_files import Purpose

# Steps of a cell that measures the pace.
PACE_STEPS = 20
# Measurements of the held-out loss in a training.
MEASUREMENTS = 8
# The folder that all cells share.
CACHE = "cache"


class ArenaTask(Protocol):
    """One of the two tasks, with its data."""

    task: ClassVar[Task]

    @property
    def datasets(self) -> list[str]:
        """The names of the datasets."""

    @property
    def measured_count(self) -> int:
        """How many cells of a variant are measured on a dataset."""

    def default_rate(self, variant: MethodVariant) -> float:
        """The learning rate that the recipe takes by default; 0 for a baseline.

        Raises: InputError if the recipe does not take the variant's options.
        """

    def pace_cell(self, variant: MethodVariant, dataset: str) -> Cell:
        """The cell that measures the seconds of a step."""

    def sweep_cells(self, variant: MethodVariant, dataset: str, seed: int, rate: float, steps: int) -> list[Cell]:
        """The cells on whose validation data the rate for the split `seed` of `dataset` is chosen."""

    def final_cells(self, variant: MethodVariant, dataset: str, rates: Sequence[float | None], steps: int) -> list[Cell]:
        """The cells that are measured; `rates` holds the learning rate for each seed."""


@dataclass(frozen=True)
class SubjectArena:
    """Subjects: a cell is one subject and one seed, which leaves one photo out to be tested on.

    With several subjects, the rate for one is chosen on the other ones. With one subject, it is chosen for each split without
    the tested photo, on another photo that is left out as well.
    """

    task: ClassVar[Task] = "subject"

    options: ArenaOptions
    folders: dict[str, Path]

    @classmethod
    def create(cls, options: ArenaOptions) -> SubjectArena | None:
        """The subjects; None without any.

        Raises: InputError if there is no image, a subject has fewer than three, or a class word belongs to no subject.
        """
        if options.data.subjects_dir is None:
            return None
        scan = scan_folder(Path(options.data.subjects_dir).resolve())
        folders = {subject.path.name: subject.path for subject in scan.subjects}
        if unknown := sorted(options.data.words_by_folder().keys() - folders.keys()):
            raise InputError(
                f"class_words must name folders in {options.data.subjects_dir!r}: {', '.join(folders)}; got {unknown[0]!r}."
            )
        for subject in scan.subjects:
            if len(subject.images) < FEWEST_PHOTOS:
                raise InputError(
                    "A subject needs at least three photos: to train on, to choose a rate on and to test on. "
                    f"{subject.path.name!r} has {len(subject.images)}. Add photos, or remove the folder."
                )
        return cls(options, folders)

    @property
    def datasets(self) -> list[str]:
        """See `ArenaTask`."""
        return list(self.folders)

    @property
    def measured_count(self) -> int:
        """See `ArenaTask`."""
        return len(self.options.data.seeds)

    def default_rate(self, variant: MethodVariant) -> float:
        """See `ArenaTask`."""
        return parsed("subject", tuple(self._flags(self.datasets[0], variant, 0, None, 1))).optimisation.learning_rate

    def pace_cell(self, variant: MethodVariant, dataset: str) -> Cell:
        """See `ArenaTask`."""
        flags = [*self._flags(dataset, variant, 0, None, PACE_STEPS), "--heldout_image", self._photos(dataset)[0], "--dry_run"]
        return self._cell(variant, dataset, "pace", None, None, flags)

    def sweep_cells(self, variant: MethodVariant, dataset: str, seed: int, rate: float, steps: int) -> list[Cell]:
        """See `ArenaTask`."""
        others = [name for name in self.folders if name != dataset]
        if others:
            return [self._sweep_cell(variant, name, 0, rate, steps, None) for name in others]
        return [self._sweep_cell(variant, dataset, seed, rate, steps, self._tested(dataset, seed))]

    def _sweep_cell(self, variant: MethodVariant, dataset: str, seed: int, rate: float, steps: int, tested: str | None) -> Cell:
        photos = [name for name in self._photos(dataset) if name != tested]
        excluded = [] if tested is None else ["--excluded_images", tested]
        heldout = photos[seed % len(photos)] if tested is not None else photos[-1]
        flags = [*self._flags(dataset, variant, seed, rate, steps), "--heldout_image", heldout, *excluded]
        return self._cell(variant, dataset, "sweep", rate, seed, [*flags, "--heldout_steps", str(steps)])

    def final_cells(self, variant: MethodVariant, dataset: str, rates: Sequence[float | None], steps: int) -> list[Cell]:
        """See `ArenaTask`."""
        cells = []
        for seed, rate in zip(self.options.data.seeds, rates, strict=True):
            flags = [*self._flags(dataset, variant, seed, rate, steps), "--heldout_image", self._tested(dataset, seed)]
            flags += ["--heldout_steps", str(max(1, steps // MEASUREMENTS)), "--evaluate"]
            cells.append(self._cell(variant, dataset, "final", rate, seed, flags))
        return cells

    def _photos(self, dataset: str) -> list[str]:
        return photo_names(self.folders[dataset])

    def _tested(self, dataset: str, seed: int) -> str:
        """The photo that the split `seed` tests on."""
        photos = self._photos(dataset)
        return photos[seed % len(photos)]

    def _flags(self, dataset: str, variant: MethodVariant, seed: int, rate: float | None, steps: int) -> list[str]:
        word = self.options.data.words_by_folder().get(dataset, dataset.replace("_", " "))
        return [
            *variant.flags(),
            *("--instance_data_dir", str(self.folders[dataset]), "--instance_prompt", f"a photo of sks {word}"),
            *("--pretrained_model_name_or_path", self.options.models.pretrained_model_name_or_path),
            *("--max_train_steps", str(steps), "--seed", str(seed)),
            *(() if rate is None else (f"--{RATE}", repr(rate))),
            *("--no_certify", "--no_validation_images", *shared_flags(self.options)),
            *shlex.split(self.options.models.subject_flags),
        ]

    def _cell(
        self, variant: MethodVariant, dataset: str, purpose: Purpose, rate: float | None, seed: int | None, flags: Sequence[str]
    ) -> Cell:
        model = model_path(self.options.models.pretrained_model_name_or_path)
        inputs = [folder_digest(self.folders[dataset]), model_digest(model)]
        if purpose == "final":
            scorer = parsed("subject", tuple(flags)).validation.image_scorer
            inputs.append(model_digest(str(BUILT_IN_CLIP) if scorer == BUILT_IN_CLIP_NAME else scorer))
        key = cell_key("subject", tuple(flags), variant, tuple(inputs))
        return Cell("subject", dataset, variant.label, purpose, rate, seed, tuple(flags), key)


@dataclass(frozen=True)
class FewShotArena:
    """Labelled datasets: a cell has all shots and seeds of one dataset.

    The rate is chosen at the most shots with the first seed, on more validation images than the recipe's. The test images of
    all seeds are the same, and no sweep sees them.
    """

    task: ClassVar[Task] = "few-shot"

    options: ArenaOptions
    paths: dict[str, Path | None]

    @classmethod
    def create(cls, options: ArenaOptions) -> FewShotArena | None:
        """The datasets; None without any.

        Raises: InputError for a path that does not exist, or two datasets of one name.
        """
        if not options.data.datasets:
            return None
        paths = {given: None if given == DIGITS else Path(given).resolve() for given in options.data.datasets}
        for given, path in paths.items():
            if path is not None and not path.exists():
                raise InputError(f"datasets must be {DIGITS!r} or existing paths, got {given!r}. Check the path.")
        names = {DIGITS if path is None else path.stem: path for path in paths.values()}
        if len(names) < len(paths):
            raise InputError(f"datasets must have different names, got {' '.join(paths)}. Rename a folder.")
        return cls(options, names)

    @property
    def datasets(self) -> list[str]:
        """See `ArenaTask`."""
        return list(self.paths)

    @property
    def measured_count(self) -> int:
        """See `ArenaTask`."""
        return 2 if self.options.data.base_to_new else 1

    def default_rate(self, variant: MethodVariant) -> float:
        """See `ArenaTask`."""
        options = parsed("few-shot", tuple(self._flags(self.datasets[0], variant, None, 1)))
        return 0.0 if variant.is_baseline else options.learning_rate(variant.method)

    def pace_cell(self, variant: MethodVariant, dataset: str) -> Cell:
        """See `ArenaTask`."""
        flags = [*self._flags(dataset, variant, None, PACE_STEPS), *self._splits(self.options.data.shots[-1:], [0])]
        return self._cell(variant, dataset, "pace", None, flags)

    def sweep_cells(self, variant: MethodVariant, dataset: str, seed: int, rate: float, steps: int) -> list[Cell]:
        """See `ArenaTask`."""
        data = self.options.data
        flags = [*self._flags(dataset, variant, rate, steps), *self._splits([max(data.shots)], data.seeds[:1])]
        return [
            self._cell(variant, dataset, "sweep", rate, [*flags, "--num_validation_images", str(data.sweep_validation_images)])
        ]

    def final_cells(self, variant: MethodVariant, dataset: str, rates: Sequence[float | None], steps: int) -> list[Cell]:
        """See `ArenaTask`."""
        data, rate = self.options.data, rates[0]
        flags = self._flags(dataset, variant, rate, steps)
        measured = ["--validation_steps", str(max(1, steps // MEASUREMENTS))]
        cells = [self._cell(variant, dataset, "final", rate, [*flags, *self._splits(data.shots, data.seeds), *measured])]
        if data.base_to_new:
            splits = self._splits([max(data.shots)], data.seeds)
            cells.append(self._cell(variant, dataset, "base-to-new", rate, [*flags, *splits, "--base_to_new"]))
        return cells

    @staticmethod
    def _splits(shots: Sequence[int], seeds: Sequence[int]) -> list[str]:
        return ["--shots", *map(str, shots), "--seeds", *map(str, seeds)]

    def _flags(self, dataset: str, variant: MethodVariant, rate: float | None, steps: int) -> list[str]:
        path, model = self.paths[dataset], self.options.models
        return [
            *variant.flags(),
            *(() if path is None else ("--data_dir", str(path))),
            *("--model", model.model, *(() if model.pretrained is None else ("--pretrained", model.pretrained))),
            *("--max_train_steps", str(steps), *(() if rate is None else (f"--{RATE}", repr(rate)))),
            *shared_flags(self.options),
            *shlex.split(model.fewshot_flags),
        ]

    def _cell(self, variant: MethodVariant, dataset: str, purpose: Purpose, rate: float | None, flags: Sequence[str]) -> Cell:
        path, model = self.paths[dataset], self.options.models.model
        folder = str(BUILT_IN_CLIP) if model == BUILT_IN_CLIP_NAME else model
        inputs = (DIGITS if path is None else folder_digest(path), model_digest(folder))
        key = cell_key("few-shot", tuple(flags), variant, inputs)
        return Cell("few-shot", dataset, variant.label, purpose, rate, None, tuple(flags), key)


def shared_flags(options: ArenaOptions) -> list[str]:
    """The flags of all cells: one cache for what the base model computes, and no more files than a cell needs."""
    cache_dir = Path(options.output.output_dir).resolve() / CACHE
    return ["--cache_dir", str(cache_dir), "--report_to", "none", "--checkpoints_total_limit", "1"]


@lru_cache(maxsize=64)
def photo_names(folder: Path) -> list[str]:
    """The names of the images in a subject's folder."""
    return [path.name for path in scan_folder(folder).subjects[0].images]


def model_digest(name: str) -> str:
    """A hash of a local model's files, or its name on a hub."""
    return folder_digest(Path(name)) if Path(name).exists() else name


def check_flags(options: ArenaOptions) -> None:
    """Check that the further flags set nothing that the arena sets itself.

    Raises: InputError naming the flag.
    """
    reserved = {
        "method",
        RATE,
        "seed",
        "seeds",
        "shots",
        "max_train_steps",
        "output_dir",
        "heldout_image",
        "instance_data_dir",
        "data_dir",
    }
    for name in ("subject_flags", "fewshot_flags"):
        words = [
            word.removeprefix("--").partition("=")[0]
            for word in shlex.split(getattr(options.models, name))
            if word.startswith("--")
        ]
        if wrong := sorted(reserved & set(words)):
            raise InputError(f"{name} must not set --{wrong[0]}, which the arena sets for each training.")
        if of_methods := sorted((method_flags("subject") | method_flags("few-shot")) & set(words)):
            raise InputError(
                f"{name} must not set --{of_methods[0]}, an option of methods. Write it in --methods, as in lora:rank=8."
            )
