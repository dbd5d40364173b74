"""The sample images of a run: drawn from the same noise each time, kept one by one and as a labelled sheet."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from pipelines.images import labelled_grid, save_image
from pipelines.subject.generate import Sampling, generate
from training.runs.run import RunDirectory


@dataclass(frozen=True)
class ValidationSampler:
    """Draws an image for each of a run's validation prompts, the same noise each time.

    Args:
        pipeline: draws as it is, whatever adapter it has.
        prompts: what is drawn.
        seed: of the first image; each further one adds 1.
        model: what the images' files call the base model.
        batch_size: images at once, at the most.
    """

    pipeline: StableDiffusionXLPipeline
    prompts: Sequence[str]
    seed: int
    sampling: Sampling
    model: str
    batch_size: int = 8

    @property
    def seeds(self) -> range:
        """One for each prompt."""
        return range(self.seed, self.seed + len(self.prompts))

    def draw(self) -> list[Image.Image]:
        """One image for each prompt."""
        for component in (self.pipeline.unet, self.pipeline.text_encoder, self.pipeline.text_encoder_2):
            component.eval()
        with torch.no_grad():
            return list(generate(self.pipeline, self.prompts, self.seeds, self.sampling, self.batch_size))

    def save(self, run: RunDirectory, step: int, images: Sequence[Image.Image]) -> None:
        """Keep what was drawn after `step` steps: samples/step-<step>/<place>.png with their settings, and all on one sheet."""
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
    """Keep the training images `images`, to compare samples with, as samples/subject/<place>.png."""
    run.subject.mkdir(exist_ok=True)
    for index, image in enumerate(images):
        image.save(run.subject / f"{index}.png")
