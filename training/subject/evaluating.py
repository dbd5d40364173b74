"""The evaluation of a subject's adapter after its last step, against the base model with the same prompts and noise."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from PIL import Image

from pipelines.cache import TensorCache, key_of
from pipelines.images import save_image, save_png
from pipelines.subject.adapters import without_adapters
from pipelines.subject.captions import SUBJECT_FIELD
from pipelines.subject.data import TrainingImage, load_examples
from pipelines.subject.scores import ImageScorer
from training.options import NEW_SCENES, SubjectOptions
from training.options.validation import UNRELATED_PROMPTS
from training.runs.run import RunDirectory
from training.runs.run_files import EVALUATING
from training.runs.subject_files import EVALUATION, SubjectEvaluation
from training.subject.measured import measured_curve
from training.subject.preparing import DatasetSplit
from training.subject.samples import ValidationSampler
from training.subject.validation import inference_batch

# The noise of all evaluations is the same, whatever the seed of the training, and differs from that of validation images.
FIRST_SEED = 1_000_000
# Words that say nothing about what an image shows.
COMMON_WORDS = frozenset({"a", "an", "the", "photo", "of", "in", "on", "at", "large"})
logger = get_logger(__name__)


@dataclass(frozen=True)
class ComparedImages:
    """Images of the adapter and of the base model from the same prompts and noise."""

    prompts: Sequence[str]
    seeds: Sequence[int]
    adapted: Sequence[Image.Image]
    base: Sequence[Image.Image]


@dataclass(frozen=True)
class EvaluatedSubject:
    """The subject of the held-out image, or all subjects without one.

    Args:
        prompts: the instance prompt of each.
        training, heldout: their images as the model sees them.
    """

    prompts: Sequence[str]
    training: Sequence[Image.Image]
    heldout: Sequence[Image.Image]

    @classmethod
    def of(cls, split: DatasetSplit, instance_prompt: str, resolution: int) -> EvaluatedSubject:
        """The subject of `split`, with images of `resolution` pixels."""
        subjects = {image.subject for image in split.heldout or split.train}
        named = [instance_prompt.replace(SUBJECT_FIELD, subject) for subject in sorted(subjects)]
        training, heldout = (
            _as_seen([image for image in images if image.subject in subjects], resolution)
            for images in (split.train, split.heldout)
        )
        return cls(list(dict.fromkeys(named)), training, heldout)


def _as_seen(images: Sequence[TrainingImage], resolution: int) -> list[Image.Image]:
    return [example.image() for example in load_examples([image.path for image in images], resolution)]


def unrelated_prompts(subject_prompts: Sequence[str]) -> list[str]:
    """Those of `UNRELATED_PROMPTS` that share no word with the subject's prompts."""
    words = set(chain.from_iterable(prompt.lower().split() for prompt in subject_prompts)) - COMMON_WORDS
    return [prompt for prompt in UNRELATED_PROMPTS if not words & set(prompt.split())]


def evaluate(
    run: RunDirectory,
    sampler: ValidationSampler,
    scorer: ImageScorer,
    split: DatasetSplit,
    options: SubjectOptions,
    base_model: dict[str, Any],
) -> SubjectEvaluation:
    """Compare the adapter with the base model; writes evaluation.json, and the images to evaluation/.

    Args:
        sampler: of the pipeline with the adapter of the last step.
        base_model: its identity, for base images that runs with the same --cache_dir share.
    """
    run.begin(EVALUATING)
    resolution = sampler.sampling.resolution
    sampler = replace(sampler, batch_size=inference_batch(resolution**2, sampler.batch_size))
    subject = EvaluatedSubject.of(split, options.data.instance_prompt, resolution)
    count = options.validation.num_evaluation_images
    scenes = [f"{prompt} {scene}" for prompt in subject.prompts for scene in NEW_SCENES for _ in range(count)]
    unrelated = unrelated_prompts(subject.prompts)
    of_subject, of_others = compared(sampler, (scenes, unrelated), base_model, options.data.cache_dir)
    evaluation = SubjectEvaluation(
        **heldout_losses(run, split),
        **similarities(scorer, of_subject, subject),
        **drift(scorer, of_others),
        scorer=options.validation.image_scorer,
        images_per_prompt=count,
        prompts=list(of_subject.prompts),
        seeds=list(of_subject.seeds),
        unrelated_prompts=list(of_others.prompts),
        unrelated_seeds=list(of_others.seeds),
    )
    save_images(run, sampler, {"subject": of_subject, "unrelated": of_others}, subject)
    evaluation.write(run.path)
    if not subject.heldout:
        logger.warning("No image is held out, so the evaluation has no similarity to held-out images and no copying.")
    logger.info(f"Evaluation: {evaluation.summary}")
    return evaluation


def compared(
    sampler: ValidationSampler, prompts: Sequence[Sequence[str]], base_model: dict[str, Any], cache_dir: str | None
) -> list[ComparedImages]:
    """An image of the adapter and one of the base model for each of `prompts`, which are in groups."""
    every = list(chain.from_iterable(prompts))
    seeds = range(FIRST_SEED, FIRST_SEED + len(every))
    adapted, base = sampler.images(every, seeds), _base_images(sampler, every, seeds, base_model, cache_dir)
    groups, first = [], 0
    for group in prompts:
        part = slice(first, first + len(group))
        groups.append(ComparedImages(group, seeds[part], adapted[part], base[part]))
        first += len(group)
    return groups


def _base_images(
    sampler: ValidationSampler, prompts: Sequence[str], seeds: Sequence[int], base_model: dict[str, Any], cache_dir: str | None
) -> list[Image.Image]:
    """The base model's images, from the cache in `cache_dir` if it has them."""

    def make() -> dict[str, torch.Tensor]:
        with without_adapters(sampler.pipeline):
            images = sampler.images(prompts, seeds)
        return {"images": torch.from_numpy(np.stack([np.asarray(image) for image in images]))}

    key = key_of(base_images=base_model, seeds=list(seeds), prompts=list(prompts), **sampler.identity())
    pixels = (make() if cache_dir is None else TensorCache(Path(cache_dir)).read_or_make(key, make))["images"]
    return [Image.fromarray(image) for image in pixels.numpy()]


def heldout_losses(run: RunDirectory, split: DatasetSplit) -> dict[str, float | None]:
    """The losses of the base model and of the last step, by the name of the field; None without a held-out image."""
    curve = measured_curve(run) if split.heldout else []
    first, last = (curve[0].heldout, curve[-1].heldout) if curve else (None, None)
    return {"base_heldout_loss": first, "heldout_loss": last}


def similarities(scorer: ImageScorer, images: ComparedImages, subject: EvaluatedSubject) -> dict[str, float | None]:
    """The fields of `SubjectEvaluation` about images of the subject."""
    training = _nearest(scorer, images.adapted, subject.training)
    fields: dict[str, float | None] = {"training_similarity": training}
    for name, group in (("", images.adapted), ("base_", images.base)):
        fields[f"{name}text_similarity"] = fmean(each.prompt for each in scorer.scores(group, images.prompts))
        of_heldout = scorer.similarities(group, subject.heldout).mean().item() if subject.heldout else None
        fields[f"{name}image_similarity"] = of_heldout
    heldout, similarity = subject.heldout, fields["image_similarity"]
    fields["heldout_to_training"] = _nearest(scorer, heldout, subject.training) if heldout else None
    fields["copying"] = None if similarity is None else training - similarity
    return fields


def _nearest(scorer: ImageScorer, images: Sequence[Image.Image], references: Sequence[Image.Image]) -> float:
    """The mean similarity of `images` to the nearest of `references`."""
    return scorer.similarities(images, references).amax(dim=1).mean().item()


def drift(scorer: ImageScorer, images: ComparedImages) -> dict[str, float]:
    """The fields of `SubjectEvaluation` about images without the subject."""
    similarity = scorer.similarities(images.adapted, images.base).diagonal().mean().item()
    adapted, base = (np.stack([np.asarray(image, np.float64) for image in group]) for group in (images.adapted, images.base))
    return {"drift": 1 - similarity, "drift_pixels": float(np.sqrt(((adapted - base) ** 2).mean()))}


def save_images(
    run: RunDirectory, sampler: ValidationSampler, groups: dict[str, ComparedImages], subject: EvaluatedSubject
) -> None:
    """Save the images with their settings to evaluation/<group>/ and evaluation/base_<group>/, and the photos beside them."""
    folder = run.path / EVALUATION
    shutil.rmtree(folder, ignore_errors=True)
    for name, group in groups.items():
        for prefix, images in (("", group.adapted), ("base_", group.base)):
            for index, (image, prompt, seed) in enumerate(zip(images, group.prompts, group.seeds, strict=True)):
                save_image(image, folder / f"{prefix}{name}" / f"{index}.png", sampler.settings(prompt, seed))
    for name, photos in (("training", subject.training), ("heldout", subject.heldout)):
        (folder / name).mkdir()
        for index, image in enumerate(photos):
            save_png(image, folder / name / f"{index}.png")
