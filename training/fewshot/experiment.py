"""What all methods of a few-shot run share: the model, the labelled images, and what is drawn of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from accelerate.logging import get_logger
from torch.utils.data import Dataset

from pipelines.cache import TensorCache, module_digest
from pipelines.clip import Clip
from pipelines.errors import InputError
from pipelines.fewshot.baselines.task import Examples, FewShotTask
from pipelines.fewshot.batches import AlteredImages, AlteredView, Augmentation
from pipelines.fewshot.data import (
    Copies,
    LabelledImage,
    LabelledImageDataset,
    LabelledSet,
    base_and_new,
    check_readable,
    find_copies,
    read,
    rename,
    without_copies,
)
from pipelines.fewshot.features import image_features, prompt_features, raw_pixels
from pipelines.fewshot.loading import load_images
from pipelines.fewshot.prompts import Prompts, make_prompts
from pipelines.fewshot.samples import sample_set
from pipelines.fewshot.sets import load_set
from pipelines.fewshot.shots import FewShotSplit, Shots, sample_split, saved_split, split_notes
from training.options.fewshot import LabelledDataOptions

logger = get_logger(__name__)
SPLITS = "splits"
Key = tuple[Shots, int]
PictureSet = Dataset[tuple[torch.Tensor, int]]


def labelled_set(options: LabelledDataOptions) -> tuple[LabelledSet, list[Copies]]:
    """The labelled images, and which of them were there more than once.

    One of each copied image is kept; none whose copies are in two classes. Sets of the CoOp protocol stay as they are.

    What of the set is not used, and how it is split, is logged and stands in its notes.

    Raises: InputError naming what cannot be used.
    """
    if options.data_dir is not None and not Path(options.data_dir).exists():
        raise InputError(f"There is no folder or file {options.data_dir!r}. Give --data_dir with the path where the images lie.")
    if options.dataset is not None:
        return rename(load_set(options.data_dir, options.dataset), options.names_by_key()), []
    names = options.names_by_key()
    found = rename(sample_set(), names) if options.data_dir is None else load_images(options.data_dir, names)
    copies = find_copies(found)
    for one in copies:
        logger.warning(f"{one} {'None of them is' if one.conflicting else 'One of them is'} used.")
    used = without_copies(found, copies)
    missing = split_notes(used)
    for note in used.notes:
        logger.info(note)
    for note in missing:
        logger.warning(note)
    return replace(used, notes=(*used.notes, *missing)), copies


def check_drawable(labelled: LabelledSet, options: LabelledDataOptions) -> None:
    """Check, before anything is loaded or written, that there are images for all shots, and that they can be read.

    Raises: InputError naming the class that has too few, or the images.
    """
    splits = [sample_split(labelled, *key, options.test_share) for key in keys(options)]
    used = {name for split in splits for part in split.names.values() for name, _ in part}
    check_readable([image for image in labelled.images if image.name in used])


def keys(options: LabelledDataOptions) -> list[Key]:
    """Shots and seed of every draw."""
    return [(shots, seed) for shots in options.all_shots() for seed in options.seeds]


@dataclass(frozen=True)
class Experiment:
    """The model and the images of a run.

    Args:
        clip: the base model, on its device, which no method changes.
        labelled: all classes; the first `len(prompts.classes)` of them are learned.
        prompts: of the classes that are learned.
        new_prompts: of those that are held out; None if none is.
        options: of the data.
        folder: the run's directory, which keeps splits and features.
    """

    clip: Clip
    labelled: LabelledSet
    prompts: Prompts
    new_prompts: Prompts | None
    options: LabelledDataOptions
    folder: Path
    _seen: dict[tuple[str, ...], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    _digests: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, clip: Clip, labelled: LabelledSet, options: LabelledDataOptions, folder: Path) -> Experiment:
        """A study of `labelled`, half of its classes held out where the options say so.

        Raises: InputError for templates without {}, or too few classes to hold any out.
        """
        given = options.templates
        templates = given[0] if len(given) == 1 else given
        if not options.base_to_new:
            return cls(clip, labelled, make_prompts(labelled.classes, templates), None, options, folder)
        prompts, new = (make_prompts(part.classes, templates) for part in base_and_new(labelled))
        return cls(clip, labelled, prompts, new, options, folder)

    @property
    def cache(self) -> TensorCache:
        """Where features of the base model are kept."""
        return TensorCache(self.folder / "cache")

    @cached_property
    def base_sha256(self) -> str:
        """Of the base model's weights."""
        return module_digest(self.clip.model)

    @cached_property
    def class_features(self) -> torch.Tensor:
        """(classes, d) of length 1, by the base model."""
        return prompt_features(self.clip, self.prompts, cache=self.cache)

    @cached_property
    def new_class_features(self) -> torch.Tensor:
        """(new classes, d) of length 1, by the base model."""
        return prompt_features(self.clip, self.new_prompts, cache=self.cache)

    def drawn(self, key: Key) -> SplitImages:
        """The images of one draw, which is saved for whoever comes next."""
        shots, seed = key
        path = self.folder / SPLITS / f"{shots}-shots-seed-{seed}.json"
        return SplitImages(self, saved_split(path, self.labelled, shots, seed, self.options.test_share))

    def digests(self, images: Sequence[LabelledImage]) -> dict[str, str]:
        """The sha256 of the file of each of `images`, by their names; each file is read once."""
        for image in images:
            if image.name not in self._digests:
                self._digests[image.name] = hashlib.sha256(image.source.content()).hexdigest()
        return {image.name: self._digests[image.name] for image in images}

    def features(self, images: Sequence[LabelledImage], clip: Clip | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (n, d) of length 1 and labels (n,) of `images`, by the base model or by `clip`."""
        names = tuple(image.name for image in images)
        if clip is None and names in self._seen:
            return self._seen[names]
        found = self.encoded(LabelledImageDataset(images, self.clip.preprocess), clip)
        if clip is None:
            self._seen[names] = found
        return found

    def encoded(self, images: PictureSet, clip: Clip | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (n, d) of length 1 and labels (n,) of a dataset's pixels and labels."""
        return image_features(clip or self.clip, images, workers=self.options.dataloader_num_workers, cache=self.cache)


@dataclass(frozen=True)
class SplitImages:
    """The images of one draw: what is learned from, chosen on and tested on."""

    study: Experiment
    split: FewShotSplit

    @property
    def key(self) -> Key:
        """Shots and seed."""
        return self.split.shots, self.split.seed

    @cached_property
    def train(self) -> tuple[LabelledImage, ...]:
        """What is learned from."""
        return self._of("train")

    @cached_property
    def validation(self) -> tuple[LabelledImage, ...]:
        """What every setting is chosen on."""
        return self._of("val")

    @cached_property
    def test(self) -> tuple[LabelledImage, ...]:
        """What is looked at once, when everything is chosen."""
        return self._of("test")

    @cached_property
    def new_test(self) -> tuple[LabelledImage, ...]:
        """Test images of the classes that are held out."""
        known = len(self.study.prompts.classes)
        return tuple(image for image in self.split.images(self.study.labelled, "test") if image.label >= known)

    def _of(self, part: str) -> tuple[LabelledImage, ...]:
        known = len(self.study.prompts.classes)
        return tuple(image for image in self.split.images(self.study.labelled, part) if image.label < known)

    @property
    def shots(self) -> int:
        """The training images of the class that has fewest."""
        labels = torch.tensor([image.label for image in self.train])
        return int(torch.bincount(labels, minlength=len(self.study.prompts.classes)).min())

    def altered(self) -> AlteredImages:
        """The training images, altered at random."""
        options = self.study.options
        scale = (options.crop_scale[0], options.crop_scale[1])
        return AlteredImages(self.train, Augmentation(scale, options.random_flip), self.study.clip)

    @cached_property
    def training_examples(self) -> Examples:
        """What frozen towers make of the training images and of altered views of them."""
        study, altered = self.study, self.altered()
        features, labels = study.features(self.train)
        views = [study.encoded(AlteredView(altered, self.split.seed, view))[0] for view in range(study.options.views)]
        return Examples(features, labels, self._pixels(self.train), torch.stack(views) if views else None)

    @cached_property
    def task(self) -> FewShotTask:
        """What methods on frozen features are given."""
        study = self.study
        features, labels = study.features(self.validation)
        validation = Examples(features, labels, self._pixels(self.validation))
        scale = float(study.clip.logit_scale)
        return FewShotTask(study.prompts.classes, study.class_features, scale, self.training_examples, validation, study.clip)

    def _pixels(self, images: Sequence[LabelledImage]) -> torch.Tensor:
        return torch.stack([raw_pixels(read(image)) for image in images])

    def inputs(self, images: Sequence[LabelledImage], reads: str) -> torch.Tensor:
        """What a predictor that `reads` features or pixels is given of `images`: (n, width)."""
        return self._pixels(images) if reads == "pixels" else self.study.features(images)[0]
