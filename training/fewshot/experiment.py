"""What all trials of a few-shot run share: the model, the labelled images and their splits."""

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
from pipelines.fewshot.baselines import READ_EMBEDDINGS
from pipelines.fewshot.baselines.task import Examples, FewShotTask
from pipelines.fewshot.batches import Augmentation, AugmentedImages, AugmentedView
from pipelines.fewshot.data import (
    DuplicateImages,
    LabelledImage,
    LabelledImageDataset,
    LabelledSet,
    base_and_new,
    check_readable,
    find_duplicates,
    read,
    rename,
    without_duplicates,
)
from pipelines.fewshot.features import image_features, prompt_features, raw_pixels
from pipelines.fewshot.loading import load_images
from pipelines.fewshot.projection import image_projection
from pipelines.fewshot.prompts import Prompts, make_prompts
from pipelines.fewshot.samples import sample_set
from pipelines.fewshot.sets import load_set
from pipelines.fewshot.shots import FewShotSplit, Shots, sample_split, saved_split, split_notes
from pipelines.quantization import CALIBRATION, UNQUANTIZED
from training.options.fewshot import LabelledDataOptions

logger = get_logger(__name__)
SPLITS = "splits"
Key = tuple[Shots, int]
ImageSet = Dataset[tuple[torch.Tensor, int]]


def labelled_set(options: LabelledDataOptions) -> tuple[LabelledSet, list[DuplicateImages]]:
    """The labelled images, and the duplicates that were removed from them.

    Of identical images in one class the first is used, of identical images in several classes none. The datasets of the CoOp
    protocol are not changed. Files that are not used, and the split of the dataset, are logged and listed in its notes.

    Raises: InputError naming the file or option that cannot be used.
    """
    if options.data_dir is not None and not Path(options.data_dir).exists():
        raise InputError(f"--data_dir must be an existing folder or file, got {options.data_dir!r}. Check the path.")
    if options.dataset is not None:
        return rename(load_set(options.data_dir, options.dataset), options.names_by_key()), []
    names = options.names_by_key()
    dataset = rename(sample_set(), names) if options.data_dir is None else load_images(options.data_dir, names)
    duplicates = find_duplicates(dataset.images)
    for group in duplicates:
        logger.warning(f"{group} {'None' if group.conflicting else 'One'} of them is used.")
    dataset = without_duplicates(dataset, duplicates)
    warnings = split_notes(dataset)
    for note in dataset.notes:
        logger.info(note)
    for note in warnings:
        logger.warning(note)
    return replace(dataset, notes=(*dataset.notes, *warnings)), duplicates


def check_can_split(dataset: LabelledSet, options: LabelledDataOptions) -> None:
    """Check, before anything is loaded or written, that every class has enough images and that they can be read.

    Raises: InputError naming the class with too few images, or the unreadable images.
    """
    sampling = options.test_share, options.num_validation_images
    splits = [sample_split(dataset, *key, *sampling) for key in split_keys(options)]
    used = {name for split in splits for part in split.names.values() for name, _ in part}
    check_readable([image for image in dataset.images if image.name in used])


def split_keys(options: LabelledDataOptions) -> list[Key]:
    """Shots and seed of every split."""
    return [(shots, seed) for shots in options.all_shots() for seed in options.seeds]


@dataclass(frozen=True)
class Experiment:
    """The model and the images of a run.

    Args:
        clip: the base model, on its device; no trial changes it.
        dataset: all classes; the first `len(prompts.classes)` are trained.
        prompts: of the trained classes.
        new_prompts: of the held-out classes; None without them.
        options: of the data.
        folder: the run's directory, which stores splits and features.
    """

    clip: Clip
    dataset: LabelledSet
    prompts: Prompts
    new_prompts: Prompts | None
    options: LabelledDataOptions
    folder: Path
    _features: dict[tuple[str, ...], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    _digests: dict[str, str] = field(default_factory=dict)

    @classmethod
    def create(cls, clip: Clip, dataset: LabelledSet, options: LabelledDataOptions, folder: Path) -> Experiment:
        """An experiment on `dataset`, with half of its classes held out if `options.base_to_new` is set.

        Raises: InputError for templates without {}, or too few classes to hold any out.
        """
        templates = options.templates[0] if len(options.templates) == 1 else options.templates
        if not options.base_to_new:
            return cls(clip, dataset, make_prompts(dataset.classes, templates), None, options, folder)
        prompts, new = (make_prompts(part.classes, templates) for part in base_and_new(dataset))
        return cls(clip, dataset, prompts, new, options, folder)

    @property
    def cache(self) -> TensorCache:
        """The cache of the base model's features."""
        return TensorCache(Path(self.options.cache_dir or self.folder / "cache"))

    @cached_property
    def base_sha256(self) -> str:
        """SHA-256 of the base model's weights, before they were quantised."""
        return self.clip.base_sha256 or module_digest(self.clip.model)

    @property
    def unquantized(self) -> Path | None:
        """The folder of the base model's weights before quantisation; None for a model in full precision."""
        return self.folder / CALIBRATION / UNQUANTIZED if self.clip.quantization_errors else None

    @cached_property
    def class_features(self) -> torch.Tensor:
        """(classes, d) of length 1, by the base model."""
        return prompt_features(self.clip, self.prompts, cache=self.cache)

    @cached_property
    def new_class_features(self) -> torch.Tensor:
        """(new classes, d) of length 1, by the base model."""
        return prompt_features(self.clip, self.new_prompts, cache=self.cache)

    def split_images(self, key: Key) -> SplitImages:
        """The images of one split, which is saved to the run's directory."""
        shots, seed = key
        path = self.folder / SPLITS / f"{shots}-shots-seed-{seed}.json"
        sampling = self.options.test_share, self.options.num_validation_images
        return SplitImages(self, saved_split(path, self.dataset, shots, seed, *sampling))

    def digests(self, images: Sequence[LabelledImage]) -> dict[str, str]:
        """SHA-256 of the file of each image, by name; each file is read once."""
        for image in images:
            if image.name not in self._digests:
                self._digests[image.name] = hashlib.sha256(image.source.content()).hexdigest()
        return {image.name: self._digests[image.name] for image in images}

    def features(self, images: Sequence[LabelledImage], clip: Clip | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (n, d) of length 1 and labels (n,) of `images`, by the base model or by `clip`."""
        names = tuple(image.name for image in images)
        if clip is None and names in self._features:
            return self._features[names]
        encoded = self.encode(self.plain(images), clip)
        if clip is None:
            self._features[names] = encoded
        return encoded

    def encode(self, images: ImageSet, clip: Clip | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (n, d) of length 1 and labels (n,) of a dataset of pixels and labels."""
        return image_features(clip or self.clip, images, workers=self.options.dataloader_num_workers, cache=self.cache)

    def embeddings(self, images: ImageSet) -> torch.Tensor:
        """Embeddings (n, p) of a dataset of pixels and labels, by the base model before the projection of its image encoder."""
        workers = self.options.dataloader_num_workers
        return image_features(self.clip, images, workers=workers, cache=self.cache, before_projection=True)[0]

    def plain(self, images: Sequence[LabelledImage]) -> ImageSet:
        """`images` as a dataset of pixels, without augmentation, and labels."""
        return LabelledImageDataset(images, self.clip.preprocess)


@dataclass(frozen=True)
class SplitImages:
    """The images of one split: training, validation and test images."""

    experiment: Experiment
    split: FewShotSplit

    @property
    def key(self) -> Key:
        """Shots and seed."""
        return self.split.shots, self.split.seed

    @cached_property
    def train(self) -> tuple[LabelledImage, ...]:
        """The training images."""
        return self._of("train")

    @cached_property
    def validation(self) -> tuple[LabelledImage, ...]:
        """The images that all hyperparameters are chosen on."""
        return self._of("val")

    @cached_property
    def test(self) -> tuple[LabelledImage, ...]:
        """The images of the final evaluation."""
        return self._of("test")

    @cached_property
    def new_test(self) -> tuple[LabelledImage, ...]:
        """Test images of the held-out classes."""
        count = len(self.experiment.prompts.classes)
        return tuple(image for image in self.split.images(self.experiment.dataset, "test") if image.label >= count)

    def _of(self, part: str) -> tuple[LabelledImage, ...]:
        count = len(self.experiment.prompts.classes)
        return tuple(image for image in self.split.images(self.experiment.dataset, part) if image.label < count)

    @property
    def shots(self) -> int:
        """Number of training images of the smallest class."""
        labels = torch.tensor([image.label for image in self.train])
        return int(torch.bincount(labels, minlength=len(self.experiment.prompts.classes)).min())

    def augmented(self) -> AugmentedImages:
        """The training images with random augmentation."""
        options = self.experiment.options
        scale = (options.crop_scale[0], options.crop_scale[1])
        return AugmentedImages(self.train, Augmentation(scale, options.random_flip), self.experiment.clip)

    @cached_property
    def training_examples(self) -> Examples:
        """Features of the frozen encoders for the training images and for augmented views of them."""
        features, labels = self.experiment.features(self.train)
        views = [self.experiment.encode(view)[0] for view in self._views()]
        return Examples(features, labels, self._pixels(self.train), torch.stack(views) if views else None)

    @cached_property
    def task(self) -> FewShotTask:
        """The task for methods on frozen features."""
        experiment = self.experiment
        features, labels = experiment.features(self.validation)
        validation = Examples(features, labels, self._pixels(self.validation))
        scale = float(experiment.clip.logit_scale)
        return FewShotTask(
            experiment.prompts.classes, experiment.class_features, scale, self.training_examples, validation, experiment.clip
        )

    def task_for(self, baseline: str) -> FewShotTask:
        """The task for `baseline`. Raises: InputError if the image encoder lacks what it needs."""
        return self._task_with_embeddings if baseline in READ_EMBEDDINGS else self.task

    @cached_property
    def _task_with_embeddings(self) -> FewShotTask:
        """The task for methods that also read the embeddings before the projection of the image encoder.

        Raises: InputError if the image encoder does not end in a linear projection.
        """
        task, experiment = self.task, self.experiment
        projection = image_projection(experiment.clip)
        train = torch.stack([experiment.embeddings(view) for view in (experiment.plain(self.train), *self._views())])
        validation = experiment.embeddings(experiment.plain(self.validation))[None]
        return replace(
            task,
            train=replace(task.train, embeddings=train),
            validation=replace(task.validation, embeddings=validation),
            projection=projection,
        )

    def _views(self) -> list[AugmentedView]:
        """Augmented views of the training images."""
        augmented = self.augmented()
        return [AugmentedView(augmented, self.split.seed, view) for view in range(self.experiment.options.views)]

    def _pixels(self, images: Sequence[LabelledImage]) -> torch.Tensor:
        return torch.stack([raw_pixels(read(image)) for image in images])

    def inputs(self, images: Sequence[LabelledImage], reads: str) -> torch.Tensor:
        """The input (n, width) of a predictor that `reads` features, pixels or embeddings."""
        if reads == "embeddings":
            return self.experiment.embeddings(self.experiment.plain(images))
        return self._pixels(images) if reads == "pixels" else self.experiment.features(images)[0]
