"""Compare the held-out denoising loss of the base model, LoRA and NoRA on several subjects.

    python benchmarks/heldout_loss.py --subjects_dir SUBJECTS --output_dir OUT

`SUBJECTS` contains a folder of images for each subject. All images but the last are training images. The loss of a centre crop of
the last one is measured before and after training, with fixed noise and timesteps. Both methods use the trainer's recipe with
fewer steps: its defaults optimise likeness and also learn the backgrounds of four training images.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from transformers import HfArgumentParser

from pipelines.built_in import BUILT_IN_MODEL
from pipelines.errors import InputError
from pipelines.subject.folder_scan import scan_folder
from training.dreambooth_nora import main as train_subject
from training.options import parse_options
from training.runs.run import RunDirectory

CLASS_WORDS = {"robot_toy": "toy", "candle": "candle", "backpack_dog": "backpack", "wolf_plushie": "stuffed animal"}
METHODS = ("lora", "nora")
FILES = {"compact": "adapter/compact", "full": "adapter/full", "diffusers": "diffusers"}


@dataclass
class BenchmarkOptions:
    """The options of the benchmark."""

    subjects_dir: str = field(metadata={"help": "A folder of images for each subject."})
    pretrained_model_name_or_path: str = field(default=str(BUILT_IN_MODEL), metadata={"help": "SDXL base model."})
    output_dir: str = field(
        default="runs/heldout_loss", metadata={"help": "Folder for the runs; finished runs are not repeated."}
    )
    flags: str = field(
        default="--max_train_steps 200 --snr_gamma 5 --random_flip --heldout_steps 200 --no_certify",
        metadata={"help": "Flags for every run, in one string."},
    )
    lora_flags: str = field(default="--learning_rate 3e-4", metadata={"help": "Flags for LoRA's runs."})
    nora_flags: str = field(default="--learning_rate 1e-3", metadata={"help": "Flags for NoRA's runs."})


@dataclass(frozen=True)
class Result:
    """The result of one run: loss before and after, trainable parameters, bytes by kind of file, seconds."""

    before: float
    after: float
    trained: int
    sizes: dict[str, int]
    seconds: float


def subject_folders(options: BenchmarkOptions) -> list[Path]:
    """The folders of the subjects. Raises: InputError if there is none."""
    folder = Path(options.subjects_dir)
    subjects = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if not subjects:
        raise InputError(f"subjects_dir must contain a folder of images for each subject, got {options.subjects_dir!r}.")
    return subjects


def run_path(folder: Path, method: str, options: BenchmarkOptions) -> Path:
    """The run directory of a subject and a method."""
    return Path(options.output_dir) / f"{folder.name}-{method}"


def flags_of(folder: Path, method: str, options: BenchmarkOptions) -> list[str]:
    """The recipe's flags for training on all images of `folder` but the last, without the output directory."""
    return [
        *("--method", method, "--instance_data_dir", str(folder)),
        *("--instance_prompt", f"a photo of sks {CLASS_WORDS.get(folder.name, folder.name)}"),
        *("--pretrained_model_name_or_path", options.pretrained_model_name_or_path),
        *("--heldout_image", scan_folder(folder).subjects[0].images[-1].name),
        *shlex.split(options.flags),
        *shlex.split(getattr(options, f"{method}_flags")),
    ]


def run_subject(folder: Path, method: str, options: BenchmarkOptions) -> Result:
    """Train on all images of `folder` but the last, unless the run is finished already, and return the result."""
    run = RunDirectory(run_path(folder, method, options))
    if run.status().state != "done":
        train_subject(parse_options([*flags_of(folder, method, options), "--output_dir", str(run.path)]))
    return result_of(run)


def result_of(run: RunDirectory) -> Result:
    """The result of a finished run."""
    losses = [logged.values["heldout_loss"] for logged in run.metrics() if "heldout_loss" in logged.values]
    sizes = {name: sum(file.stat().st_size for file in (run.path / path).rglob("*.safetensors")) for name, path in FILES.items()}
    status = run.status()
    return Result(losses[0], losses[-1], status.num_trainable_parameters, sizes, status.seconds)


def table(results: dict[str, dict[str, Result]]) -> str:
    """The results as Markdown: losses and seconds by subject, then parameters and bytes by method."""
    lines = ["| subject | base | LoRA | NoRA | LoRA seconds | NoRA seconds |", "|---|---|---|---|---|---|"]
    for name, each in results.items():
        lora, nora = each["lora"], each["nora"]
        losses = " | ".join(f"{loss:.4f}" for loss in (lora.before, lora.after, nora.after))
        lines.append(f"| {name} | {losses} | {lora.seconds:.0f} | {nora.seconds:.0f} |")
    columns = (
        [each["lora"].before for each in results.values()],
        *([each[m].after for each in results.values()] for m in METHODS),
    )
    lines += ["| mean | " + " | ".join(f"{fmean(column):.4f}" for column in columns) + " | | |", ""]
    lines += ["| method | trainable parameters | " + " | ".join(f"{name} bytes" for name in FILES) + " |"]
    lines += ["|---|---|" + "---|" * len(FILES)]
    for method, result in next(iter(results.values())).items():
        lines.append(f"| {method} | {result.trained:,} | " + " | ".join(f"{result.sizes[name]:,}" for name in FILES) + " |")
    return "\n".join(lines)


def main(options: BenchmarkOptions) -> None:
    """Run every subject with every method and print the table.

    Raises: InputError if there is no subject.
    """
    results = {path.name: {method: run_subject(path, method, options) for method in METHODS} for path in subject_folders(options)}
    sys.stdout.write(table(results) + "\n")


if __name__ == "__main__":
    main(HfArgumentParser(BenchmarkOptions, description=__doc__).parse_args_into_dataclasses()[0])
