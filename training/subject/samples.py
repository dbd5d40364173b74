"""The sample images of a run: generated from the same noise at each step, saved one by one and as a labelled sheet."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

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
        """An image for each prompt."""
        for component in (self.pipeline.unet, self.pipeline.text_encoder, self.pipeline.text_encoder_2):
            component.eval()
        with torch.no_grad():
            return list(generate(self.pipeline, self.prompts, self.seeds, self.sampling, self.batch_size))

    def save(self, run: RunDirectory, step: int, images: Sequence[Image.Image]) -> None:
        """Save the images of `step`: samples/step-<step>/<index>.png with their settings, and a sheet of all."""
        if not run.writes:
            return
        folder = run.samples_at(step)
        aside = folder.with_name(f".writing-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        common = {**asdict(self.sampling), "sampler": self._name(), "model": self.model, "step": step}
        for index, (image, prompt, seed) in enumerate(zip(images, self.prompts, self.seeds, strict=True)):
            save_image(image, aside / f"{index}.png", {"prompt": prompt, "seed": seed, **common})
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
        title = f"step {step}" if step else "base model"
        run.save_image(step, labelled_grid([(title, images)], self.prompts))

    def _name(self) -> str:
        return type(self.pipeline.scheduler).__name__.removesuffix("Scheduler")


def save_subject(run: RunDirectory, images: Sequence[Image.Image]) -> None:
    """Save training images as samples/subject/<index>.png, for comparison with samples."""
    run.subject.mkdir(exist_ok=True)
    for index, image in enumerate(images):
        save_png(image, run.subject / f"{index}.png")
