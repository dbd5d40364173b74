"""The two tasks of the page, with the same verbs: the options of a dataset's next run, its command, start and duration."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import psutil

from pipelines.built_in import is_built_in, portable_name
from pipelines.errors import InputError
from pipelines.fewshot.shots import MOST_VALIDATION
from pipelines.subject.heldout import MIN_IMAGES_TO_HOLD_OUT, num_folds
from training.options import SubjectOptions
from training.options.data import SAMPLE_PROMPT
from training.options.fewshot import ALL, BUILT_IN_ITERATIONS, FewShotOptions
from training.options.values import Options, Values, defaults, merged, without
from training.runs.record import RunRecord
from training.runs.run_files import GB, DryRunReport
from training.runs.snapshot import RunSnapshot
from training.subject.plan import Pace, estimated_seconds, phases
from webui import launching
from webui.datasets import Dataset
from webui.draft import EXAMPLE, PROMPT, Draft, Preset, RunSettings, presets_of
from webui.form_schema import SET_BY_THE_PAGE, validated
from webui.labelled_datasets import EXAMPLES, LabelledClasses, class_datasets, dataset_in, find_classes
from webui.runs import duration
from webui.workspace import Workspace

# A hidden folder below the runs, so that it is not listed as one.
DRY_RUNS, NEW_RUN = ".rehearsals", "NEW-RUN"
# The runs whose pace may be that of the next one.
RECENT = 20
# With the built-in model on one core: see presets.toml.
DEMO_PACE = Pace(image=0.23 / 4, sample=1.2, loading=4.0)
# For each image that is trained on or encoded, and for the start. The presets on the digits took 75, 193 and 336 s on two idle
# cores (estimated: 79, 185 and 318 s). Processor time of Fast: digits 87 s, shapes 74 s (estimated: 79 and 70 s); of the default
# method alone on all images 149 and 94 s (estimated: 143 and 94 s).
CLASSIFIER_TRAINED, CLASSIFIER_ENCODED, CLASSIFIER_START = 0.36 / 32, 0.009, 5.0
GPU_QUERY = ("--query-gpu=name,memory.total", "--format=csv,noheader,nounits")
# The most steps of a preset with the built-in model.
MOST_STEPS = 400


class Task:
    """A task of the page. A subclass implements what is not implemented here."""

    name: ClassVar[str]
    # The option that names the folder of the images.
    image_folder: ClassVar[str]
    presets: ClassVar[Sequence[Preset]]
    default_preset: ClassVar[str]

    def key(self, workspace: Workspace, draft: Draft) -> str:
        """The id of the draft's dataset, by which its settings are stored."""
        raise NotImplementedError

    def num_images(self, workspace: Workspace, draft: Draft) -> int:
        """The number of images of the draft's dataset."""
        raise NotImplementedError

    def check(self, workspace: Workspace, draft: Draft) -> None:
        """Raises: InputError if a run cannot be started on the draft's dataset or with its words."""
        raise NotImplementedError

    def complete(self, workspace: Workspace, draft: Draft, values: Values) -> Values:
        """`values` of preset and user, with those that the dataset and the words determine."""
        raise NotImplementedError

    def predict(self, workspace: Workspace, draft: Draft, options: Options) -> tuple[str, str | None, float | None]:
        """What is trained, the base model (None for the built-in one), and in how many seconds (None if that is unknown)."""
        raise NotImplementedError

    def set_of_folder(self, workspace: Workspace, folder: str | None) -> str | None:
        """The id of the dataset in `folder`; None if it is not one of the user's."""
        raise NotImplementedError

    def words_of(self, options: Values) -> RunSettings:
        """The words of an earlier run."""
        return RunSettings()

    def settings(self, workspace: Workspace, draft: Draft) -> RunSettings:
        """The settings of the draft's dataset."""
        return draft.settings_of(self.key(workspace, draft))

    def preset(self, settings: RunSettings) -> Preset:
        """The chosen preset, or else the default."""
        by_name = {preset.name: preset for preset in self.presets}
        return by_name.get(settings.preset, by_name[self.default_preset])

    def values(self, workspace: Workspace, draft: Draft) -> Values:
        """All options of the next run that were chosen or depend on the dataset, not checked."""
        settings = self.settings(workspace, draft)
        preset = self.preset(settings).options(self.num_images(workspace, draft))
        return self.complete(workspace, draft, merged(preset, settings.options))

    def command(self, workspace: Workspace, draft: Draft) -> str:
        """The command that `start` runs, as it is typed into a shell. Raises: InputError for an invalid option."""
        self.check(workspace, draft)
        values, _ = validated(workspace, self.name, self.values(workspace, draft))
        return shlex.join(launching.command(self.name, values, workspace.runs / NEW_RUN))

    def start(self, workspace: Workspace, draft: Draft) -> str:
        """Start the run; returns its id. Raises: InputError for an invalid option, before anything is started."""
        self.check(workspace, draft)
        return launching.start(workspace, self.name, self.values(workspace, draft))

    def describe(self, workspace: Workspace, draft: Draft) -> str:
        """What Train would do, in one line. Raises: InputError if it could not start."""
        self.check(workspace, draft)
        settings, (_, options) = self.settings(workspace, draft), validated(workspace, self.name, self.values(workspace, draft))
        changes = sum(map(len, settings.options.values()))
        changed = [f"{changes} {'setting' if changes == 1 else 'settings'} changed"] if changes else []
        what, model, seconds = self.predict(workspace, draft, options)
        unknown = "time not measured yet" if gpu() else "hours on this CPU"
        took = unknown if seconds is None else f"about {duration(seconds)}"
        return " · ".join([what, self.preset(settings).name, *changed, _model_title(model), took])

    def like(self, workspace: Workspace, draft: Draft, options: Values, set_id: str | None) -> Draft:
        """The draft of another run with the options of an earlier one; the preset is the one with the fewest changes.

        Args:
            options: of the earlier run, those that differ from the defaults.
            set_id: its dataset; None for the example, or if it is gone.
        """
        draft, by_the_page = replace(draft, set=set_id, previous_set=None), SET_BY_THE_PAGE[self.name]
        key, given, candidates = self.key(workspace, draft), merged(defaults(self.name), without(options, by_the_page)), []
        for preset in self.presets:
            settings = replace(self.words_of(options), preset=preset.name)
            values = self.values(workspace, draft.with_settings(key, settings))
            of_preset = merged(defaults(self.name), without(values, by_the_page))
            changed = {
                group: {name: given[group][name] for name, value in fields.items() if given[group][name] != value}
                for group, fields in of_preset.items()
            }
            candidates.append(replace(settings, options=merged(changed)))
        return draft.with_settings(key, min(candidates, key=lambda settings: sum(map(len, settings.options.values()))))


class SubjectTask(Task):
    """An adapter of a text-to-image model for one subject."""

    name = "subject"
    image_folder = "instance_data_dir"
    presets = presets_of("subject")
    default_preset = "Balanced"

    def key(self, workspace: Workspace, draft: Draft) -> str:
        """The id of the photos."""
        return draft.set or EXAMPLE

    def num_images(self, workspace: Workspace, draft: Draft) -> int:
        """The number of photos."""
        return len(Dataset.of(workspace, draft.set).photos())

    def set_of_folder(self, workspace: Workspace, folder: str | None) -> str | None:
        """The id of the photos in `folder`; None if they are not among the user's datasets."""
        if folder is None or not workspace.is_image_set(folder):
            return None
        try:
            return workspace.image_set(Path(folder).name).name
        except InputError:
            return None

    def check(self, workspace: Workspace, draft: Draft) -> None:
        """Raises: InputError without photos or with invalid words."""
        if not self.num_images(workspace, draft):
            raise InputError("There are no photos yet. Add three to ten photos of one subject under Photos.")
        self.settings(workspace, draft).check_words()

    def complete(self, workspace: Workspace, draft: Draft, values: Values) -> Values:
        """Add the photos and the prompts."""
        settings, photos = self.settings(workspace, draft), Dataset.of(workspace, draft.set)
        data: dict[str, Any] = {} if photos.is_example else {"instance_data_dir": str(photos.folder)}
        if data or settings.prompt != SAMPLE_PROMPT:
            data["instance_prompt"] = settings.prompt
        if values.get("data", {}).get("with_prior_preservation") in (True, "true"):
            data["class_prompt"] = f"a photo of {'an' if settings.kind[:1].lower() in tuple('aeiou') else 'a'} {settings.kind}"
        output = {} if settings.scenes is None else {"validation_prompt": settings.prompts}
        return merged(without(values, SET_BY_THE_PAGE[self.name]), {"data": data, "output": output})

    def predict(self, workspace: Workspace, draft: Draft, options: SubjectOptions) -> tuple[str, str | None, float | None]:
        """The trigger word and the class word, the base model, and the sum of all phases from loading to verification."""
        settings, model = self.settings(workspace, draft), options.model.pretrained_model_name_or_path
        pace, dry_run = self._pace(workspace, model), Pace.measured(self.dry_run(workspace, draft))
        if pace is not None and dry_run is not None:
            pace = replace(pace, image=dry_run.image)
        seconds = None if pace is None else subject_seconds(options, self.num_images(workspace, draft), pace)
        return f"{settings.trigger.strip()} {settings.kind}", None if is_built_in(model) else model, seconds

    def _pace(self, workspace: Workspace, model: str) -> Pace | None:
        """The pace of the newest finished run with the base model, or else of the built-in one as it was measured."""
        for record in map(workspace.run, workspace.run_ids()[:RECENT]):
            is_same = record.options().get("model", {}).get("pretrained_model_name_or_path") == model
            if is_same and (pace := Pace.measured(record)) is not None:
                return pace
        return DEMO_PACE if is_built_in(model) else None

    def words_of(self, options: Values) -> RunSettings:
        """The words of an earlier run's prompts."""
        words = PROMPT.fullmatch(options.get("data", {}).get("instance_prompt") or SAMPLE_PROMPT)
        settings = RunSettings(trigger=words[1], class_word=words[2]) if words else RunSettings()
        prompts = options.get("output", {}).get("validation_prompt")
        if prompts in (None, settings.prompts):
            return settings
        scenes = [text.removeprefix(f"{settings.prompt} ") for text in prompts if text != settings.prompt]
        return replace(settings, scenes=scenes)

    def dry_run(self, workspace: Workspace, draft: Draft) -> RunRecord:
        """The record of a dry run of the draft; its folder depends on options and images, so nothing is measured twice.

        Raises: InputError for an invalid option.
        """
        values, _ = validated(workspace, self.name, self.values(workspace, draft))
        content = json.dumps([values, Dataset.of(workspace, draft.set).signature()], sort_keys=True)
        return RunRecord(workspace.runs / DRY_RUNS / hashlib.sha256(content.encode()).hexdigest()[:20])

    def start_dry_run(self, workspace: Workspace, draft: Draft) -> None:
        """Start a dry run of the draft, unless one is running or finished. Raises: InputError for an invalid option."""
        self.check(workspace, draft)
        record = self.dry_run(workspace, draft)
        if RunSnapshot(record).is_active or measured(record) is not None:
            return
        if record.path.exists():
            shutil.rmtree(record.path)
        launching.start_dry_run(workspace, self.name, self.values(workspace, draft), record.path)


class ClassifyTask(Task):
    """A classifier of images into the user's classes."""

    name = "classify"
    image_folder = "data_dir"
    presets = presets_of("classify")
    default_preset = "Fast"

    def key(self, workspace: Workspace, draft: Draft) -> str:
        """The id of the draft's dataset; if it is gone, of the user's newest one, or the example."""
        datasets = class_datasets(workspace)
        return draft.set if draft.set in (*EXAMPLES, *datasets) else next(iter(datasets), next(iter(EXAMPLES)))

    def num_images(self, workspace: Workspace, draft: Draft) -> int:
        """The number of images of all classes."""
        return self._classes(workspace, draft).count

    def set_of_folder(self, workspace: Workspace, folder: str | None) -> str | None:
        """The id of the classes in `folder`, uploaded or in a local folder, or of an example."""
        return dataset_in(workspace, folder)

    def check(self, workspace: Workspace, draft: Draft) -> None:
        """Raises: InputError if the classes are not ready."""
        classes = self._classes(workspace, draft)
        if not classes.is_ready:
            raise InputError(classes.warnings()[0])

    def complete(self, workspace: Workspace, draft: Draft, values: Values) -> Values:
        """Add the images, and adapt what the user did not choose to their number."""
        return fitted(self._classes(workspace, draft), values, self.settings(workspace, draft).options)

    def predict(self, workspace: Workspace, draft: Draft, options: FewShotOptions) -> tuple[str, str | None, float | None]:
        """The example or the user's classes, the CLIP model, and the steps of all trials."""
        classes = self._classes(workspace, draft)
        what = EXAMPLES[classes.id][0] if classes.id in EXAMPLES else "your classes"
        if not options.model.is_built_in:
            return what, options.model.model, None
        return what, None, classifier_seconds(options, classes)

    def _classes(self, workspace: Workspace, draft: Draft) -> LabelledClasses:
        return find_classes(workspace, self.key(workspace, draft))


def fitted(classes: LabelledClasses, values: Values, chosen: Values) -> Values:
    """The options of a run on `classes`.

    Args:
        values: options of the preset and the user.
        chosen: the user's options only, which are not adapted to the number of images.
    """
    fewest, shots = max(1, _fewest(classes)), values.get("data", {}).get("shots", [ALL])
    added: Values = {"data": classes.data_options()}
    if "shots" not in chosen.get("data", {}):
        # Numbers of images per class that every class has, besides those for validation.
        shots = [one for one in shots if one == ALL or int(one) + min(int(one), MOST_VALIDATION) <= fewest] or [ALL]
        added["data"]["shots"] = shots
    is_bounded = "model" not in values.get("model", {}) and "iterations_per_shot" not in chosen.get("optimisation", {})
    if is_bounded and shots == [ALL] and BUILT_IN_ITERATIONS * fewest > MOST_STEPS:
        # Fewer steps for each of many images, so that training on all of them does not take hours.
        added["optimisation"] = {"iterations_per_shot": max(1, MOST_STEPS // fewest)}
    return merged(values, added)


def _fewest(classes: LabelledClasses) -> int:
    """The number of images of the smallest class that are not for testing."""
    return min((one.learnable for one in classes.classes), default=0)


def measured(record: RunRecord) -> DryRunReport | None:
    """What a dry run or a finished run has measured; None if it has not."""
    return DryRunReport.read(record.path) if record.status().state == "done" else None


@lru_cache(maxsize=1)
def gpu() -> tuple[str, float] | None:
    """The name and the memory in GB of this machine's first GPU, found without a model library; None if there is none."""
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return "Apple GPU", psutil.virtual_memory().total / GB
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    try:
        answer = subprocess.run([command, *GPU_QUERY], capture_output=True, text=True, timeout=10, check=True).stdout
        name, mebibytes = answer.splitlines()[0].rsplit(",", 1)
        return name.strip(), float(mebibytes) * 2**20 / GB
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        # A driver without a device answers with a sentence or an error code.
        return None


def on_this_machine(is_demo: bool) -> str:
    """This machine, and what to expect on it of the demo model, or of a model of SDXL's size (see docs/performance.md)."""
    device = "no GPU" if gpu() is None else "{} with {:.0f} GB".format(*gpu())
    machine = f"{os.cpu_count()} CPU cores, {psutil.virtual_memory().total / GB:.0f} GB of memory, {device}"
    if is_demo:
        seconds = subject_seconds(SubjectOptions(), MIN_IMAGES_TO_HOLD_OUT, DEMO_PACE)
        advice = f"The demo model generates 64 x 64 pixels and trains in about {duration(seconds)} on two CPU cores."
    elif gpu() is None:
        advice = (
            "Without a GPU, a model of SDXL's size is not practical: the adapter alone takes 7 minutes to start, and training "
            "hours to days. SDXL is a download of about 7 GB."
        )
    else:
        advice = "SDXL is a download of about 7 GB. Check measures three steps, which tells how long training takes on this GPU."
    return f"This machine: {machine}. {advice}"


def subject_seconds(options: SubjectOptions, num_images: int, pace: Pace) -> float:
    """The estimated duration of a subject's run: the sum of all its phases."""
    seconds = estimated_seconds(options, pace)
    return sum(seconds.get(phase.name, 0.0) for phase in phases(options, num_folds(num_images, options.data.heldout_image)))


def classifier_seconds(options: FewShotOptions, classes: LabelledClasses) -> float:
    """The estimated duration of a classifier's run with the built-in model, from the images that are trained on and encoded."""
    optimisation, num_adapters, seconds = options.optimisation, len(options.method.adapters()), 0.0
    num_test = classes.count - sum(one.learnable for one in classes.classes)
    for shots in options.data.all_shots():
        per_class = max(1, _fewest(classes) - MOST_VALIDATION) if shots == ALL else shots
        num_train, num_validation = (len(classes.classes) * each for each in (per_class, min(per_class, MOST_VALIDATION)))
        per_step = optimisation.train_batch_size * optimisation.gradient_accumulation_steps
        seconds += num_adapters * optimisation.steps(per_class) * per_step * CLASSIFIER_TRAINED
        # For the baselines, all views of the training images; all other images once for them, and once for each adapter.
        views = options.data.views if len(options.method.method) > num_adapters else 0
        encoded = num_train * views + (num_test + num_validation) * (1 + num_adapters)
        seconds += encoded * CLASSIFIER_ENCODED
    return CLASSIFIER_START + seconds * len(options.data.seeds)


def _model_title(name: str | None) -> str:
    if name is None:
        return "demo model"
    return "SDXL" if "stable-diffusion-xl" in name.lower() else portable_name(name)


SUBJECT, CLASSIFY = SubjectTask(), ClassifyTask()
TASKS: dict[str, Task] = {task.name: task for task in (SUBJECT, CLASSIFY)}
