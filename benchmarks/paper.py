"""Repeat the NoRA paper's experiments on images, and print the results beside the published figures.

    python benchmarks/paper.py --dataset_root DATA --tables fewshot
    python benchmarks/paper.py --subjects_dir SUBJECTS --tables subjects

Few-shot: ViT-B/16 on Food101, OxfordPets and DTD with 4 and 16 images per class, in the layout of CoOp's DATASETS.md below
`DATA`. Subjects: SDXL, 500 steps, on a folder of images for each subject, compared by the arena. Both need a GPU and the weights.
Every run is an ordinary command of a recipe with a run directory of its own; finished runs are not repeated.

The paper is "Efficient Fine-Tuning of Large Models via Nested Low-Rank Adaptation" (ICCV 2025; preprint arXiv 2408.10280). Its
tables were not available where this was written: neither the text of the proceedings nor of the preprint beyond the introduction,
and the authors' repository has no results. `PUBLISHED` therefore has only what others quote; `--published` adds figures from a
.csv file. `SETTINGS` names the source of every setting.
"""

from __future__ import annotations

import csv
import itertools
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

from tqdm.auto import tqdm
from transformers import HfArgumentParser

from pipelines.errors import InputError
from pipelines.fewshot.baselines import BASELINES
from pipelines.fewshot.sets import SETS
from pipelines.methods import method_named
from training.arena import main as train_subjects
from training.comparison.cells import RECIPES
from training.comparison.report import markdown
from training.comparison.running import is_finished, run_cell
from training.options.arena import parse_arena_options
from training.runs.arena_files import ArenaReport, CellRecord
from training.runs.fewshot_files import FewShotReport
from training.runs.recipe_process import recipe_command

TABLES = ("fewshot", "subjects")
COLUMNS = ("method", "dataset", "shots", "accuracy")
# Method, dataset and shots.
Key = tuple[str, str, int]
# Accuracy in percent. CLIP-LoRA's of 4 shots, as the README of github.com/MonsieurNam/QLORA_CLIP_IxT quotes them. Those of NoRA,
# of CLIP-LoRA with 16 shots and of the baselines were searched for and not found.
PUBLISHED: dict[Key, float] = {("lora", "food101", 4): 82.7, ("lora", "oxford_pets", 4): 91.0, ("lora", "dtd", 4): 63.8}


@dataclass(frozen=True)
class Setting:
    """The methods of one run, and their settings.

    Args:
        methods: of the few-shot recipe.
        flags: of the few-shot recipe.
        source: of the flags, with what is not known.
    """

    methods: tuple[str, ...]
    flags: str
    source: str


SETTINGS = {
    "baselines": Setting(
        ("zeroshot", "coop", "clip_adapter", "tip_adapter_f", "taskres"),
        "",
        "The recipe's own; they choose their hyperparameters on validation images.",
    ),
    "lora": Setting(
        ("lora",),
        "--lora_rank 2 --alpha 1 --dropout 0.25 --projections q k v --learning_rate 2e-4 --iterations_per_shot 500"
        " --train_batch_size 32",
        "The defaults of CLIP-LoRA's code, github.com/MaxZanella/CLIP-LoRA.",
    ),
    "nora": Setting(
        ("nora",),
        "--basis weight --rank 409 --inner_r 16 --alpha 0.03912 --inner_init gaussian --projections q k v --learning_rate 1e-2"
        " --iterations_per_shot 400 --train_batch_size 64 --optimizer AdamW",
        "The defaults of the authors' code, github.com/lliai/LoRA-Zoo, for the serial form in main_NoRA_C.py: inner rank 16, "
        "scaling 1 / rank, Gaussian inner factors (there of standard deviation 1), and outer rank 0.8 of the layer's width: 409 "
        "for the text encoder and 614 for the image encoder (here 409 for both). Its sweeps also try the learning rates 1e-3 and "
        "5e-3 and the ranks 16, 32, 256 and 384. Which of them the paper's table has is not known here.",
    ),
}
EXPLANATION = (
    "Accuracy in percent: measured, mean ± 95% interval over seeds (published). A dash stands for a run that has not finished, "
    "or for a published figure that is not known here."
)
NOTES = (
    "Both codes crop with scales of 0.08 to 1, flip images, train in fp16 with AdamW (weight decay 0.01) and a cosine schedule, "
    "and adapt all layers of both encoders, as here. The recipe also warms up over 5% of the steps, clips gradients, and lowers "
    "an adapter's scale if validation shows that it hurts. The authors' code of NoRA also records the best test accuracy of all "
    "epochs; here test images are used once. The number of seeds of the published figures is not known here."
)
SUBJECT_NOTES = (
    "The rank, the learning rate, the subjects and the measures of the paper are not known here: the ranks and rates are the "
    "recipe's defaults, which are those of diffusers' script for LoRA."
)
SUBJECT_STEPS = 500


@dataclass
class BenchmarkOptions:
    """The options of the benchmark."""

    dataset_root: str | None = field(default=None, metadata={"help": "Folder with the folders of the few-shot datasets."})
    subjects_dir: str | None = field(default=None, metadata={"help": "A folder of images for each subject."})
    tables: list[str] = field(default_factory=lambda: list(TABLES), metadata={"help": f"Which to make: {', '.join(TABLES)}."})
    output_dir: str = field(default="runs/paper", metadata={"help": "Folder for the runs; finished runs are not repeated."})
    dry_run: bool = field(default=False, metadata={"help": "Only print the commands that would run."})
    published: str | None = field(
        default=None, metadata={"help": f"A .csv of published figures with the columns {', '.join(COLUMNS)} (in percent)."}
    )
    datasets: list[str] = field(
        default_factory=lambda: ["food101", "oxford_pets", "dtd"], metadata={"help": f"Few-shot datasets: {', '.join(SETS)}."}
    )
    shots: list[int] = field(default_factory=lambda: [4, 16], metadata={"help": "Training images per class."})
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3], metadata={"help": "Seeds of splits and training."})
    fewshot_flags: str = field(
        default="--model ViT-B-16 --pretrained openai --mixed_precision fp16 --crop_scale 0.08 1 --random_flip",
        metadata={"help": "Flags for every few-shot run, in one string."},
    )
    pretrained_model_name_or_path: str = field(
        default="stabilityai/stable-diffusion-xl-base-1.0", metadata={"help": "SDXL base model."}
    )
    subject_flags: str = field(
        default="--resolution 1024 --mixed_precision bf16", metadata={"help": "Flags for every subject run, in one string."}
    )

    def __post_init__(self) -> None:
        for name, allowed in (("tables", TABLES), ("datasets", tuple(SETS))):
            if wrong := [value for value in getattr(self, name) if value not in allowed]:
                raise InputError(f"{name} must be any of {', '.join(allowed)}, got {wrong[0]!r}.")
        for table, folder in (("fewshot", "dataset_root"), ("subjects", "subjects_dir")):
            if table in self.tables and getattr(self, folder) is None:
                raise InputError(f"The table {table!r} needs --{folder}. Give it, or leave the table out of --tables.")


@dataclass(frozen=True)
class Run:
    """One run of the few-shot recipe.

    Args:
        dataset: its name.
        name: of the setting.
        path: of the run directory.
        flags: of the recipe, without the run directory.
    """

    dataset: str
    name: str
    path: Path
    flags: tuple[str, ...]

    @property
    def command(self) -> list[str]:
        """The words of the command."""
        return ["python", "-m", RECIPES["few-shot"], *self.flags, "--output_dir", str(self.path)]

    def finish(self) -> str | None:
        """Start or resume the run unless it has finished before; returns the reason if it fails."""
        command = recipe_command(self.command[2], self.command[3:])
        record = CellRecord("few-shot", self.dataset, self.name, "final", None, None, command, "running")
        return run_cell(self.path, record, {}, Event()).reason


def fewshot_runs(options: BenchmarkOptions) -> dict[tuple[str, str], Run]:
    """The few-shot runs, by dataset and name of the setting."""
    numbers = ["--shots", *map(str, options.shots), "--seeds", *map(str, options.seeds)]
    return {
        (dataset, name): Run(
            dataset,
            name,
            Path(options.output_dir) / f"{dataset}-{name}",
            (
                *("--data_dir", options.dataset_root, "--dataset", dataset, *numbers, "--method", *setting.methods),
                *shlex.split(options.fewshot_flags),
                *shlex.split(setting.flags),
            ),
        )
        for dataset in options.datasets
        for name, setting in SETTINGS.items()
    }


def subject_command(options: BenchmarkOptions) -> list[str]:
    """The words of the command of the arena of the subjects. Both methods have their default learning rate; none is swept."""
    rates = {name: method_named(name).defaults("subject", False).learning_rate for name in ("lora", "nora")}
    return [
        *("python", "-m", "training.arena", "--subjects_dir", options.subjects_dir, "--methods"),
        *(f"{name}:learning_rate={rate}" for name, rate in rates.items()),
        *("--max_train_steps", str(SUBJECT_STEPS), "--seeds", *map(str, options.seeds)),
        *("--pretrained_model_name_or_path", options.pretrained_model_name_or_path, "--subject_flags", options.subject_flags),
        *("--output_dir", str(Path(options.output_dir) / "subjects")),
    ]


def published_figures(options: BenchmarkOptions) -> dict[Key, float]:
    """`PUBLISHED`, with the figures in the file that is given. Raises: InputError naming a column that is missing."""
    figures = dict(PUBLISHED)
    if options.published is None:
        return figures
    with Path(options.published).open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            if missing := [name for name in COLUMNS if not line.get(name)]:
                raise InputError(
                    f"{options.published!r} must have the columns {', '.join(COLUMNS)}, but a line has no {missing[0]}."
                )
            figures[line["method"], line["dataset"], int(line["shots"])] = float(line["accuracy"])
    return figures


def measured_figures(runs: Mapping[tuple[str, str], Run]) -> dict[Key, tuple[float, float]]:
    """Mean accuracy and half the width of its 95% interval over seeds, both in percent, of the finished runs."""
    return {
        (summary.method, dataset, summary.shots): (
            100 * summary.top1.value,
            50 * (summary.top1.high - summary.top1.low),
        )
        for (dataset, _), run in runs.items()
        if is_finished(run.path)
        for summary in FewShotReport.read(run.path).summary
    }


def fewshot_table(options: BenchmarkOptions, runs: Mapping[tuple[str, str], Run]) -> Iterator[str]:
    """The lines of the few-shot table, in percent: measured, and published in brackets."""
    measured, published = measured_figures(runs), published_figures(options)
    yield f"| shots | method | {' | '.join(SETS[dataset].title for dataset in options.datasets)} |"
    yield "|---" * (2 + len(options.datasets)) + "|"
    methods = [method for setting in SETTINGS.values() for method in setting.methods]
    for shots, method in itertools.product(options.shots, methods):
        keys = [(method, dataset, shots) for dataset in options.datasets]
        cells = [_cell(measured.get(key), published.get(key)) for key in keys]
        title = method.replace("_", " ") if method in BASELINES else method_named(method).title
        yield f"| {shots} | {title} | {' | '.join(cells)} |"
    yield f"\n{EXPLANATION}\n"
    yield from (f"- {name}: `{setting.flags or 'no further flags'}`. {setting.source}" for name, setting in SETTINGS.items())
    yield f"- {NOTES}"


def _cell(measured: tuple[float, float] | None, published: float | None) -> str:
    mean = "-" if measured is None else f"{measured[0]:.1f} ± {measured[1]:.1f}"
    return f"{mean} ({'-' if published is None else f'{published:.1f}'})"


def subject_table(options: BenchmarkOptions) -> Iterator[str]:
    """Run what is not finished of the arena of the subjects; the lines of its report."""
    arena = train_subjects(parse_arena_options(subject_command(options)[3:]))
    yield markdown(ArenaReport.read(arena.path), {})
    yield f"- {SUBJECT_NOTES}"


def main(options: BenchmarkOptions) -> None:
    """Run what is not finished, and print the tables. A run that fails leaves dashes, and the others go on."""
    fewshot = fewshot_runs(options) if "fewshot" in options.tables else {}
    with_subjects = "subjects" in options.tables
    if options.dry_run:
        commands = [*(run.command for run in fewshot.values()), *([subject_command(options)] if with_subjects else ())]
        sys.stdout.write("".join(f"{shlex.join(command)}\n" for command in commands))
        return
    reasons = {run: run.finish() for run in tqdm(fewshot.values(), desc="runs")}
    lines = [*(fewshot_table(options, fewshot) if fewshot else ())]
    lines += [f"- The run in `{run.path}` failed: {reason}" for run, reason in reasons.items() if reason is not None]
    lines += [*(subject_table(options) if with_subjects else ())]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(HfArgumentParser(BenchmarkOptions, description=__doc__).parse_args_into_dataclasses()[0])
