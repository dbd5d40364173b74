"""The two tasks of the page, with the same verbs: the options of a dataset's next run, its command, start and duration."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from pipelines.built_in import is_built_in, portable_name
from pipelines.errors import InputError
from pipelines.subject.heldout import num_folds
from training.options import SubjectOptions
from training.options.data import SAMPLE_PROMPT
from training.options.fewshot import ALL, FewShotOptions
from training.options.values import Options, Values, default_of, groups, merged, without
from training.runs.record import RunRecord
from training.runs.run_files import LOADING, SAMPLING, DryRunReport
from training.runs.snapshot import RunSnapshot
from training.subject.plan import estimated_seconds, phases
from webui import launching, machine, presets
from webui.datasets import Dataset
from webui.draft import EXAMPLE, PROMPT, SAMPLE_CLASS, Draft, RunSettings
from webui.form_schema import SET_BY_THE_PAGE, validated
from webui.labelled_datasets import EXAMPLES, LabelledClasses, class_datasets, find_classes
from webui.presets import Preset
from webui.workspace import Workspace

# A hidden folder below the runs, so that it is not listed as one.
DRY_RUNS, NEW_RUN = ".rehearsals", "NEW-RUN"
# The runs whose pace may be that of the next one.
RECENT = 20
# Seconds with the built-in model on one core: see `presets`.
DEMO_PACE = {"step_seconds": 0.23, "sampling_seconds": 6.0, "loading_seconds": 4.0}
DEMO_CLASSIFIER_STEP, DEMO_CLASSIFIER_START = 0.45, 10.0
MOST_VALIDATION = 4
# The recipe's default steps per training image of a class with the built-in model, and the most steps of a preset.
BUILT_IN_STEPS, MOST_STEPS = 10, 400


class Task:
    """A task of the page. A subclass says what is true of one of the two."""

    name: ClassVar[str]
    # The option that names the folder of the images.
    image_folder: ClassVar[str]
    presets: ClassVar[Sequence[Preset]]
    default_preset: ClassVar[str]

    def key(self, workspace: Workspace, draft: Draft) -> str:
        """The id of the draft's dataset, by which its settings are stored."""
        raise NotImplementedError

    def num_images(self, workspace: Workspace, key: str) -> int:
        """The number of images of a dataset."""
        raise NotImplementedError

    def defaults(self, key: str) -> RunSettings:
        """The settings of a dataset before the user has changed any."""
        return RunSettings()

    def check(self, workspace: Workspace, draft: Draft) -> None:
        """Raises: InputError if a run cannot be started on the draft's dataset or with its words."""
        raise NotImplementedError

    def complete(self, workspace: Workspace, key: str, settings: RunSettings, values: Values) -> Values:
        """`values` of preset and user, with those that the dataset and the words determine."""
        raise NotImplementedError

    def title(self, settings: RunSettings, key: str) -> str:
        """What is trained, in a few words."""
        raise NotImplementedError

    def model(self, options: Options) -> str | None:
        """The name of the base model; None for the built-in one."""
        raise NotImplementedError

    def seconds(self, workspace: Workspace, draft: Draft, options: Options) -> float | None:
        """The estimated duration of a run; None if nothing like it was measured."""
        raise NotImplementedError

    def settings(self, workspace: Workspace, draft: Draft) -> RunSettings:
        """The settings of the draft's dataset."""
        return self.settings_of(self.key(workspace, draft), draft)

    def settings_of(self, key: str, draft: Draft) -> RunSettings:
        """The settings of the dataset `key`."""
        settings, defaults = draft.settings.get(key, RunSettings()), self.defaults(key)
        return replace(settings, class_word=defaults.class_word) if settings.class_word is None else settings

    def preset(self, settings: RunSettings) -> Preset:
        """The chosen preset, or else the default."""
        by_name = {preset.name: preset for preset in self.presets}
        return by_name.get(settings.preset, by_name[self.default_preset])

    def values(self, workspace: Workspace, draft: Draft) -> Values:
        """All options of the next run that were chosen or depend on the dataset, not checked."""
        return self._values(workspace, self.key(workspace, draft), self.settings(workspace, draft))

    def _values(self, workspace: Workspace, key: str, settings: RunSettings) -> Values:
        preset = self.preset(settings).options(self.num_images(workspace, key))
        return self.complete(workspace, key, settings, merged(preset, settings.options))

    def command(self, workspace: Workspace, draft: Draft) -> str:
        """The command that `start` runs, as it is typed into a shell. Raises: InputError for an invalid option."""
        self.check(workspace, draft)
        values, _ = validated(workspace, self.name, self.values(workspace, draft))
        return launching.shown_command(launching.command(self.name, values, workspace.runs / NEW_RUN))

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
        model, seconds = self.model(options), self.seconds(workspace, draft, options)
        unknown = "time not measured yet" if machine.gpu() else "hours on this CPU"
        took = unknown if seconds is None else f"about {_rounded(seconds)}"
        parts = [
            self.title(settings, self.key(workspace, draft)),
            self.preset(settings).name,
            *changed,
            _model_title(model),
            took,
        ]
        return " · ".join(parts)

    def like(self, workspace: Workspace, draft: Draft, options: Values, set_id: str | None) -> Draft:
        """The draft of another run with the options of an earlier one; the preset is the one with the fewest changes.

        Args:
            options: of the earlier run, those that differ from the defaults.
            set_id: its dataset; None for the example, or if it is gone.
        """
        key = self.key(workspace, Draft(set_id))
        words, given = self.words_of(options, key), without(options, SET_BY_THE_PAGE[self.name])
        candidates = [self._with_preset(workspace, key, replace(words, preset=each.name), given) for each in self.presets]
        best = min(candidates, key=lambda settings: sum(map(len, settings.options.values())))
        return replace(draft.with_settings(key, best), set=set_id, previous_set=None)

    def words_of(self, options: Values, key: str) -> RunSettings:
        """The words of an earlier run."""
        return self.defaults(key)

    def set_of_folder(self, workspace: Workspace, folder: str | None) -> str | None:
        """The id of the dataset in `folder`; None if it is not one of the user's."""
        if folder is None or Path(folder).parent != workspace.sets.absolute():
            return None
        try:
            return workspace.image_set(Path(folder).name).name
        except InputError:
            return None

    def _with_preset(self, workspace: Workspace, key: str, settings: RunSettings, given: Values) -> RunSettings:
        """The settings whose options, together with those of the preset, are `given`."""
        of_preset = without(self._values(workspace, key, settings), SET_BY_THE_PAGE[self.name])
        changed: Values = {}
        for group, fields in groups(self.name).items():
            for name, option in fields.items():
                default = default_of(option)
                value = given.get(group, {}).get(name, default)
                if value != of_preset.get(group, {}).get(name, default):
                    changed.setdefault(group, {})[name] = value
        return replace(settings, options=changed)


class SubjectTask(Task):
    """An adapter of a text-to-image model for one subject."""

    name = "subject"
    image_folder = "instance_data_dir"
    presets = presets.SUBJECT
    default_preset = "Balanced"

    def key(self, workspace: Workspace, draft: Draft) -> str:
        """The id of the photos."""
        return draft.set or EXAMPLE

    def num_images(self, workspace: Workspace, key: str) -> int:
        """The number of photos."""
        return len(_photos(workspace, key).photos())

    def defaults(self, key: str) -> RunSettings:
        """No class word, except for the example."""
        return RunSettings(class_word=SAMPLE_CLASS) if key == EXAMPLE else RunSettings()

    def check(self, workspace: Workspace, draft: Draft) -> None:
        """Raises: InputError without photos or with invalid words."""
        if not self.num_images(workspace, self.key(workspace, draft)):
            raise InputError("There are no photos yet. Add three to ten photos of one subject under Photos.")
        self.settings(workspace, draft).check_words()

    def complete(self, workspace: Workspace, key: str, settings: RunSettings, values: Values) -> Values:
        """Add the photos and the prompts."""
        data: dict[str, Any] = {} if key == EXAMPLE else {"instance_data_dir": str(_photos(workspace, key).folder)}
        if data or settings.prompt != SAMPLE_PROMPT:
            data["instance_prompt"] = settings.prompt
        if values.get("data", {}).get("with_prior_preservation") in (True, "true"):
            data["class_prompt"] = f"a photo of {'an' if settings.kind[:1].lower() in tuple('aeiou') else 'a'} {settings.kind}"
        output = {} if settings.scenes is None else {"validation_prompt": settings.prompts}
        return merged(without(values, SET_BY_THE_PAGE[self.name]), {"data": data, "output": output})

    def title(self, settings: RunSettings, key: str) -> str:
        """The trigger word and the class word."""
        return f"{settings.trigger.strip()} {settings.kind}"

    def model(self, options: SubjectOptions) -> str | None:
        """The base model."""
        name = options.model.pretrained_model_name_or_path
        return None if is_built_in(name) else name

    def start(self, workspace: Workspace, draft: Draft) -> str:
        """Seal the photos, and start the run."""
        self.check(workspace, draft)
        validated(workspace, self.name, self.values(workspace, draft))
        _photos(workspace, self.key(workspace, draft)).seal()
        return super().start(workspace, draft)

    def seconds(self, workspace: Workspace, draft: Draft, options: SubjectOptions) -> float | None:
        """The sum of all phases: the images before training, cross-validation, training, scoring, export and verification."""
        pace = self._pace(workspace, options)
        if (report := measured(self.dry_run(workspace, draft))) is not None:
            pace = {**(pace or DEMO_PACE), "step_seconds": report.seconds_per_step} if pace or not self.model(options) else None
        if pace is None:
            return None
        images = self.num_images(workspace, self.key(workspace, draft))
        plan, seconds = phases(options, num_folds(images, options.data.heldout_image)), estimated_seconds(options, **pace)
        return sum(seconds.get(phase.name, 0.0) for phase in plan)

    def _pace(self, workspace: Workspace, options: SubjectOptions) -> dict[str, float] | None:
        """The pace of the newest finished run with the base model, or else of the built-in one as it was measured."""
        for run_id in workspace.run_ids()[:RECENT]:
            record = workspace.run(run_id)
            before, report = record.options(), measured(record)
            model = before.get("model", {}).get("pretrained_model_name_or_path")
            if model != options.model.pretrained_model_name_or_path or report is None:
                continue
            batches = before["optimisation"]["train_batch_size"] * before["optimisation"]["gradient_accumulation_steps"]
            per_image = report.seconds_per_step / batches
            took = {phase.name: phase.seconds or 0.0 for phase in record.status().plan or ()}
            prompts = len(options.output.validation_prompt) / max(1, len(before["output"]["validation_prompt"]))
            batch = options.optimisation.train_batch_size * options.optimisation.gradient_accumulation_steps
            return {
                "step_seconds": per_image * batch,
                "sampling_seconds": took.get(SAMPLING, 0.0) * prompts,
                "loading_seconds": took.get(LOADING, 0.0),
            }
        return DEMO_PACE if self.model(options) is None else None

    def words_of(self, options: Values, key: str) -> RunSettings:
        """The words of an earlier run's prompts."""
        words = PROMPT.fullmatch(options.get("data", {}).get("instance_prompt") or "")
        settings = RunSettings(trigger=words[1], class_word=words[2]) if words else self.defaults(key)
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
        content = json.dumps([values, _photos(workspace, self.key(workspace, draft)).signature()], sort_keys=True)
        return RunRecord(workspace.runs / DRY_RUNS / hashlib.sha256(content.encode()).hexdigest()[:20])

    def start_dry_run(self, workspace: Workspace, draft: Draft) -> None:
        """Start a dry run of the draft, unless one is running or finished. Raises: InputError for an invalid option."""
        self.check(workspace, draft)
        record = self.dry_run(workspace, draft)
        if is_measuring(record) or measured(record) is not None:
            return
        if record.path.exists():
            shutil.rmtree(record.path)
        launching.start_dry_run(workspace, self.name, self.values(workspace, draft), record.path)


class ClassifyTask(Task):
    """A classifier of images into the user's classes."""

    name = "classify"
    image_folder = "data_dir"
    presets = presets.CLASSIFY
    default_preset = "Fast"

    def key(self, workspace: Workspace, draft: Draft) -> str:
        """The id of the draft's dataset; if it is gone, of the user's newest one, or the example."""
        datasets = class_datasets(workspace)
        return draft.set if draft.set in (*EXAMPLES, *datasets) else next(iter(datasets), next(iter(EXAMPLES)))

    def num_images(self, workspace: Workspace, key: str) -> int:
        """The number of images of all classes."""
        return find_classes(workspace, key).count

    def set_of_folder(self, workspace: Workspace, folder: str | None) -> str | None:
        """The id of the dataset in `folder`, or of an example."""
        examples = {None if path is None else str(path.absolute()): key for key, (_, path) in EXAMPLES.items()}
        return examples.get(folder) or super().set_of_folder(workspace, folder)

    def check(self, workspace: Workspace, draft: Draft) -> None:
        """Raises: InputError if the classes are not ready."""
        classes = find_classes(workspace, self.key(workspace, draft))
        if not classes.is_ready:
            raise InputError(classes.warnings()[0])

    def complete(self, workspace: Workspace, key: str, settings: RunSettings, values: Values) -> Values:
        """Add the images, and adapt what the user did not choose to their number."""
        return fitted(find_classes(workspace, key), values, settings.options)

    def title(self, settings: RunSettings, key: str) -> str:
        """The example, or the user's classes."""
        return EXAMPLES[key][0] if key in EXAMPLES else "your classes"

    def model(self, options: FewShotOptions) -> str | None:
        """The CLIP model."""
        return None if options.model.is_built_in else options.model.model

    def seconds(self, workspace: Workspace, draft: Draft, options: FewShotOptions) -> float | None:
        """The steps of all trials at the pace of the digits example."""
        if self.model(options) is not None:
            return None
        fewest = _fewest(find_classes(workspace, self.key(workspace, draft)))
        shots = [fewest if one == ALL else one for one in options.data.all_shots()]
        steps = sum(options.optimisation.steps(one) for one in shots) * len(options.data.seeds)
        return DEMO_CLASSIFIER_START + DEMO_CLASSIFIER_STEP * steps * len(options.method.adapters())


def fitted(classes: LabelledClasses, values: Values, chosen: Values) -> Values:
    """The options of a run on `classes`.

    Args:
        values: options of the preset and the user.
        chosen: the user's options only, which are not adapted to the number of images.
    """
    added: Values = {"data": classes.data_options(), "optimisation": {}}
    shots = values.get("data", {}).get("shots", [ALL])
    if "shots" not in chosen.get("data", {}):
        shots = added["data"]["shots"] = fitting_shots(classes, shots)
    uses_built_in = "model" not in values.get("model", {})
    if uses_built_in and "iterations_per_shot" not in chosen.get("optimisation", {}) and shots == [ALL]:
        added["optimisation"] = bounded_steps(classes)
    return merged(values, added)


def fitting_shots(classes: LabelledClasses, wanted: Sequence[str]) -> list[str]:
    """The values of `wanted` (images per class) that every class can provide; ["all"] if there are none."""
    fitting = [
        one for one in wanted if one == ALL or (one.isdecimal() and _fewest(classes) >= int(one) + min(int(one), MOST_VALIDATION))
    ]
    return fitting or [ALL]


def bounded_steps(classes: LabelledClasses) -> dict[str, Any]:
    """Lower `iterations_per_shot` for large classes, so that training on all images does not take hours."""
    fewest = max(1, _fewest(classes))
    return {"iterations_per_shot": max(1, MOST_STEPS // fewest)} if BUILT_IN_STEPS * fewest > MOST_STEPS else {}


def _fewest(classes: LabelledClasses) -> int:
    return min((one.learnable for one in classes.classes), default=0)


def _photos(workspace: Workspace, key: str) -> Dataset:
    return Dataset.of(workspace, None if key == EXAMPLE else key)


def measured(record: RunRecord) -> DryRunReport | None:
    """What a dry run or a finished run has measured; None if it has not."""
    return DryRunReport.read(record.path) if record.status().state == "done" else None


def is_measuring(record: RunRecord) -> bool:
    """Whether a dry run is active or queued."""
    return RunSnapshot(record).is_active


def _rounded(seconds: float) -> str:
    return f"{max(1, round(seconds / 60))} min" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _model_title(name: str | None) -> str:
    if name is None:
        return "demo model"
    return "SDXL" if "stable-diffusion-xl" in name.lower() else portable_name(name)


SUBJECT, CLASSIFY = SubjectTask(), ClassifyTask()
TASKS: dict[str, Task] = {task.name: task for task in (SUBJECT, CLASSIFY)}
