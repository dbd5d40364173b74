"""The sample images of a run: generated from the same noise at each step, saved one by one and as a labelled sheet."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from pipelines.cache import module_digest
from pipelines.images import labelled_grid, save_image, save_png
from pipelines.subject.generate import Sampling, generate
from training.runs.run import RunDirectory


@dataclass(frozen=True)
class ValidationSampler:
    """Generates an image for each validation prompt, from the same noise each time.

    Args:
        pipeline: with its active adapters.
        prompts: the validation prompts.
        seed: of the first image; each further image adds 1.
        model: the name of the base model in the settings of the image files.
        batch_size: the largest number of images at once.
    """

    pipeline: StableDiffusionXLPipeline
    prompts: Sequence[str]
    seed: int
    sampling: Sampling
    model: str
    batch_size: int = 8

    @property
    def seeds(self) -> range:
        """A seed for each prompt."""
        return range(self.seed, self.seed + len(self.prompts))

    def generate(self) -> list[Image.Image]:
        """An image for each validation prompt."""
        return self.images(self.prompts, self.seeds)

    def images(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """An image for each of `prompts`, from the noise of its seed."""
        for component in (self.pipeline.unet, self.pipeline.text_encoder, self.pipeline.text_encoder_2):
            component.eval()
        with torch.no_grad():
            return list(generate(self.pipeline, prompts, seeds, self.sampling, self.batch_size))

    def save(self, run: RunDirectory, step: int, images: Sequence[Image.Image]) -> None:
        """Save the images of `step`: samples/step-<step>/<index>.png with their settings, and a sheet of all."""
        if not run.writes:
            return
        folder = run.samples_at(step)
        aside = folder.with_name(f".writing-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        for index, (image, prompt, seed) in enumerate(zip(images, self.prompts, self.seeds, strict=True)):
            save_image(image, aside / f"{index}.png", {**self.settings(prompt, seed), "step": step})
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
        title = f"step {step}" if step else "base model"
        run.save_image(step, labelled_grid([(title, images)], self.prompts))

    def settings(self, prompt: str, seed: int) -> dict[str, Any]:
        """The settings of one image, for its file."""
        sampler = type(self.pipeline.scheduler).__name__.removesuffix("Scheduler")
        return {"prompt": prompt, "seed": seed, **asdict(self.sampling), "sampler": sampler, "model": self.model}

    def identity(self) -> dict[str, Any]:
        """What images depend on besides the UNet, the text encoders, prompts and seeds, as plain values."""
        scheduler = {name: value for name, value in self.pipeline.scheduler.config.items() if not name.startswith("_")}
        return {
            "scheduler": [type(self.pipeline.scheduler).__name__, json.dumps(scheduler, default=str, sort_keys=True)],
            "vae": module_digest(self.pipeline.vae),
            "where": [self.pipeline.device.type, str(self.pipeline.dtype)],
            "sampling": [asdict(self.sampling), self.batch_size],
        }


def save_subject(run: RunDirectory, images: Sequence[Image.Image]) -> None:
    """Save training images as samples/subject/<index>.png, for comparison with samples."""
    run.subject.mkdir(exist_ok=True)
    for index, image in enumerate(images):
        save_png(image, run.subject / f"{index}.png")
