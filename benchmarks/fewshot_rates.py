"""Compare learning rates of adapter methods on the built-in CLIP.

    python benchmarks/fewshot_rates.py --method tinylora vblora --rates 0.003 0.01 0.05
    python benchmarks/fewshot_rates.py --method tinylora vblora --rates 0.003 0.01 0.05 --data_dir CLASSES

The few-shot recipe trains each method, with its default values of the other options. The table has the accuracy on at most 400
images that the split uses neither for training nor for testing. The recipe itself validates on four images per class, which do
not suffice to tell rates apart. Test images are not used.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from dataclasses import dataclass, field
from statistics import fmean

import torch
from accelerate import Accelerator
from transformers import HfArgumentParser

from pipelines.clip import load_clip
from pipelines.fewshot.data import LabelledImage
from pipelines.fewshot.metrics import top1
from training.engine.opening import open_run
from training.fewshot.experiment import Experiment, SplitImages, labelled_set
from training.fewshot.trials import Trial, fit_adapter
from training.fewshot.validation import FittingClock
from training.options.fewshot import FewShotOptions, parse_fewshot_options
from training.runs.run import RunDirectory

# Most images that a trained adapter is scored on.
SCORED = 400


@dataclass
class BenchmarkOptions:
    """The options of the benchmark."""

    method: list[str] = field(metadata={"help": "Adapter methods."})
    rates: list[float] = field(metadata={"help": "Peak learning rates."})
    data_dir: str | None = field(default=None, metadata={"help": "Labelled images. Default: scikit-learn's digits."})
    shots: int = field(default=16, metadata={"help": "Training images per class."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Seeds of the splits."})
    flags: str = field(default="", metadata={"help": "Further flags of the few-shot recipe, in one string."})


def recipe_options(options: BenchmarkOptions, rate: float, folder: str) -> FewShotOptions:
    """The options of the few-shot recipe at one learning rate."""
    flags = ["--shots", str(options.shots), "--seeds", *map(str, options.seeds), "--method", *options.method]
    data = [] if options.data_dir is None else ["--data_dir", options.data_dir]
    return parse_fewshot_options(
        [*flags, *data, "--learning_rate", str(rate), "--output_dir", folder, *shlex.split(options.flags)]
    )


def unused_images(images: SplitImages) -> list[LabelledImage]:
    """At most `SCORED` images that are neither training nor test images of the split, at equal distances in the dataset."""
    used = {image.name for image in (*images.train, *images.test)}
    free = [image for image in images.experiment.dataset.images if image.name not in used]
    return free[:: -(-len(free) // SCORED)]


def accuracies(accelerator: Accelerator, options: BenchmarkOptions, rate: float) -> dict[str, list[float]]:
    """The accuracy of each method at the learning rate `rate`, one value for each seed."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_options(options, rate, f"{folder}/run")
        run: RunDirectory = open_run(recipe, recipe.title(), accelerator)
        experiment = Experiment.create(load_clip(recipe.model.model), labelled_set(recipe.data)[0], recipe.data, run.path)
        results: dict[str, list[float]] = {method: [] for method in options.method}
        for seed in options.seeds:
            images = experiment.split_images((options.shots, seed))
            scored = unused_images(images)
            labels = torch.tensor([image.label for image in scored])
            for method in options.method:
                trial = Trial(options.shots, seed, method)
                fitted = fit_adapter(accelerator, run, images, trial, recipe, FittingClock())
                results[method].append(top1(fitted.logits(scored), labels))
                sys.stderr.write(f"{method}, rate {rate:g}, seed {seed}: {results[method][-1]:.1%} of {len(scored)} images\n")
    return results


def main(options: BenchmarkOptions) -> None:
    """Train every method at every rate and print a table of mean accuracies."""
    accelerator = Accelerator()
    columns = {rate: accuracies(accelerator, options, rate) for rate in options.rates}
    lines = ["| method | " + " | ".join(f"{rate:g}" for rate in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for method in options.method:
        cells = (f"{fmean(column[method]):.1%}" for column in columns.values())
        lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(HfArgumentParser(BenchmarkOptions, description=__doc__).parse_args_into_dataclasses()[0])
