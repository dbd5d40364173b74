"""The next run of each task: its options, its command, its start, and how long it takes."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import ClassVar, Self

import psutil

from pipelines.built_in import is_built_in, portable_name
from pipelines.errors import InputError
from pipelines.fewshot.layouts import counted
from pipelines.methods import AUTO, DEFAULT
from pipelines.subject.heldout import MIN_IMAGES_TO_HOLD_OUT
from pipelines.wording import with_article
from training.fewshot.plan import estimated_seconds
from training.options import SubjectOptions
from training.options.data import SAMPLE_PROMPT
from training.options.fewshot import FewShotOptions
from training.options.values import Options, Values, defaults, merged, without
from training.runs.record import RunRecord
from training.runs.run_files import GB, DryRunReport
from training.runs.snapshot import RunSnapshot
from training.subject.plan import DEMO_PACE, Pace, expected_pace, total_seconds
from webui import launching
from webui.datasets import Dataset
from webui.draft import EXAMPLE, Draft, Preset, RunSettings, Value, presets_of
from webui.form_schema import SET_BY_THE_PAGE, validated
from webui.labelled_datasets import EXAMPLES, LabelledClasses, class_datasets, dataset_in, find_classes
from webui.runs import duration
from webui.workspace import Workspace

# A hidden folder below the runs, so that it is not listed as one.
DRY_RUNS, NEW_RUN = ".rehearsals", "NEW-RUN"
GPU_QUERY = ("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits")


@dataclass(frozen=True)
class Plan:
    """The next run of a task. A subclass implements what is not implemented here.

    Args:
        workspace: of the user.
        draft: the chosen dataset and the settings of its next run.
    """

    workspace: Workspace
    draft: Draft

    task: ClassVar[str]
    # The option that names the folder of the images.
    image_folder: ClassVar[str]
    # The id of the user's dataset in such a folder; None if it is none of theirs, or gone.
    set_in: ClassVar[Callable[[Workspace, str | None], str | None]]
    presets: ClassVar[Sequence[Preset]]
    default_preset: ClassVar[str]

    @classmethod
    def of(cls, workspace: Workspace, stored: object) -> Self:
        """The plan for the draft that the browser has stored."""
        return cls(workspace, Draft.from_browser(stored))

    @property
    def key(self) -> str:
        """The id of the dataset, by which its settings are stored."""
        raise NotImplementedError

    @property
    def num_images(self) -> int:
        """The number of images of the dataset."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises: InputError if a run cannot be started on the dataset or with the words."""
        raise NotImplementedError

    def complete(self, values: Values) -> Values:
        """`values` of preset and user, with those that the dataset and the words determine."""
        raise NotImplementedError

    def predict(self, options: Options) -> tuple[str, str | None, float | None]:
        """What is trained, the base model (None for the built-in one), and in how many seconds (None if that is unknown)."""
        raise NotImplementedError

    @cached_property
    def settings(self) -> RunSettings:
        """The settings of the dataset."""
        return self.draft.settings_of(self.key)

    @property
    def preset(self) -> Preset:
        """The chosen preset, or else the default."""
        by_name = {preset.name: preset for preset in self.presets}
        return by_name.get(self.settings.preset, by_name[self.default_preset])

    @property
    def method(self) -> str:
        """The adapter method of a subject."""
        return chosen_method(self.settings.options)

    @property
    def preset_values(self) -> tuple[Value, ...]:
        """The values of the preset that apply."""
        return tuple(self.preset.of(self.num_images, self.method))

    @property
    def preset_options(self) -> Values:
        """`preset_values` by group and name."""
        return self.preset.options(self.num_images, self.method)

    @cached_property
    def values(self) -> Values:
        """All options that were chosen or depend on the dataset, not checked."""
        return self.complete(merged(self.preset_options, self.settings.options))

    @cached_property
    def checked(self) -> tuple[Values, Options]:
        """`values` that differ from the defaults, and all options of the run. Raises: InputError for an invalid option."""
        return validated(self.workspace, self.task, self.values)

    @property
    def command(self) -> str:
        """The command that `start` runs, as it is typed into a shell. Raises: InputError if it could not start."""
        self.check()
        return shlex.join(launching.command(self.task, self.checked[0], self.workspace.runs / NEW_RUN))

    def start(self) -> str:
        """Start the run; returns its id. Raises: InputError for an invalid option, before anything is started."""
        self.check()
        return launching.start(self.workspace, self.task, self.values)

    def describe(self) -> str:
        """What Train would do, in one line. Raises: InputError if it could not start."""
        self.check()
        what, model, seconds = self.predict(self.checked[1])
        changes = sum(map(len, self.settings.options.values()))
        changed = [f"{counted(changes, 'setting')} changed"] if changes else []
        unknown = "time not measured yet" if gpu() else "hours on this CPU"
        took = unknown if seconds is None else f"about {duration(seconds)}"
        return " · ".join([what, self.preset.name, *changed, _model_title(model), took])

    @classmethod
    def like(cls, workspace: Workspace, draft: Draft, options: Values) -> Draft:
        """`draft` with the dataset and the options of an earlier run, and the preset with the fewest changes.

        Args:
            options: those that differ from the defaults.
        """
        set_id, by_the_page = cls.set_in(workspace, options.get("data", {}).get(cls.image_folder)), SET_BY_THE_PAGE[cls.task]
        draft = replace(draft, set=set_id, previous_set=None)
        key, given, candidates = cls(workspace, draft).key, merged(defaults(cls.task), without(options, by_the_page)), []
        for preset in cls.presets:
            settings = replace(RunSettings.of_run(options), preset=preset.name)
            plan = cls(workspace, draft.with_settings(key, settings))
            values = plan.complete(preset.options(plan.num_images, chosen_method(options)))
            of_preset = merged(defaults(cls.task), without(values, by_the_page))
            changed = {
                group: {name: given[group][name] for name, value in fields.items() if given[group][name] != value}
                for group, fields in of_preset.items()
            }
            candidates.append(replace(settings, options=merged(changed)))
        return draft.with_settings(key, min(candidates, key=lambda settings: sum(map(len, settings.options.values()))))


class SubjectPlan(Plan):
    """An adapter of a text-to-image model for one subject."""

    task = "subject"
    image_folder = "instance_data_dir"
    set_in = staticmethod(Workspace.set_in)
    presets = presets_of("subject")
    default_preset = "Balanced"

    @property
    def key(self) -> str:
        """The id of the photos."""
        return self.draft.set or EXAMPLE

    @cached_property
    def photos(self) -> Dataset:
        """The photos. Raises: InputError if they no longer exist."""
        return Dataset.of(self.workspace, self.draft.set)

    @cached_property
    def num_images(self) -> int:
        """The number of photos."""
        return len(self.photos.photos())

    def check(self) -> None:
        """Raises: InputError without photos or with invalid words."""
        if not self.num_images:
            raise InputError("There are no photos yet. Add three to ten photos of one subject under Photos.")
        self.settings.check_words()

    def complete(self, values: Values) -> Values:
        """Add the photos and the prompts."""
        settings, data = self.settings, {} if self.photos.is_example else {self.image_folder: str(self.photos.folder)}
        if data or settings.prompt != SAMPLE_PROMPT:
            data["instance_prompt"] = settings.prompt
        if values.get("data", {}).get("with_prior_preservation") in (True, "true"):
            data["class_prompt"] = f"a photo of {with_article(settings.kind)}"
        output = {} if settings.scenes is None else {"validation_prompt": settings.prompts}
        return merged(without(values, SET_BY_THE_PAGE[self.task]), {"data": data, "output": output})

    def predict(self, options: SubjectOptions) -> tuple[str, str | None, float | None]:
        """The trigger word and the class word, the base model, and the sum of all phases from loading to verification."""
        model = options.model.pretrained_model_name_or_path
        pace, dry_run = expected_pace(self.workspace.runs, model), Pace.measured(self.dry_run)
        if pace is not None and dry_run is not None:
            pace = replace(pace, image=dry_run.image)
        seconds = None if pace is None else total_seconds(options, self.num_images, pace)
        return f"{self.settings.trigger.strip()} {self.settings.kind}", None if is_built_in(model) else model, seconds

    @cached_property
    def dry_run(self) -> RunRecord:
        """The record of a dry run; its folder depends on options and images, so nothing is measured twice.

        Raises: InputError for an invalid option.
        """
        content = json.dumps([self.checked[0], self.photos.signature()], sort_keys=True)
        return RunRecord(self.workspace.runs / DRY_RUNS / hashlib.sha256(content.encode()).hexdigest()[:20])

    def start_dry_run(self) -> None:
        """Start a dry run, unless one is running or finished. Raises: InputError for an invalid option."""
        self.check()
        if RunSnapshot(self.dry_run).is_active or measured(self.dry_run) is not None:
            return
        if self.dry_run.path.exists():
            shutil.rmtree(self.dry_run.path)
        launching.start_dry_run(self.workspace, self.task, self.values, self.dry_run.path)


class ClassifierPlan(Plan):
    """A classifier of images into the user's classes."""

    task = "classify"
    image_folder = "data_dir"
    set_in = staticmethod(dataset_in)
    presets = presets_of("classify")
    default_preset = "Fast"

    @cached_property
    def key(self) -> str:
        """The id of the classes; if they are gone, of the user's newest dataset, or the example."""
        datasets = class_datasets(self.workspace)
        return self.draft.set if self.draft.set in (*EXAMPLES, *datasets) else next(iter(datasets), next(iter(EXAMPLES)))

    @cached_property
    def classes(self) -> LabelledClasses:
        """The classes. Raises: InputError if a local folder can no longer be used."""
        return find_classes(self.workspace, self.key)

    @property
    def num_images(self) -> int:
        """The number of images of all classes."""
        return self.classes.count

    def check(self) -> None:
        """Raises: InputError if the classes are not ready."""
        self.classes.check()

    def complete(self, values: Values) -> Values:
        """Add the images, and adapt what the user did not choose to their number."""
        return self.classes.fitted(values, self.settings.options)

    def predict(self, options: FewShotOptions) -> tuple[str, str | None, float | None]:
        """The example or the user's classes, the CLIP model, and the steps of all trials."""
        what = EXAMPLES[self.key][0] if self.key in EXAMPLES else "your classes"
        if not options.model.is_built_in:
            return what, options.model.model, None
        return what, None, estimated_seconds(options, len(self.classes.classes), self.classes.fewest, self.classes.num_tested)


def chosen_method(options: Values) -> str:
    """The adapter method of a subject's options, which lack those that were not chosen."""
    method = options.get("adapter", {}).get("method")
    return DEFAULT if method in (None, "", AUTO) else method


def measured(record: RunRecord) -> DryRunReport | None:
    """What a dry run or a finished run has measured; None if it has not."""
    return DryRunReport.read(record.path) if record.status().state == "done" else None


@lru_cache(maxsize=1)
def gpu() -> tuple[str, float] | None:
    """The name and the memory in GB of this machine's first GPU, found without a model library; None if there is none."""
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return "Apple GPU", psutil.virtual_memory().total / GB
    try:
        answer = subprocess.run(GPU_QUERY, capture_output=True, text=True, timeout=10, check=True).stdout
        name, mebibytes = answer.splitlines()[0].rsplit(",", 1)
        return name.strip(), float(mebibytes) * 2**20 / GB
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        # There is no driver, or one without a device, which answers with a sentence or an error code.
        return None


def on_this_machine(is_demo: bool) -> str:
    """This machine, and what to expect on it of the demo model, or of a model of SDXL's size (see docs/performance.md)."""
    device = "no GPU" if gpu() is None else "{} with {:.0f} GB".format(*gpu())
    machine = f"{os.cpu_count()} CPU cores, {psutil.virtual_memory().total / GB:.0f} GB of memory, {device}"
    if is_demo:
        seconds = total_seconds(SubjectOptions(), MIN_IMAGES_TO_HOLD_OUT, DEMO_PACE)
        advice = f"The demo model generates 64 x 64 pixels and trains in about {duration(seconds)} on two CPU cores."
    elif gpu() is None:
        advice = (
            "Without a GPU, a model of SDXL's size is not practical: the adapter alone takes 7 minutes to start, and training "
            "hours to days. SDXL is a download of about 7 GB."
        )
    else:
        advice = "SDXL is a download of about 7 GB. Check measures three steps, which tells how long training takes on this GPU."
    return f"This machine: {machine}. {advice}"


def _model_title(name: str | None) -> str:
    if name is None:
        return "demo model"
    return "SDXL" if "stable-diffusion-xl" in name.lower() else portable_name(name)


PLANS: dict[str, type[Plan]] = {plan.task: plan for plan in (SubjectPlan, ClassifierPlan)}
