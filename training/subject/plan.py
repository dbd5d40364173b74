"""The phases of a subject's run, and how long each takes at the pace that this run, or another one, has measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.built_in import is_built_in, recorded_name
from pipelines.subject.heldout import num_folds
from training.options import NEW_SCENES, SubjectOptions
from training.options.validation import UNRELATED_PROMPTS
from training.runs.progress import PlannedPhase
from training.runs.record import RunRecord
from training.runs.run_files import (
    CALIBRATING,
    CERTIFYING,
    CLASS_IMAGES,
    COMPARING,
    CROSS_VALIDATION,
    DRY_RUN,
    ENCODING,
    EVALUATING,
    EXPORTING,
    LOADING,
    SAMPLING,
    STATUS,
    TRAINING,
    UPLOADING,
    DryRunReport,
)
from training.runs.snapshot import RunSnapshot, began

# The steps of a fold, as a share of those of the training.
FOLD_SHARE = 0.5
# The forward passes of one image in a measurement of the losses and in a calibration, and those that take as long as a training
# step on that image.
MEASURED_PASSES, CALIBRATION_PASSES, PASSES_PER_STEP = 128, 32, 3
# The passes of a generated image: 25 steps, each with and without the prompt.
SAMPLE_PASSES = 50
# Loading an adapter, generating its samples and scoring them, compared with generating them.
SCORED = 1.5
# The certificate's images, with fewer steps, as a number of samples.
CERTIFIED_SAMPLES = 3
# Seconds to write the exported files, and to start a process: of the run, and of the one that checks these files.
WRITING_SECONDS, PROCESS_SECONDS = 2.0, 12.0
MODEL = "pretrained_model_name_or_path"
# The runs whose pace may be that of the next one.
RECENT = 20


def fold_steps(max_train_steps: int) -> int:
    """The number of steps of one fold."""
    return max(1, round(FOLD_SHARE * max_train_steps))


def phases(options: SubjectOptions, folds: int) -> list[PlannedPhase]:
    """The phases of a run in order, without estimates.

    Args:
        folds: of cross-validation; 0 without it.
    """
    # Some class images are needed for the dry run, the others after it.
    class_images = [CLASS_IMAGES] if options.data.with_prior_preservation else []
    sampling = [SAMPLING] * options.output.validation_images
    before = [LOADING, ENCODING, *class_images, *sampling, DRY_RUN, CALIBRATING, *class_images]
    after = [TRAINING, EXPORTING, COMPARING] + [EVALUATING] * options.validation.evaluate
    after += [CERTIFYING] * options.validation.certify + [UPLOADING] * options.validation.push_to_hub
    repeated = [PlannedPhase(CROSS_VALIDATION, number=fold + 1) for fold in range(folds)]
    return [*map(PlannedPhase, before), *repeated, *map(PlannedPhase, after)]


@dataclass(frozen=True)
class Pace:
    """How fast a machine works with a base model, in seconds.

    Args:
        image: of a training step, for each image.
        sample: of one generated image.
        loading: of loading the model.
    """

    image: float
    sample: float
    loading: float

    @classmethod
    def measured(cls, record: RunRecord) -> Pace | None:
        """The pace of a run; None if it is not done or has measured none."""
        run = RunSnapshot(record)
        report, took = run.read_file(DryRunReport), {phase.name: phase.seconds or 0.0 for phase in run.status.plan or ()}
        if run.status.state != "done" or report is None:
            return None
        return cls.of(report, run.options, lambda phase: took.get(phase, 0.0))

    @classmethod
    def of(cls, report: DryRunReport, options: Mapping[str, Mapping[str, Any]], seconds: Callable[[str], float]) -> Pace | None:
        """The pace of a run after its dry run; None if its options have no batch size.

        Args:
            options: of the run, by group.
            seconds: the duration of a phase that has ended, by its name; 0 if it was not measured.
        """
        optimisation, prompts = options.get("optimisation", {}), options.get("output", {}).get("validation_prompt") or ()
        batch = optimisation.get("train_batch_size", 0) * optimisation.get("gradient_accumulation_steps", 0)
        if not batch:
            return None
        image = report.seconds_per_step / batch
        sample = seconds(SAMPLING) / max(1, len(prompts)) or image * SAMPLE_PASSES / PASSES_PER_STEP
        return cls(image, sample, seconds(LOADING))


# With the built-in model on one core. The default run took 146 s of processor time (estimated: 177 s), of which the first five
# samples took 2.7 s, the comparison of checkpoints 19 s (estimated: 23 s) and the certificate 12 s (estimated: 18 s).
DEMO_PACE = Pace(image=0.23 / 4, sample=0.6, loading=4.0)


def expected_pace(folder: Path, model: str) -> Pace | None:
    """The pace of the newest finished run in `folder` with this base model, else that of the built-in one; None for others."""
    runs = sorted((status.parent for status in folder.glob(f"*/{STATUS}")), key=began, reverse=True)[:RECENT]
    of_model = [run for run in map(RunRecord, runs) if RunSnapshot(run).chosen("model", MODEL) == recorded_name(model)]
    paces = filter(None, map(Pace.measured, of_model))
    return next(paces, DEMO_PACE if is_built_in(model) else None)


def estimated_seconds(options: SubjectOptions, pace: Pace) -> dict[str, float]:
    """The duration of each phase by name."""
    steps, images = options.optimisation.max_train_steps, options.optimisation.images_per_step
    per_step, per_pass = images * pace.image, pace.image / PASSES_PER_STEP
    every, measuring = options.validation.measured_every(steps), MEASURED_PASSES * per_pass
    sampling = len(options.output.validation_prompt) * pace.sample * options.output.validation_images

    def training(count: int) -> float:
        return count * per_step + math.ceil(count / every) * measuring

    return {
        LOADING: pace.loading,
        ENCODING: 0.0,
        SAMPLING: sampling,
        DRY_RUN: 3 * per_step,
        CALIBRATING: CALIBRATION_PASSES * per_pass,
        CLASS_IMAGES: options.data.num_class_images * pace.sample,
        CROSS_VALIDATION: training(fold_steps(steps)) + measuring,
        TRAINING: training(steps) + math.ceil(steps / options.output.validation_steps) * sampling,
        EXPORTING: WRITING_SECONDS,
        # The recommended adapter is exported too. Its images are missing only if none are compared.
        COMPARING: max(1, (options.validation.num_candidate_images or 0) * SCORED) * sampling + WRITING_SECONDS,
        EVALUATING: evaluated_images(options) * pace.sample,
        CERTIFYING: PROCESS_SECONDS + pace.loading + CERTIFIED_SAMPLES * pace.sample,
        UPLOADING: PROCESS_SECONDS,
    }


def evaluated_images(options: SubjectOptions) -> int:
    """The number of images that the evaluation generates: with the adapter and with the base model."""
    of_subject = len(options.data.subject_prompts()) * len(NEW_SCENES) * options.validation.num_evaluation_images
    return 2 * (of_subject + len(UNRELATED_PROMPTS))


def total_seconds(options: SubjectOptions, num_images: int, pace: Pace) -> float:
    """The duration of a run on a folder of so many images: the start of its process, and all its phases."""
    seconds, num_used = estimated_seconds(options, pace), num_images - len(options.data.excluded_images or ())
    return PROCESS_SECONDS + sum(
        seconds.get(phase.name, 0.0) for phase in phases(options, num_folds(num_used, options.data.heldout_image))
    )
