"""Scores of generated images: likeness to the subject, following of the prompt, copying of a training image.

Cosines of CLIP features, as DreamBooth is evaluated [Ruiz et al. 2023, section 4.1]: CLIP-I, the mean over the training
images, and CLIP-T, with the prompt just as the image was drawn from, rare word and class word included. Without a CLIP
nothing is needed but the base model: its features for the subject, its own denoising loss as a classifier for the prompt
[Li et al. 2023, diffusion classifier]. Compare scores within one run; between models and subjects they have no common scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from torch.nn import functional

from pipelines.randomness import RandomStream, keyed_generator
from pipelines.subject.adapters import without_adapters
from pipelines.subject.base_model import PromptEmbeddings, encode_images, encode_prompts
from pipelines.subject.embedders import Embedder, load_embedder
from pipelines.subject.evaluation import middle_of
from pipelines.subject.loss import DenoisingLoss

# Features are compared on a grid, in its middle.
GRID = 8
FEATURE_TIMESTEP = 20
CLASSIFIER_SAMPLES = 8
THUMBNAIL = 16
# The share of an image's sides that its cropped copy has.
CROPPED = 0.9
# In place of a model's name: the base model judges.
BASE = "base"


@dataclass(frozen=True)
class ImageScores:
    """Of one image.

    Args:
        subject: likeness to the training images, at most 1.
        prompt: how much better its prompt explains it than the other prompts do; above 0 where it does.
        copy: correlation with the most similar training image or its mirror image, at most 1.
        nearest: likeness to the most similar training image, at most 1.
    """

    subject: float
    prompt: float
    copy: float
    nearest: float


class ImageScorer(Protocol):
    """Scores images against the prompts that they were drawn from.

    `nearest_limit` is what `nearest` of an image that is no copy stays below.
    """

    nearest_limit: float

    def scores(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[ImageScores]:
        """The scores of each image."""


def as_pixels(images: Sequence[Image.Image], size: tuple[int, int]) -> torch.Tensor:
    """Images, resized to `size` (width, height), as (images, 3, height, width) in [-1, 1]."""
    resized = [np.array(image.convert("RGB").resize(size, Image.Resampling.LANCZOS)) for image in images]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 127.5 - 1


def copy_scores(images: Sequence[Image.Image], references: Sequence[Image.Image]) -> list[float]:
    """For each image, the correlation of its thumbnail with that of the most similar reference or its mirror image."""
    generated, given = (_centred_thumbnails(part) for part in (images, references))
    either = torch.cat([given, given.flip(-1)])
    return (_unit(generated.flatten(1)) @ _unit(either.flatten(1)).T).amax(dim=1).tolist()


def _centred_thumbnails(images: Sequence[Image.Image]) -> torch.Tensor:
    """(images, 3, THUMBNAIL, THUMBNAIL), without each one's mean colour."""
    pixels = torch.cat([functional.adaptive_avg_pool2d(as_pixels([image], image.size), THUMBNAIL) for image in images])
    return pixels - pixels.mean(dim=(2, 3), keepdim=True)


def cropped(image: Image.Image) -> Image.Image:
    """The middle of an image, `CROPPED` of either side, at the image's size: a copy that its thumbnail hardly shows."""
    left, top = (round(side * (1 - CROPPED) / 2) for side in image.size)
    middle = image.crop((left, top, image.width - left, image.height - top))
    return middle.resize(image.size, Image.Resampling.LANCZOS)


def nearest_limit(among: torch.Tensor, of_cropped: torch.Tensor) -> float:
    """What the likeness of an image to a training image stays below, unless it is a copy.

    It lies where cropped copies lie to their originals, in the mean, but never below the most similar two training images.
    Every judge has a scale of its own: this one is measured on it. Scenes of one toy drawn anew stay below it by far, with the
    built-in model's features as with the built-in CLIP's; of copies that were brightened, blurred, mirrored or a little
    cropped, it or `copy_scores` finds nine in ten. Those moved or cropped by more than a tenth are found by neither: this is an
    alarm, and its silence no proof.

    Args:
        among: (references, references), likeness of the training images to each other.
        of_cropped: (references, references), that of their cropped copies, one a row.
    """
    different = among[~torch.eye(len(among), dtype=torch.bool, device=among.device)]
    return max([of_cropped.diagonal().mean().item(), *different.tolist()])


def _unit(values: torch.Tensor) -> torch.Tensor:
    return functional.normalize(values, dim=1)


class BaseModelScorer:
    """Judges by the base model alone, whatever adapters are on it."""

    def __init__(
        self,
        pipeline: StableDiffusionXLPipeline,
        references: Sequence[Image.Image],
        others: Sequence[Image.Image],
        resolution: int,
        batch_size: int = CLASSIFIER_SAMPLES,
    ) -> None:
        """Remember what the subject looks like.

        Args:
            references: images of the subject.
            others: images of anything else, such as the base model's, so that what all images share counts for nothing.
            resolution: side in pixels at which images are judged.
            batch_size: images and noise levels at once, at the most.
        """
        self.pipeline, self.resolution, self.images = pipeline, resolution, list(references)
        self.batch_size = batch_size
        with without_adapters(pipeline):
            self.loss = DenoisingLoss(pipeline)
            latents = self._latents([*references, *others])
            reference_features, count = self._features(latents), len(references)
            self.mean = reference_features.mean(dim=(0, 2), keepdim=True)
            self.references = _unit(reference_features[:count] - self.mean)
            copies = self._latents([cropped(image) for image in references])
            self.nearest_limit = nearest_limit(self._likeness(latents[:count]), self._likeness(copies))

    @torch.no_grad()
    def scores(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[ImageScores]:
        """The scores of each image, drawn from the prompt at its place."""
        with without_adapters(self.pipeline):
            latents = self._latents(images)
            likeness = self._likeness(latents)
            prompt = self._following(latents, prompts)
        return _scores(likeness, prompt, copy_scores(images, self.images))

    def _latents(self, images: Sequence[Image.Image]) -> torch.Tensor:
        pixels = as_pixels(images, (self.resolution, self.resolution))
        return encode_images(self.pipeline, pixels, self.batch_size)[:, 0]

    @torch.no_grad()
    def _features(self, latents: torch.Tensor) -> torch.Tensor:
        """What the UNet's first block makes of latents with little noise: (images, channels, places)."""
        seen: list[torch.Tensor] = []
        hook = self.pipeline.unet.down_blocks[0].register_forward_hook(lambda *call: seen.append(call[-1][0].float()))
        nothing = encode_prompts(self.pipeline, [""])
        noise = self._noise(1, latents)
        timesteps = torch.tensor([FEATURE_TIMESTEP], device=latents.device)
        try:
            for image in latents:
                self.loss.predict(image[None], noise, timesteps, self._time_ids(1, latents), nothing)
        finally:
            hook.remove()
        return middle_of(functional.adaptive_avg_pool2d(torch.cat(seen), GRID)).flatten(2)

    def _likeness(self, latents: torch.Tensor) -> torch.Tensor:
        """How well places match their best counterparts in each reference, both ways: (images, references), at most 1."""
        generated = _unit(self._features(latents) - self.mean)
        similarities = torch.einsum("acx,bcy->abxy", generated, self.references)
        return (similarities.amax(dim=3).mean(dim=2) + similarities.amax(dim=2).mean(dim=2)) / 2

    def _following(self, latents: torch.Tensor, prompts: Sequence[str]) -> list[float]:
        """By how much of the mean loss the own prompt's loss lies below the others', with the same noise for all."""
        distinct = list(dict.fromkeys(prompts))
        distinct += [""] if len(distinct) == 1 else []
        embeddings = encode_prompts(self.pipeline, distinct)
        noise = self._noise(CLASSIFIER_SAMPLES, latents)
        count, last = CLASSIFIER_SAMPLES, self.loss.num_timesteps - 1
        timesteps = torch.linspace(0.1 * last, 0.9 * last, count).long().to(latents.device)
        margins = []
        for image, prompt in zip(latents, prompts, strict=True):
            losses = []
            for index in range(len(distinct)):
                prompt_embeddings = PromptEmbeddings(embeddings.hidden[index], embeddings.pooled[index])
                losses.append(self._losses(image, noise, timesteps, prompt_embeddings))
            # Relative to the mean at each noise level, or the highest level would outweigh all others.
            relative = (torch.stack(losses) / torch.stack(losses).mean(dim=0)).mean(dim=1)
            direction = relative[distinct.index(prompt)]
            margins.append(((relative.sum() - direction) / (len(distinct) - 1) - direction).item())
        return margins

    def _losses(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, prompt: PromptEmbeddings
    ) -> torch.Tensor:
        """The losses (draws,) of `latents` (channels, height, width) with each of `noise` (draws, ...), `batch_size` at once."""
        losses = []
        for part, levels in zip(noise.split(self.batch_size), timesteps.split(self.batch_size), strict=True):
            count = len(part)
            same = PromptEmbeddings(*(values.expand(count, *values.shape) for values in (prompt.hidden, prompt.pooled)))
            losses.append(self.loss.per_image(latents.expand(part.shape), part, levels, self._time_ids(count, latents), same))
        return torch.cat(losses)

    def _noise(self, count: int, latents: torch.Tensor) -> torch.Tensor:
        return torch.randn((count, *latents.shape[1:]), generator=keyed_generator(0, RandomStream.SCORES)).to(latents.device)

    def _time_ids(self, count: int, latents: torch.Tensor) -> torch.Tensor:
        side = float(self.resolution)
        return torch.tensor([[side, side, 0, 0, side, side]], device=latents.device).expand(count, 6)


class EmbeddingScorer:
    """Judges by the cosines of features; the prompt, where the model reads no text, by the base model."""

    def __init__(self, embedder: Embedder, references: Sequence[Image.Image], base: ImageScorer | None = None) -> None:
        """Remember what the subject looks like.

        Args:
            references: images of the subject.
            base: judges the prompt where `embedder` reads no text, and only then.
        """
        self.embedder, self.base, self.images = embedder, base, list(references)
        self.references = embedder.images(references)
        copies = embedder.images([cropped(image) for image in references])
        self.nearest_limit = nearest_limit(self.references @ self.references.T, copies @ self.references.T)

    def scores(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[ImageScores]:
        """The scores of each image, drawn from the prompt at its place."""
        embedded = self.embedder.images(images)
        if self.embedder.reads_text:
            prompt = (embedded * self.embedder.texts(prompts)).sum(dim=1).tolist()
        else:
            prompt = [each.prompt for each in self.base.scores(images, prompts)]
        return _scores(embedded @ self.references.T, prompt, copy_scores(images, self.images))


def _scores(likeness: torch.Tensor, prompt: Sequence[float], copies: Sequence[float]) -> list[ImageScores]:
    """The scores of each image from its `likeness` (images, references) to each training image and the other two."""
    columns = (likeness.mean(dim=1).tolist(), prompt, copies, likeness.amax(dim=1).tolist())
    return [ImageScores(*each) for each in zip(*columns, strict=True)]


def create_image_scorer(
    name: str,
    pipeline: StableDiffusionXLPipeline,
    references: Sequence[Image.Image],
    others: Sequence[Image.Image],
    resolution: int,
    batch_size: int = CLASSIFIER_SAMPLES,
) -> ImageScorer:
    """The judge for a run: the base model where `name` is `BASE`, else the model of that name (see `load_embedder`).

    The other arguments are those of `BaseModelScorer`.
    Raises: InputError if the model cannot be loaded.
    """
    embedder = None if name == BASE else load_embedder(name)
    if embedder is not None and embedder.reads_text:
        return EmbeddingScorer(embedder, references)
    base = BaseModelScorer(pipeline, references, others, resolution, batch_size)
    return base if embedder is None else EmbeddingScorer(embedder, references, base)
