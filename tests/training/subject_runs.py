"""Short runs of the subject trainer on the tiny random model: whole ones, their training alone, or only what is to be trained."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from pipelines.subject.generate import Sampling
from training import dreambooth_nora
from training.engine.loop import LoopOptions, Trainable
from training.options import SubjectOptions, parse_options
from training.runs.record import list_checkpoints
from training.runs.run import RunDirectory
from training.subject import samples

FLAGS = "--rank 6 --inner_r 2 --target_modules to_v --max_train_steps 4 --train_batch_size 2 --lr_warmup_steps 1"
FLAGS += " --checkpointing_steps 2 --validation_steps 2 --heldout_steps 2 --heldout_image none --no_certify --report_to none"
PROMPT = "sks toy"
PRIOR = ("--with_prior_preservation", "--class_prompt", "a toy", "--num_class_images", "3")
# All that a run's repetition and its resumption have to get right.
EVERYTHING = (
    *("--seed", "5", "--learning_rate", "0.1", "--heldout_steps", "1", "--num_candidate_images", "4"),
    *("--validation_prompt", "toy in snow", "toy at night", "--gradient_accumulation_steps", "2", "--use_ema"),
    *("--ema_decay", "0.5", "--train_text_encoder", "--inner_init", "gaussian", "--preserve_output", "--dropout", "0.1"),
    *("--random_flip", "--no_center_crop", "--aspect_ratio_buckets", "auto", *PRIOR),
)
# Of a run, what its resumption goes on from.
KEPT = ("options.json", "status.json", "metrics.jsonl", "checkpoints", "class_pictures")


def parameters(run: RunDirectory, checkpoint: int = -1) -> dict[str, torch.Tensor]:
    """What was trained, as one of the run's checkpoints has it; the last one unless said."""
    return load_file(list_checkpoints(run.checkpoints)[checkpoint] / "trained.safetensors")


def are_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether tensors are the same by every name, bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


class Enough(Exception):
    """What was wanted is there."""


@dataclass
class Prepared:
    """What the recipe hands to the loop."""

    run: RunDirectory
    trainable: Trainable
    loop: LoopOptions

    def batches(self, count: int = 8) -> list[dict[str, torch.Tensor]]:
        """The first `count` batches."""
        return [self.trainable.batch_at(index) for index in range(count)]

    def rates(self, steps: int) -> list[float]:
        """The learning rate of each of the first `steps` steps."""
        rates = []
        for _ in range(steps):
            rates += self.trainable.lr_scheduler.get_last_lr()[:1]
            self.trainable.optimizer.step()
            self.trainable.lr_scheduler.step()
        return rates

    def trained(self) -> dict[str, torch.Tensor]:
        """The parameters that are trained, as they are now, by name."""
        return {name: each.detach().clone() for name, each in self.trainable.module.named_parameters() if each.requires_grad}


@dataclass(frozen=True)
class SubjectTrainer:
    """Runs the subject recipe on one model and one folder of images, with the flags given besides `FLAGS`."""

    model: Path
    images: Path

    def options(
        self, folder: Path | None, *flags: str, images: Path | None = None, prompt: str | None = PROMPT
    ) -> SubjectOptions:
        """The options of a run in `folder`, or in one that the recipe finds itself."""
        places = ["--pretrained_model_name_or_path", str(self.model), "--instance_data_dir", str(images or self.images)]
        places += [] if folder is None else ["--output_dir", str(folder)]
        places += [] if prompt is None else ["--instance_prompt", prompt]
        return parse_options([*FLAGS.split(), *places, "--validation_prompt", PROMPT, *flags])

    def run(self, folder: Path | None, *flags: str, **more: object) -> RunDirectory:
        """A whole run."""
        return self.main(self.options(folder, *flags, **more))

    def main(self, options: SubjectOptions) -> RunDirectory:
        """The recipe, as if it were this process's first run."""
        # accelerate keeps the precision of a process's first run.
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.MonkeyPatch.context() as patch:
            # Random models draw no better in 25 steps.
            patch.setattr(dreambooth_nora, "Sampling", partial(Sampling, num_inference_steps=2))
            return dreambooth_nora.main(options)

    def train(self, folder: Path, *flags: str, **more: object) -> RunDirectory:
        """The training alone, without samples, scores, and all that comes after it."""
        with _training_alone():
            return self.run(folder, *flags, **more)

    def prepare(self, folder: Path | None, *flags: str, **more: object) -> Prepared:
        """What the recipe would train, and how."""
        found = []

        def hand_over(accelerator: object, run: RunDirectory, trainable: Trainable, loop: LoopOptions, *rest: object) -> None:
            found.append(Prepared(run, trainable, loop))
            raise Enough

        with _training_alone() as patch, suppress(Enough):
            patch.setattr(dreambooth_nora, "run_dry_run", lambda *_: None)
            patch.setattr(dreambooth_nora, "train", hand_over)
            self.run(folder, *flags, **more)
        return found[0]

    def resume(self, run: RunDirectory, folder: Path, *flags: str) -> RunDirectory:
        """Go on, in `folder`, from the last but one checkpoint of `run`, whose flags are given."""
        interrupted(run, folder)
        return self.train(folder, *flags, "--resume_from_checkpoint", "latest")


def interrupted(run: RunDirectory, folder: Path) -> None:
    """Leave in `folder` what `run` would have left had it been killed before its last checkpoint."""
    folder.mkdir()
    for name in KEPT:
        if (run.path / name).is_dir():
            shutil.copytree(run.path / name, folder / name)
        elif (run.path / name).exists():
            shutil.copy(run.path / name, folder / name)
    shutil.rmtree(list_checkpoints(folder / "checkpoints")[-1])


@contextmanager
def _training_alone() -> Iterator[pytest.MonkeyPatch]:
    blank = Image.new("RGB", (16, 16))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "generate", lambda pipeline, prompts, *_: [blank] * len(prompts))
        patch.setattr(dreambooth_nora, "create_image_scorer", lambda *_: None)
        patch.setattr(dreambooth_nora, "finish", lambda *_: None)
        yield patch
