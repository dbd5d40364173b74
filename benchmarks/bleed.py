"""Measure how much one subject's prompt moves when another subject's adapter is switched on.

    python benchmarks/bleed.py --subjects assets/sample-subject SUBJECT --prompts "a photo of sks toy" "a photo of zwx candle"

Two subjects are trained apart, each into an adapter of its own, in three ways: NoRA in two slices of one basis (`--outer_slice`),
ordinary NoRA at the same rank, and LoRA. Measured are, on a held-out image of each subject with fixed noise:

- base, own, both: the denoising loss of the base model, with the subject's adapter, and with both adapters;
- gain left: (base - both) / (base - own);
- other alone, other added: how far the other adapter moves the prediction of the base model, and of the subject's own adapter,
  relative to how far the own adapter moves that of the base model;
- cosine: between the movements of the base model's prediction by the two adapters, each alone;
- images: the same as other added, of generated images.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from transformers import HfArgumentParser

from pipelines.built_in import BUILT_IN_MODEL
from pipelines.cache import TensorCache
from pipelines.errors import InputError
from pipelines.randomness import keyed_generator
from pipelines.subject.adapters import load_adapter
from pipelines.subject.base_model import load_base_model, model_resolution
from pipelines.subject.data import TrainingImage
from pipelines.subject.encoding import CachedLatents, CropConfig, LatentEncoder
from pipelines.subject.evaluation import mean_denoising_loss
from pipelines.subject.folder_scan import scan_folder
from pipelines.subject.generate import Sampling, generate
from pipelines.subject.loss import DenoisingLoss
from training.dreambooth_nora import main as train_subject
from training.options import parse_options
from training.runs.run import RunDirectory

SLICES = "NoRA, slices"
NOISE_LEVELS, SEEDS = 32, (0, 1, 2, 3)
HEADER = ("adapters", "subject", "base", "own", "both", "gain left", "other alone", "other added", "cosine", "images")


@dataclass
class BenchmarkOptions:
    """The options of the benchmark."""

    subjects: list[str] = field(metadata={"help": "Two folders of images; the last image of each is held out."})
    prompts: list[str] = field(metadata={"help": "The prompt of each subject."})
    output_dir: str = field(default="runs/bleed", metadata={"help": "Folder for the runs; finished runs are not repeated."})
    pretrained_model_name_or_path: str = field(default=str(BUILT_IN_MODEL), metadata={"help": "SDXL base model."})
    flags: str = field(
        default="--max_train_steps 300 --snr_gamma 5 --random_flip --heldout_steps 300 --no_certify",
        metadata={"help": "Flags for every run, in one string."},
    )
    nora_flags: str = field(
        default="--method nora --rank 16 --inner_r 8 --learning_rate 1e-3", metadata={"help": "Flags for NoRA's runs."}
    )
    lora_flags: str = field(default="--method lora --rank 4 --learning_rate 3e-4", metadata={"help": "Flags for LoRA's runs."})

    def __post_init__(self) -> None:
        if len(self.subjects) != 2 or len(self.prompts) != 2:
            raise InputError(f"There must be 2 subjects and 2 prompts, got {len(self.subjects)} and {len(self.prompts)}.")

    def kinds(self) -> dict[str, tuple[str, str]]:
        """The flags for the two subjects, by the kind of adapters."""
        # The slices of one basis come from the same statistics.
        slices = tuple(f"{self.nora_flags} --calibration base --outer_slice {number}/2" for number in (1, 2))
        return {SLICES: slices, "NoRA": (self.nora_flags,) * 2, "LoRA": (self.lora_flags,) * 2}


def held_out(folder: str) -> Path:
    """The last image of a subject."""
    return scan_folder(folder).subjects[0].images[-1]


def trained(kind: str, options: BenchmarkOptions) -> list[Path]:
    """The runs of the two subjects, trained unless they are finished."""
    runs: list[RunDirectory] = []
    for index, flags in enumerate(options.kinds()[kind]):
        run = RunDirectory(Path(options.output_dir) / f"{kind.lower().replace(', ', '-')}-{index + 1}")
        if run.status().state != "done":
            given = ["--instance_data_dir", options.subjects[index], "--instance_prompt", options.prompts[index]]
            given += ["--heldout_image", held_out(options.subjects[index]).name, "--output_dir", str(run.path)]
            given += ["--pretrained_model_name_or_path", options.pretrained_model_name_or_path]
            train_subject(parse_options([*given, *shlex.split(options.flags), *shlex.split(flags)]))
        runs.append(run)
    return [run.path for run in runs]


@dataclass(frozen=True)
class Output:
    """What a model makes of one subject: its loss, its predictions, and images in [0, 1]."""

    loss: float
    predictions: torch.Tensor
    images: torch.Tensor


class Meter:
    """Measures the outputs of a pipeline for one subject, always at the same noise.

    Args:
        image: held out of training.
    """

    def __init__(self, pipeline: StableDiffusionXLPipeline, image: Path, prompt: str, cache: Path) -> None:
        self.pipeline, self.prompt, self.loss = pipeline, prompt, DenoisingLoss(pipeline)
        side = model_resolution(pipeline)
        encoder = LatentEncoder(pipeline, TensorCache(cache))
        self.subject: CachedLatents = encoder.encode([TrainingImage(image, prompt)], CropConfig(((side, side),)))

    @torch.no_grad()
    def output(self) -> Output:
        """The outputs with the pipeline's current adapters."""
        images = generate(self.pipeline, [self.prompt] * len(SEEDS), SEEDS, Sampling())
        pixels = torch.stack([torch.from_numpy(np.asarray(image)).float() / 255 for image in images])
        return Output(mean_denoising_loss(self.loss, self.subject), self._predictions(), pixels)

    def _predictions(self) -> torch.Tensor:
        """(levels, channels, height, width): predictions for the noised latents of the held-out image."""
        latents = self.subject.mean(0).expand(NOISE_LEVELS, -1, -1, -1)
        noise = torch.randn(latents.shape, generator=keyed_generator(0))
        timesteps = ((torch.arange(NOISE_LEVELS) + 0.5) * self.loss.num_timesteps / NOISE_LEVELS).long()
        time_ids, prompts = self.subject.time_ids(0).expand(NOISE_LEVELS, 6), self.subject.prompts.repeat(0, NOISE_LEVELS)
        return self.loss.predict(latents, noise, timesteps, time_ids, prompts)


def rows(kind: str, runs: list[Path], options: BenchmarkOptions) -> Iterator[list[str]]:
    """For each subject, a row of the table."""
    pipeline = load_base_model(options.pretrained_model_name_or_path, torch.float32)
    names = ("first", "second")
    with ExitStack() as stack:
        meters = [
            Meter(pipeline, held_out(folder), prompt, Path(options.output_dir) / "encoded")
            for folder, prompt in zip(options.subjects, options.prompts, strict=True)
        ]
        base = [meter.output() for meter in meters]
        for run, name in zip(runs, names, strict=True):
            for sentence in load_adapter(pipeline, run, name):
                raise InputError(sentence)
        stack.callback(pipeline.unload_lora_weights)
        for index, meter in enumerate(meters):
            active = ([names[index]], [names[1 - index]], list(names))
            of_subject, of_other, of_both = [measured(pipeline, each, meter) for each in active]
            moved, alone = (output.predictions - base[index].predictions for output in (of_subject, of_other))
            added = of_both.predictions - of_subject.predictions
            cosine = torch.cosine_similarity(moved.flatten(), alone.flatten(), dim=0)
            images = (of_both.images - of_subject.images).abs().mean() / (of_subject.images - base[index].images).abs().mean()
            losses = [f"{output.loss:.4f}" for output in (base[index], of_subject, of_both)]
            left = (base[index].loss - of_both.loss) / (base[index].loss - of_subject.loss)
            ratios = [f"{ratio:.2f}" for ratio in (alone.norm() / moved.norm(), added.norm() / moved.norm(), cosine, images)]
            yield [kind, Path(options.subjects[index]).name, *losses, f"{left:.0%}", *ratios]


def measured(pipeline: StableDiffusionXLPipeline, adapters: list[str], meter: Meter) -> Output:
    """The outputs with `adapters` switched on."""
    pipeline.set_adapters(adapters)
    return meter.output()


def main(options: BenchmarkOptions) -> None:
    """Train what is missing, measure, and print the table."""
    lines = [HEADER, ["---"] * len(HEADER)]
    for kind in options.kinds():
        lines += rows(kind, trained(kind, options), options)
    sys.stdout.write("\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")


if __name__ == "__main__":
    main(HfArgumentParser(BenchmarkOptions, description=__doc__).parse_args_into_dataclasses()[0])
