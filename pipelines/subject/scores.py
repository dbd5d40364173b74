"""Scores of generated pictures: likeness to the subject, following of the prompt, copying of a training picture.

Nothing is needed but the base model: its features for the subject, its own denoising loss as a classifier for the prompt
[Li et al. 2023, diffusion classifier]. A CLIP or DINOv2 model of the user's can take their place. Compare scores within one
run; between models and subjects they have no common scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from torch import nn
from torch.nn import functional
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from pipelines.errors import InputError
from pipelines.randomness import Draw, keyed_generator
from pipelines.subject.adapters import without_adapters
from pipelines.subject.base_model import PromptEmbeddings, encode_pictures, encode_prompts
from pipelines.subject.evaluation import middle_of
from pipelines.subject.loss import DenoisingLoss

# Features are compared on a grid, in its middle.
GRID = 8
FEATURE_TIMESTEP = 20
CLASSIFIER_DRAWS = 8
THUMBNAIL = 16
# Of `copy`: redrawn scenes of one and the same subject stay below, mildly changed copies lie about it.
COPY_THRESHOLD = 0.9


@dataclass(frozen=True)
class Scores:
    """Of one picture.

    Args:
        subject: likeness to the training pictures, at most 1.
        prompt: how much better its prompt explains it than the other prompts do; above 0 where it does.
        copy: correlation with the most similar training picture or its mirror image, at most 1.
    """

    subject: float
    prompt: float
    copy: float


class Judge(Protocol):
    """Scores pictures against the prompts that they were drawn from."""

    def scores(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[Scores]:
        """The scores of each picture."""


def as_pixels(pictures: Sequence[Image.Image], size: tuple[int, int]) -> torch.Tensor:
    """Pictures, resized to `size` (width, height), as (pictures, 3, height, width) in [-1, 1]."""
    resized = [np.array(picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)) for picture in pictures]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 127.5 - 1


def copy_scores(pictures: Sequence[Image.Image], references: Sequence[Image.Image]) -> list[float]:
    """For each picture, the correlation of its thumbnail with that of the most similar reference or its mirror image."""
    drawn, given = (_centred_thumbnails(part) for part in (pictures, references))
    either = torch.cat([given, given.flip(-1)])
    return (_unit(drawn.flatten(1)) @ _unit(either.flatten(1)).T).amax(dim=1).tolist()


def _centred_thumbnails(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """(pictures, 3, THUMBNAIL, THUMBNAIL), without each one's mean colour."""
    pixels = torch.cat([functional.adaptive_avg_pool2d(as_pixels([picture], picture.size), THUMBNAIL) for picture in pictures])
    return pixels - pixels.mean(dim=(2, 3), keepdim=True)


def _unit(values: torch.Tensor) -> torch.Tensor:
    return functional.normalize(values, dim=1)


class BaseModelJudge:
    """Judges by the base model alone, whatever adapters are on it."""

    def __init__(
        self,
        pipeline: StableDiffusionXLPipeline,
        references: Sequence[Image.Image],
        others: Sequence[Image.Image],
        resolution: int,
    ) -> None:
        """Remember what the subject looks like.

        Args:
            references: pictures of the subject.
            others: pictures of anything else, such as the base model's, so that what all pictures share counts for nothing.
            resolution: side in pixels at which pictures are judged.
        """
        self.pipeline, self.resolution, self.pictures = pipeline, resolution, list(references)
        with without_adapters(pipeline):
            self.loss = DenoisingLoss(pipeline)
            known = self._features(self._latents([*references, *others]))
        self.mean = known.mean(dim=(0, 2), keepdim=True)
        self.references = _unit(known[: len(references)] - self.mean)

    @torch.no_grad()
    def scores(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[Scores]:
        """The scores of each picture, drawn from the prompt at its place."""
        with without_adapters(self.pipeline):
            latents = self._latents(pictures)
            subject = self._likeness(latents)
            prompt = self._following(latents, prompts)
        copies = copy_scores(pictures, self.pictures)
        return [Scores(*each) for each in zip(subject, prompt, copies, strict=True)]

    def _latents(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        return encode_pictures(self.pipeline, as_pixels(pictures, (self.resolution, self.resolution)))[:, 0]

    @torch.no_grad()
    def _features(self, latents: torch.Tensor) -> torch.Tensor:
        """What the UNet's first block makes of latents with little noise: (pictures, channels, places)."""
        seen: list[torch.Tensor] = []
        hook = self.pipeline.unet.down_blocks[0].register_forward_hook(lambda *call: seen.append(call[-1][0].float()))
        nothing = encode_prompts(self.pipeline, [""])
        noise = self._noise(1, latents)
        timesteps = torch.tensor([FEATURE_TIMESTEP], device=latents.device)
        try:
            for picture in latents:
                self.loss.predict(picture[None], noise, timesteps, self._time_ids(1, latents), nothing)
        finally:
            hook.remove()
        return middle_of(functional.adaptive_avg_pool2d(torch.cat(seen), GRID)).flatten(2)

    def _likeness(self, latents: torch.Tensor) -> list[float]:
        """The mean over the references of how well places match their best counterparts, both ways."""
        drawn = _unit(self._features(latents) - self.mean)
        alike = torch.einsum("acx,bcy->abxy", drawn, self.references)
        return ((alike.amax(dim=3).mean(dim=2) + alike.amax(dim=2).mean(dim=2)) / 2).mean(dim=1).tolist()

    def _following(self, latents: torch.Tensor, prompts: Sequence[str]) -> list[float]:
        """By how much of the mean loss the own prompt's loss lies below the others', with the same noise for all."""
        distinct = list(dict.fromkeys(prompts))
        distinct += [""] if len(distinct) == 1 else []
        embeddings = encode_prompts(self.pipeline, distinct)
        noise = self._noise(CLASSIFIER_DRAWS, latents)
        count, last = CLASSIFIER_DRAWS, self.loss.num_timesteps - 1
        timesteps = torch.linspace(0.1 * last, 0.9 * last, count).long().to(latents.device)
        margins = []
        for picture, prompt in zip(latents, prompts, strict=True):
            losses = []
            for place in range(len(distinct)):
                alike = PromptEmbeddings(*(v[place].expand(count, *v.shape[1:]) for v in (embeddings.hidden, embeddings.pooled)))
                same = picture.expand(count, *picture.shape)
                losses.append(self.loss.per_picture(same, noise, timesteps, self._time_ids(count, latents), alike))
            # Relative to the mean at each noise level, or the highest level would outweigh all others.
            relative = (torch.stack(losses) / torch.stack(losses).mean(dim=0)).mean(dim=1)
            own = relative[distinct.index(prompt)]
            margins.append(((relative.sum() - own) / (len(distinct) - 1) - own).item())
        return margins

    def _noise(self, count: int, latents: torch.Tensor) -> torch.Tensor:
        return torch.randn((count, *latents.shape[1:]), generator=keyed_generator(0, Draw.SCORES)).to(latents.device)

    def _time_ids(self, count: int, latents: torch.Tensor) -> torch.Tensor:
        side = float(self.resolution)
        return torch.tensor([[side, side, 0, 0, side, side]], device=latents.device).expand(count, 6)


class EmbeddingJudge:
    """Judges by a CLIP or DINOv2 model of transformers; the prompt, with DINOv2, by the base model."""

    def __init__(self, name_or_path: str, references: Sequence[Image.Image], base: BaseModelJudge) -> None:
        """Load the model, safetensors only.

        Raises: InputError if it cannot be loaded, or embeds no pictures.
        """
        try:
            self.model = AutoModel.from_pretrained(name_or_path, use_safetensors=True).eval()
            self.processor = AutoImageProcessor.from_pretrained(name_or_path)
            self.reads_text = hasattr(self.model, "get_text_features")
            self.tokenizer = AutoTokenizer.from_pretrained(name_or_path) if self.reads_text else None
        except (OSError, ValueError) as error:
            raise InputError(f"judge_model {name_or_path!r} could not be loaded as CLIP or DINOv2: {error}") from error
        self.base, self.pictures = base, list(references)
        self.references = self._embedded(references)

    @torch.no_grad()
    def scores(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[Scores]:
        """The scores of each picture, drawn from the prompt at its place."""
        embedded = self._embedded(pictures)
        subject = (embedded @ self.references.T).mean(dim=1).tolist()
        if self.reads_text:
            tokens = self.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt")
            prompt = (embedded * _unit(_tensor(self.model.get_text_features(**tokens)))).sum(dim=1).tolist()
        else:
            prompt = [each.prompt for each in self.base.scores(pictures, prompts)]
        return [Scores(*each) for each in zip(subject, prompt, copy_scores(pictures, self.pictures), strict=True)]

    @torch.no_grad()
    def _embedded(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """(pictures, width), of length 1."""
        inputs = self.processor(images=[picture.convert("RGB") for picture in pictures], return_tensors="pt")
        if self.reads_text:
            return _unit(_tensor(self.model.get_image_features(**inputs)))
        return _unit(self.model(**inputs).pooler_output)


def _tensor(features: torch.Tensor | nn.Module) -> torch.Tensor:
    """transformers 5 wraps CLIP's features in an output of which they are the pooled part."""
    return features if isinstance(features, torch.Tensor) else features.pooler_output


def judge_by(
    name_or_path: str | None,
    pipeline: StableDiffusionXLPipeline,
    references: Sequence[Image.Image],
    others: Sequence[Image.Image],
    resolution: int,
) -> Judge:
    """The judge for a run: a CLIP or DINOv2 model where one is named, else the base model; arguments as for the judges.

    Raises: InputError if the model cannot be loaded.
    """
    base = BaseModelJudge(pipeline, references, others, resolution)
    return base if name_or_path is None else EmbeddingJudge(name_or_path, references, base)
