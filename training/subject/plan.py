"""The phases of a subject's run, and how long each takes, from what the run has measured before the training."""

from __future__ import annotations

import math

from training.options import SubjectOptions
from training.runs.progress import PlannedPhase
from training.runs.run_files import (
    CALIBRATING,
    CERTIFYING,
    CLASS_IMAGES,
    COMPARING,
    CROSS_VALIDATION,
    DRY_RUN,
    ENCODING,
    EXPORTING,
    LOADING,
    SAMPLING,
    TRAINING,
    UPLOADING,
)

# The steps of a fold, as a share of those of the training.
FOLD_SHARE = 0.5
# The forward passes of one image in a measurement of the losses and in a calibration, and those that take as long as a training
# step on that image.
MEASURED_PASSES, CALIBRATION_PASSES, PASSES_PER_STEP = 128, 32, 3
# Seconds to write the exported files, and to start the process that checks them.
WRITING_SECONDS, PROCESS_SECONDS = 2.0, 12.0


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
    before = [LOADING, ENCODING, *class_images, SAMPLING, DRY_RUN, CALIBRATING, *class_images]
    after = [TRAINING, EXPORTING, COMPARING]
    after += [CERTIFYING] * options.validation.certify + [UPLOADING] * options.validation.push_to_hub
    repeated = [PlannedPhase(CROSS_VALIDATION, number=fold + 1) for fold in range(folds)]
    return [*map(PlannedPhase, before), *repeated, *map(PlannedPhase, after)]


def estimated_seconds(
    options: SubjectOptions, step_seconds: float, sampling_seconds: float, loading_seconds: float
) -> dict[str, float]:
    """The duration of each phase by name.

    Args:
        step_seconds: of one training step.
        sampling_seconds: of the images of all validation prompts.
        loading_seconds: of the base model.
    """
    optimisation, steps = options.optimisation, options.optimisation.max_train_steps
    per_pass = step_seconds / (PASSES_PER_STEP * optimisation.train_batch_size * optimisation.gradient_accumulation_steps)
    every, measuring = options.validation.measured_every(steps), MEASURED_PASSES * per_pass
    per_image = sampling_seconds / len(options.output.validation_prompt)

    def training(count: int) -> float:
        return count * step_seconds + math.ceil(count / every) * measuring

    return {
        LOADING: loading_seconds,
        ENCODING: 0.0,
        SAMPLING: sampling_seconds,
        DRY_RUN: 3 * step_seconds,
        CALIBRATING: CALIBRATION_PASSES * per_pass,
        CLASS_IMAGES: options.data.num_class_images * per_image,
        CROSS_VALIDATION: training(fold_steps(steps)) + measuring,
        TRAINING: training(steps) + math.ceil(steps / options.output.validation_steps) * sampling_seconds,
        EXPORTING: sampling_seconds + WRITING_SECONDS,
        COMPARING: (options.validation.num_candidate_images or 0) * sampling_seconds + WRITING_SECONDS,
        CERTIFYING: PROCESS_SECONDS + loading_seconds + 2 * per_image,
        UPLOADING: PROCESS_SECONDS,
    }
