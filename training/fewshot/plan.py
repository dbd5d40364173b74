"""How long a run of a classifier takes with the built-in model."""

from __future__ import annotations

from pipelines.fewshot.shots import MOST_VALIDATION
from training.options.fewshot import ALL, FewShotOptions

# Seconds on one core for each image that is trained on or encoded, and for the start. The presets on the digits took 75, 193 and
# 336 s on two idle cores (estimated: 79, 185 and 318 s). Processor time of Fast: digits 87 s, shapes 74 s (estimated: 79 and
# 70 s); of the default method alone on all images 149 and 94 s (estimated: 143 and 94 s).
TRAINED, ENCODED, START = 0.36 / 32, 0.009, 5.0


def estimated_seconds(options: FewShotOptions, num_classes: int, fewest: int, num_tested: int) -> float:
    """The duration of a run, from the images that are trained on and encoded in all trials.

    Args:
        num_classes: number of classes.
        fewest: number of images of the smallest class that are not for testing.
        num_tested: number of test images.
    """
    optimisation, num_adapters, seconds = options.optimisation, len(options.method.adapters()), 0.0
    for shots in options.data.all_shots():
        most_validation = options.data.num_validation_images or MOST_VALIDATION
        per_class = max(1, fewest - most_validation) if shots == ALL else shots
        validation_per_class = options.data.num_validation_images or min(per_class, MOST_VALIDATION)
        num_train, num_validation = num_classes * per_class, num_classes * validation_per_class
        per_step = optimisation.train_batch_size * optimisation.gradient_accumulation_steps
        seconds += num_adapters * optimisation.steps(per_class) * per_step * TRAINED
        # For the baselines, all views of the training images; all other images once for them, and once for each adapter.
        views = options.data.views if len(options.method.methods()) > num_adapters else 0
        seconds += (num_train * views + (num_tested + num_validation) * (1 + num_adapters)) * ENCODED
    return START + seconds * len(options.data.seeds)
