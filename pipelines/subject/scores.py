"""Scores of generated images: subject fidelity, prompt fidelity, and similarity to a training image.

With a CLIP model, the metrics of DreamBooth [Ruiz et al. 2023, section 4.1]: CLIP-I, the mean over the training images, and
CLIP-T, for the full prompt with trigger word and class word. Without one, the base model is enough: its features for the
subject, and its denoising loss as a classifier for the prompt [Li et al. 2023, diffusion classifier]. Scores are comparable
within one run only; models and subjects have no common scale.
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

from pipelines.built_in import BASE_SCORER
from pipelines.randomness import RandomStream, keyed_generator
from pipelines.subject.adapters import without_adapters
from pipelines.subject.base_model import PromptEmbeddings, encode_images, encode_prompts
from pipelines.subject.embedders import Embedder, load_embedder
from pipelines.subject.evaluation import middle_of
from pipelines.subject.loss import DenoisingLoss

# Features are pooled to a grid, and its middle is compared.
GRID = 8
FEATURE_TIMESTEP = 20
CLASSIFIER_SAMPLES = 8
THUMBNAIL = 16
# The sides of a cropped copy as a share of the image's sides.
CROPPED = 0.9
# Given in place of a model's name, it selects scoring by the base model.


@dataclass(frozen=True)
class ImageScores:
    """Scores of one image.

    Args:
        subject: mean similarity to the training images, at most 1.
        prompt: how much better its prompt fits than the other prompts; above 0 if it fits better.
        copy: correlation with the most similar training image or its mirror image, at most 1.
        nearest: similarity to the most similar training image, at most 1.
    """

    subject: float
    prompt: float
    copy: float
    nearest: float


class ImageScorer(Protocol):
    """Scores images against the prompts that they were generated from.

    `nearest_limit` is the threshold of `nearest` at and above which an image is likely to be a copy.
    """

    nearest_limit: float

    def scores(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[ImageScores]:
        """The scores of each image."""

    def similarities(self, images: Sequence[Image.Image], references: Sequence[Image.Image]) -> torch.Tensor:
        """The similarity of each image to each of any references, (images, references), at most 1."""


def as_pixels(images: Sequence[Image.Image], size: tuple[int, int]) -> torch.Tensor:
    """Images, resized to `size` (width, height), as (images, 3, height, width) in [-1, 1]."""
    resized = [np.array(image.convert("RGB").resize(size, Image.Resampling.LANCZOS)) for image in images]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 127.5 - 1


def copy_scores(images: Sequence[Image.Image], references: Sequence[Image.Image]) -> list[float]:
    """For each image, the correlation of its thumbnail with that of the most similar reference or its mirror image."""
    generated, given = (_centred_thumbnails(part) for part in (images, references))
    either = torch.cat([given, given.flip(-1)])
    return (functional.normalize(generated.flatten(1)) @ functional.normalize(either.flatten(1)).T).amax(dim=1).tolist()


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
    """The threshold of similarity to a training image at and above which an image is likely to be a copy.

    It is the mean similarity of cropped copies to their originals, but at least that of the two most similar training images.
    Each scorer has a scale of its own, on which the threshold is measured. New renderings of the same toy stay well below it,
    for the built-in base model and the built-in CLIP. Of copies that were brightened, blurred, mirrored or slightly cropped,
    nine in ten reach it or a high `copy_scores`; copies that were shifted or cropped by more than a tenth do not. Passing this
    check does not rule out memorisation.

    Args:
        among: (references, references), similarity of the training images to each other.
        of_cropped: (references, references), similarity of their cropped copies, one per row, to the training images.
    """
    different = among[~torch.eye(len(among), dtype=torch.bool, device=among.device)]
    return max([of_cropped.diagonal().mean().item(), *different.tolist()])


class BaseModelScorer:
    """Scores images with the base model, with its adapters disabled."""

    def __init__(
        self,
        pipeline: StableDiffusionXLPipeline,
        references: Sequence[Image.Image],
        others: Sequence[Image.Image],
        resolution: int,
        batch_size: int = CLASSIFIER_SAMPLES,
    ) -> None:
        """Compute the features of the references.

        Args:
            references: images of the subject.
            others: images of other things, such as the base model's; the mean feature of all images is subtracted.
            resolution: side in pixels at which images are scored.
            batch_size: maximum number of images or noise levels at once.
        """
        self.pipeline, self.resolution, self.images = pipeline, resolution, list(references)
        self.batch_size = batch_size
        with without_adapters(pipeline):
            self.loss = DenoisingLoss(pipeline)
            latents = self._latents([*references, *others])
            reference_features, count = self._features(latents), len(references)
            self.mean = reference_features.mean(dim=(0, 2), keepdim=True)
            self.references = functional.normalize(reference_features[:count] - self.mean)
            copies = self._latents([cropped(image) for image in references])
            self.nearest_limit = nearest_limit(self._similarities(latents[:count]), self._similarities(copies))

    @torch.no_grad()
    def scores(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[ImageScores]:
        """The scores of each image; `prompts` holds the prompt of each."""
        with without_adapters(self.pipeline):
            latents = self._latents(images)
            similarities = self._similarities(latents)
            prompt = self._prompt_margins(latents, prompts)
        return _scores(similarities, prompt, copy_scores(images, self.images))

    @torch.no_grad()
    def similarities(self, images: Sequence[Image.Image], references: Sequence[Image.Image]) -> torch.Tensor:
        """The similarity of each image to each of any references, (images, references), at most 1."""
        with without_adapters(self.pipeline):
            generated, given = (self._centred(self._latents(part)) for part in (images, references))
        return _matched(generated, given)

    def _latents(self, images: Sequence[Image.Image]) -> torch.Tensor:
        pixels = as_pixels(images, (self.resolution, self.resolution))
        return encode_images(self.pipeline, pixels, self.batch_size)[:, 0]

    @torch.no_grad()
    def _features(self, latents: torch.Tensor) -> torch.Tensor:
        """Features of the UNet's first block for latents with little noise: (images, channels, positions)."""
        outputs: list[torch.Tensor] = []
        hook = self.pipeline.unet.down_blocks[0].register_forward_hook(lambda *call: outputs.append(call[-1][0].float()))
        empty_prompt = encode_prompts(self.pipeline, [""])
        noise = self._noise(1, latents)
        timesteps = torch.tensor([FEATURE_TIMESTEP], device=latents.device)
        try:
            for image in latents:
                self.loss.predict(image[None], noise, timesteps, self._time_ids(1, latents), empty_prompt)
        finally:
            hook.remove()
        return middle_of(functional.adaptive_avg_pool2d(torch.cat(outputs), GRID)).flatten(2)

    def _similarities(self, latents: torch.Tensor) -> torch.Tensor:
        """The similarity of each image to each of the scorer's references, (images, references)."""
        return _matched(self._centred(latents), self.references)

    def _centred(self, latents: torch.Tensor) -> torch.Tensor:
        """Features (images, channels, positions) without the mean feature, of length 1 at each position."""
        return functional.normalize(self._features(latents) - self.mean)

    def _prompt_margins(self, latents: torch.Tensor, prompts: Sequence[str]) -> list[float]:
        """For each image, the mean loss with the other prompts minus that with its own, relative to the mean of all.

        The noise is the same for all prompts.
        """
        distinct = list(dict.fromkeys(prompts))
        distinct += [""] if len(distinct) == 1 else []
        embeddings = encode_prompts(self.pipeline, distinct)
        noise = self._noise(CLASSIFIER_SAMPLES, latents)
        count, last = CLASSIFIER_SAMPLES, self.loss.num_timesteps - 1
        timesteps = torch.linspace(0.1 * last, 0.9 * last, count).long().to(latents.device)
        margins = []
        for image, prompt in zip(latents, prompts, strict=True):
            losses = torch.stack([self._losses(image, noise, timesteps, embeddings, index) for index in range(len(distinct))])
            # Relative to the mean at each noise level, or the highest level would outweigh all others.
            relative = (losses / losses.mean(dim=0)).mean(dim=1)
            loss = relative[distinct.index(prompt)]
            margins.append(((relative.sum() - loss) / (len(distinct) - 1) - loss).item())
        return margins

    def _losses(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, prompts: PromptEmbeddings, index: int
    ) -> torch.Tensor:
        """The losses (samples,) of `latents` (channels, height, width) with each of `noise` (samples, ...) and one prompt."""
        losses = []
        for part, levels in zip(noise.split(self.batch_size), timesteps.split(self.batch_size), strict=True):
            time_ids, prompt = self._time_ids(len(part), latents), prompts.repeat(index, len(part))
            losses.append(self.loss.per_image(latents.expand(part.shape), part, levels, time_ids, prompt))
        return torch.cat(losses)

    def _noise(self, count: int, latents: torch.Tensor) -> torch.Tensor:
        return torch.randn((count, *latents.shape[1:]), generator=keyed_generator(0, RandomStream.SCORES)).to(latents.device)

    def _time_ids(self, count: int, latents: torch.Tensor) -> torch.Tensor:
        side = float(self.resolution)
        return torch.tensor([[side, side, 0, 0, side, side]], device=latents.device).expand(count, 6)


class EmbeddingScorer:
    """Scores images by cosines of features; the prompt by the base model if the embedder reads no text."""

    def __init__(self, embedder: Embedder, references: Sequence[Image.Image], base: ImageScorer | None = None) -> None:
        """Compute the features of the references.

        Args:
            references: images of the subject.
            base: scores the prompt if `embedder` reads no text; otherwise unused.
        """
        self.embedder, self.base, self.images = embedder, base, list(references)
        self.references = embedder.images(references)
        copies = embedder.images([cropped(image) for image in references])
        self.nearest_limit = nearest_limit(self.references @ self.references.T, copies @ self.references.T)

    def similarities(self, images: Sequence[Image.Image], references: Sequence[Image.Image]) -> torch.Tensor:
        """The similarity of each image to each of any references, (images, references), at most 1."""
        return self.embedder.images(images) @ self.embedder.images(references).T

    def scores(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[ImageScores]:
        """The scores of each image; `prompts` holds the prompt of each."""
        embedded = self.embedder.images(images)
        if self.embedder.reads_text:
            prompt = (embedded * self.embedder.texts(prompts)).sum(dim=1).tolist()
        else:
            prompt = [each.prompt for each in self.base.scores(images, prompts)]
        return _scores(embedded @ self.references.T, prompt, copy_scores(images, self.images))


def _matched(features: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Mean similarity of positions to their best matches in each reference, both ways: (images, references), at most 1.

    Args:
        features, references: (images, channels, positions), of length 1 at each position.
    """
    similarities = torch.einsum("acx,bcy->abxy", features, references)
    return (similarities.amax(dim=3).mean(dim=2) + similarities.amax(dim=2).mean(dim=2)) / 2


def _scores(similarities: torch.Tensor, prompt: Sequence[float], copies: Sequence[float]) -> list[ImageScores]:
    """The scores of each image from `similarities` (images, references), prompt scores and copy scores."""
    columns = (similarities.mean(dim=1).tolist(), prompt, copies, similarities.amax(dim=1).tolist())
    return [ImageScores(*each) for each in zip(*columns, strict=True)]


def create_image_scorer(
    name: str,
    pipeline: StableDiffusionXLPipeline,
    references: Sequence[Image.Image],
    others: Sequence[Image.Image],
    resolution: int,
    batch_size: int = CLASSIFIER_SAMPLES,
) -> ImageScorer:
    """The image scorer of a run: the base model if `name` is `BASE_SCORER`, else the model of that name (see `load_embedder`).

    The other arguments are those of `BaseModelScorer`.
    Raises: InputError if the model cannot be loaded.
    """
    embedder = None if name == BASE_SCORER else load_embedder(name)
    if embedder is not None and embedder.reads_text:
        return EmbeddingScorer(embedder, references)
    base = BaseModelScorer(pipeline, references, others, resolution, batch_size)
    return base if embedder is None else EmbeddingScorer(embedder, references, base)
