"""The next arena: its data, methods and budget, its start, and how many trainings it needs; and which trainings run."""

from __future__ import annotations

import csv
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Literal

from pipelines.errors import InputError
from pipelines.fewshot.data import rename
from pipelines.fewshot.layouts import counted
from pipelines.fewshot.loading import load_folder
from pipelines.fewshot.shots import MOST_VALIDATION
from pipelines.methods import DEFAULT, REFERENCE
from pipelines.run_file import ResolvedOptions
from training.fewshot.plan import TRAINED, estimated_seconds
from training.options.arena import (
    ALL,
    DIGITS,
    FEWEST_PHOTOS,
    ArenaDataOptions,
    ArenaMethodOptions,
    ArenaOptions,
    ArenaOutputOptions,
)
from training.options.values import built
from training.runs.arena_files import CELLS, CellRecord
from training.runs.naming import BASELINES, method_name, variant_title
from training.runs.snapshot import read_cached
from training.subject.plan import expected_pace, total_seconds
from webui import launching
from webui.datasets import Dataset
from webui.draft import CLASS_WORDS, EXAMPLE, Draft
from webui.form_schema import CHOICES, METHOD
from webui.labelled_datasets import EXAMPLES, LabelledClasses, find_classes
from webui.runs import RunView, duration
from webui.workspace import Workspace

SUBJECTS, CLASSES, NEW_ARENA = "subjects", "classes", "NEW-ARENA"
METHODS = CHOICES["classify"][METHOD]
METHOD_CHOICES = [("Every method", ALL), *((method_name(name), name) for name in METHODS)]
DEFAULT_METHODS = [REFERENCE, DEFAULT]
# The newest records of trainings, among which the running ones are looked for.
NEWEST = 32


@dataclass(frozen=True)
class ArenaPlan:
    """The next arena.

    Args:
        workspace: of the user.
        photos: ids of photo datasets; `EXAMPLE` for the bundled subject.
        words: the class word of each of them, separated by commas.
        classes: ids of labelled datasets.
        methods: names of methods, or `ALL`.
        unit: of the budget of each training.
        budget: steps or seconds.
        seeds: how many.
        shots: training images per class.
    """

    workspace: Workspace
    photos: Sequence[str]
    words: str
    classes: Sequence[str]
    methods: Sequence[str]
    unit: Literal["steps", "seconds"]
    budget: float
    seeds: int
    shots: Sequence[int]

    @cached_property
    def subjects(self) -> dict[str, tuple[str, Dataset]]:
        """The class word and the photos of each subject, by the name of its folder.

        Raises: InputError if a class word is missing or invalid, or there are too few photos.
        """
        words = [" ".join(word.split()) for word in self.words.split(",") if word.strip()]
        if len(words) != len(self.photos):
            raise InputError(
                f"Enter a class word for each chosen subject, separated by commas, such as dog, coffee mug. "
                f"{counted(len(self.photos), 'subject')} chosen, got {counted(len(words), 'word')}."
            )
        if wrong := next((word for word in words if not CLASS_WORDS.fullmatch(word)), None):
            raise InputError(f"A class word must be one to four plain words, such as dog or coffee mug, got {wrong[:40]!r}.")
        sets = [Dataset.of(self.workspace, None if name == EXAMPLE else name) for name in self.photos]
        for word, count in zip(words, (len(dataset.photos()) for dataset in sets), strict=True):
            if count < FEWEST_PHOTOS:
                raise InputError(f"The subject {word} has {counted(count, 'photo')}. An arena needs at least {FEWEST_PHOTOS}.")
        return dict(zip(_different(words), zip(words, sets, strict=True), strict=True))

    @cached_property
    def labelled(self) -> dict[str, LabelledClasses]:
        """The labelled datasets by their names. Raises: InputError if one is not ready."""
        sets = [find_classes(self.workspace, name) for name in self.classes]
        for one in sets:
            one.check()
        return dict(zip(_different(list(map(_name_of, sets))), sets, strict=True))

    def options(self, path: Path) -> ArenaOptions:
        """The options of an arena in the directory `path`.

        Raises: InputError if it cannot be started.
        """
        self._check_choice()
        data = ArenaDataOptions(
            subjects_dir=str(path / SUBJECTS) if self.subjects else None,
            class_words=[f"{name}={word}" for name, (word, _) in self.subjects.items()] or None,
            datasets=[_source(path, name, one) for name, one in self.labelled.items()],
            shots=sorted(self.shots),
            seeds=list(range(self.seeds)),
            sweep_validation_images=self._validation_images(),
        )
        steps, seconds = (round(self.budget), None) if self.unit == "steps" else (None, self.budget)
        methods = ArenaMethodOptions(list(self.methods), max_train_steps=steps, max_train_seconds=seconds)
        return ArenaOptions(data, methods, output=ArenaOutputOptions(output_dir=str(path)))

    def _check_choice(self) -> None:
        if not (self.photos or self.classes):
            raise InputError("Choose photos of a subject, labelled datasets, or both.")
        if not self.classes and set(self.methods) <= BASELINES.keys():
            raise InputError("Choose an adapter method: without one, only classifiers can be compared.")
        if unknown := next((name for name in self.methods if name not in (ALL, *METHODS)), None):
            raise InputError(f"methods must be among {', '.join((ALL, *METHODS))}, got {unknown!r:.40}.")

    def _validation_images(self) -> int:
        """How many images per class a learning rate is chosen on, at most; those of the smallest class bound it."""
        shots, most = max(self.shots, default=1), ArenaDataOptions.sweep_validation_images
        for name, one in self.labelled.items():
            needed = shots + min(shots, MOST_VALIDATION)
            if one.fewest < needed:
                raise InputError(
                    f"{shots} shots need {needed} images of each class besides the test images. The smallest class of {name} "
                    f"has {one.fewest}. Choose fewer shots, or add images."
                )
            most = min(most, one.fewest - shots)
        return most

    def steps(self, seconds: float) -> int:
        """The steps of a training if one takes so many seconds."""
        return max(1, round(self.budget if self.unit == "steps" else self.budget / seconds))

    def describe(self) -> str:
        """How many trainings it needs, and how long they take. Raises: InputError if it cannot be started."""
        options = self.options(self.workspace.runs.absolute() / NEW_ARENA)
        runs, trainings, seconds = _expected(self, options)
        took = "time not measured yet" if seconds is None else f"about {duration(seconds)}"
        return f"At least {trainings} trainings of {self.budget:g} {self.unit} in {runs} runs, learning rates included · {took}"

    def start(self) -> str:
        """Start the arena; returns its id. Raises: InputError if it cannot be started, before anything is written."""
        self.options(self.workspace.runs.absolute() / NEW_ARENA)
        path = self.workspace.new_run().absolute()
        for name, (_, dataset) in self.subjects.items():
            _copy_photos(dataset, path / SUBJECTS / name)
        for name, one in self.labelled.items():
            if one.kind != "example":
                _write_table(Dataset.of(self.workspace, one.id), path / CLASSES / f"{name}.csv")
        ResolvedOptions(self.options(path).to_dict()).write(path)
        folders = [one.data_dir for one in self.labelled.values() if one.kind == "own"]
        launching.start_arena(self.workspace, path, folders)
        return path.name


def known_words(photos: Sequence[str], draft: Draft) -> str:
    """The class words that the user has entered for `photos`, "?" for those without one."""
    return ", ".join(draft.settings_of(name).kind or "?" for name in photos)


def photo_titles(workspace: Workspace, draft: Draft) -> dict[str, str]:
    """The display names of the bundled subject and of the user's photo datasets with enough photos, newest first, by id."""
    folders = sorted((path for path in workspace.sets.glob("*/set.json") if not path.parent.is_symlink()), reverse=True)
    titles = {}
    for name in (EXAMPLE, *(path.parent.name for path in folders)):
        count = len(Dataset.of(workspace, None if name == EXAMPLE else name).photos())
        if count >= FEWEST_PHOTOS:
            title = "Example: toy" if name == EXAMPLE else f"{draft.settings_of(name).kind or 'photos'} of {name[:15]}"
            titles[name] = f"{title} ({counted(count, 'photo')})"
    return titles


def _different(names: Sequence[str]) -> list[str]:
    """The names, of which equal ones get a number."""
    return [name if name not in names[:index] else f"{name}-{index + 1}" for index, name in enumerate(names)]


def _name_of(classes: LabelledClasses) -> str:
    if classes.id in EXAMPLES:
        return DIGITS if classes.data_dir is None else classes.data_dir.stem
    names = [classes.data_dir.name] if classes.kind == "folder" else [one.name for one in classes.classes[:3]]
    return re.sub(r"\W+", "-", " ".join(names)).strip("-")[:60] or "classes"


def _source(path: Path, name: str, classes: LabelledClasses) -> str:
    """What --datasets is given: the classes of users are listed in a table, because their folders do not have their names."""
    if classes.kind == "example":
        return DIGITS if classes.data_dir is None else str(classes.data_dir)
    return str(path / CLASSES / f"{name}.csv")


def _copy_photos(dataset: Dataset, folder: Path) -> None:
    """Copy the photos, which the user may change meanwhile, with their captions."""
    folder.mkdir(parents=True)
    for number, photo in enumerate(dataset.photos(), 1):
        source = dataset.folder / photo.file
        shutil.copyfile(source, folder / f"{number:03d}{source.suffix}")
        if photo.caption:
            shutil.copyfile(source.with_suffix(".txt"), folder / f"{number:03d}.txt")


def _write_table(dataset: Dataset, path: Path) -> None:
    """The images with the names of their classes, and their parts of the split if there is one."""
    content = dataset.content()
    if content.local_folder is None:
        labelled = rename(load_folder(dataset.folder), {one.folder: one.name for one in content.classes})
    else:
        labelled = content.read_local_folder()
    path.parent.mkdir(exist_ok=True)
    columns = ["path", "label", *(["split"] if labelled.parts else [])]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for image in labelled.images:
            row = [image.source.path.absolute(), labelled.classes[image.label], labelled.parts.get(image.name)]
            writer.writerow(row[: len(columns)])


def _expected(plan: ArenaPlan, options: ArenaOptions) -> tuple[int, int, float | None]:
    """The number of runs and of their trainings, and the seconds of all of them; None if the pace is not known."""
    methods = list(dict.fromkeys(name for given in plan.methods for name in (METHODS if given == ALL else [given])))
    tuned = [name for name in methods if name not in BASELINES]
    parts = [_of_subjects(plan, options)] * len(tuned) if plan.subjects else []
    parts += [_of_classes(plan, options, one, name) for one in plan.labelled.values() for name in methods]
    runs, trainings, seconds = zip(*parts, strict=True)
    return sum(runs), sum(trainings), None if None in seconds else sum(seconds)


def _of_subjects(plan: ArenaPlan, options: ArenaOptions) -> tuple[int, int, float | None]:
    """The runs and trainings of a method on all subjects, and their seconds."""
    subjects, seeds = len(plan.subjects), len(options.data.seeds)
    swept = len(options.method.learning_rate_factors) * (subjects if subjects > 1 else seeds)
    swept += subjects if plan.unit == "seconds" else 0
    pace = expected_pace(plan.workspace.runs, options.models.pretrained_model_name_or_path)
    photos = round(fmean(len(dataset.photos()) for _, dataset in plan.subjects.values()))

    def took(evaluates: bool) -> float:
        values = {"data": {"heldout_image": "one"}, "output": {"validation_images": False}}
        values["validation"] = {"certify": False, "evaluate": evaluates}
        steps = plan.steps(built("subject", values).optimisation.images_per_step * pace.image)
        return total_seconds(built("subject", {**values, "optimisation": {"max_train_steps": steps}}), photos, pace)

    seconds = None if pace is None else swept * took(False) + subjects * seeds * took(True)
    return swept + subjects * seeds, swept + subjects * seeds, seconds


def _of_classes(plan: ArenaPlan, options: ArenaOptions, classes: LabelledClasses, method: str) -> tuple[int, int, float]:
    """The runs and trainings of a method on a labelled dataset, and their seconds."""
    shots, seeds = options.data.shots, options.data.seeds
    steps = plan.steps(built("classify", {}).optimisation.train_batch_size * TRAINED)

    def took(shots: list[int], seeds: list[int]) -> float:
        data = {"shots": list(map(str, shots)), "seeds": seeds}
        values = {"data": data, "method": {"method": [method]}, "optimisation": {"max_train_steps": steps}}
        return estimated_seconds(built("classify", values), len(classes.classes), classes.fewest, classes.num_tested)

    swept = 0 if method in BASELINES else len(options.method.learning_rate_factors) + (plan.unit == "seconds")
    trainings = 0 if method in BASELINES else swept + (len(shots) + 1) * len(seeds)
    # The last run trains on half of the classes.
    return swept + 2, trainings, swept * took(shots[-1:], seeds[:1]) + took(shots, seeds) + took(shots[-1:], seeds) / 2


def running(view: RunView) -> list[str]:
    """What the trainings that run now are: method, dataset and purpose."""
    paths = view.record.path.glob(f"{CELLS}/*/*/*/*/{CellRecord.NAME}") if view.state == "running" else ()
    newest = sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True)[:NEWEST]
    records = (read_cached(CellRecord, path.parent) for path in newest)
    return [_sentence(record) for record in records if record is not None and record.state == "running"]


def _sentence(record: CellRecord) -> str:
    rate = "" if record.learning_rate is None else f" with learning rate {record.learning_rate:.3g}"
    seed = "" if record.seed is None else f", seed {record.seed}"
    purposes = {"pace": "measurement of its pace", "sweep": "trial", "final": "final training"}
    purpose = purposes.get(record.purpose, "training on half of the classes")
    return f"{variant_title(record.variant)} on {record.dataset}: {purpose}{rate}{seed}"
