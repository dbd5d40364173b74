"""What all methods of a few-shot run share: the model, the labelled pictures, and what is drawn of them."""

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
from pipelines.fewshot.batches import AlteredPictures, AlteredView, Augmentation
from pipelines.fewshot.data import (
    Copies,
    LabelledPicture,
    LabelledSet,
    PictureDataset,
    base_and_new,
    check_readable,
    find_copies,
    read,
    rename,
    without_copies,
)
from pipelines.fewshot.features import picture_features, prompt_features, raw_pixels
from pipelines.fewshot.loading import load_pictures
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
    """The labelled pictures, and which of them were there more than once.

    One of each copied picture is kept; none whose copies are in two classes. Sets of the CoOp protocol stay as they are.

    What of the set is not used, and how it is split, is logged and stands in its notes.

    Raises: InputError naming what cannot be used.
    """
    if options.data_dir is not None and not Path(options.data_dir).exists():
        raise InputError(f"There is no folder or file {options.data_dir!r}. Give --data_dir with the path where the images lie.")
    if options.dataset is not None:
        return rename(load_set(options.data_dir, options.dataset), options.names_by_key()), []
    names = options.names_by_key()
    found = rename(sample_set(), names) if options.data_dir is None else load_pictures(options.data_dir, names)
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
    """Check, before anything is loaded or written, that there are pictures for all shots, and that they can be read.

    Raises: InputError naming the class that has too few, or the pictures.
    """
    splits = [sample_split(labelled, *key, options.test_share) for key in keys(options)]
    used = {name for split in splits for part in split.names.values() for name, _ in part}
    check_readable([picture for picture in labelled.pictures if picture.name in used])


def keys(options: LabelledDataOptions) -> list[Key]:
    """Shots and seed of every draw."""
    return [(shots, seed) for shots in options.all_shots() for seed in options.seeds]


@dataclass(frozen=True)
class Study:
    """The model and the pictures of a run.

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
    def of(cls, clip: Clip, labelled: LabelledSet, options: LabelledDataOptions, folder: Path) -> Study:
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

    def drawn(self, key: Key) -> DrawnPictures:
        """The pictures of one draw, which is saved for whoever comes next."""
        shots, seed = key
        path = self.folder / SPLITS / f"{shots}-shots-seed-{seed}.json"
        return DrawnPictures(self, saved_split(path, self.labelled, shots, seed, self.options.test_share))

    def digests(self, pictures: Sequence[LabelledPicture]) -> dict[str, str]:
        """The sha256 of the file of each of `pictures`, by their names; each file is read once."""
        for picture in pictures:
            if picture.name not in self._digests:
                self._digests[picture.name] = hashlib.sha256(picture.source.content()).hexdigest()
        return {picture.name: self._digests[picture.name] for picture in pictures}

    def features(self, pictures: Sequence[LabelledPicture], clip: Clip | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (n, d) of length 1 and labels (n,) of `pictures`, by the base model or by `clip`."""
        names = tuple(picture.name for picture in pictures)
        if clip is None and names in self._seen:
            return self._seen[names]
        found = self.encoded(PictureDataset(pictures, self.clip.preprocess), clip)
        if clip is None:
            self._seen[names] = found
        return found

    def encoded(self, pictures: PictureSet, clip: Clip | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (n, d) of length 1 and labels (n,) of a dataset's pixels and labels."""
        return picture_features(clip or self.clip, pictures, workers=self.options.dataloader_num_workers, cache=self.cache)


@dataclass(frozen=True)
class DrawnPictures:
    """The pictures of one draw: what is learned from, chosen on and tested on."""

    study: Study
    split: FewShotSplit

    @property
    def key(self) -> Key:
        """Shots and seed."""
        return self.split.shots, self.split.seed

    @cached_property
    def train(self) -> tuple[LabelledPicture, ...]:
        """What is learned from."""
        return self._of("train")

    @cached_property
    def validation(self) -> tuple[LabelledPicture, ...]:
        """What every setting is chosen on."""
        return self._of("val")

    @cached_property
    def test(self) -> tuple[LabelledPicture, ...]:
        """What is looked at once, when everything is chosen."""
        return self._of("test")

    @cached_property
    def new_test(self) -> tuple[LabelledPicture, ...]:
        """Test pictures of the classes that are held out."""
        known = len(self.study.prompts.classes)
        return tuple(picture for picture in self.split.pictures(self.study.labelled, "test") if picture.label >= known)

    def _of(self, part: str) -> tuple[LabelledPicture, ...]:
        known = len(self.study.prompts.classes)
        return tuple(picture for picture in self.split.pictures(self.study.labelled, part) if picture.label < known)

    @property
    def shots(self) -> int:
        """The training pictures of the class that has fewest."""
        labels = torch.tensor([picture.label for picture in self.train])
        return int(torch.bincount(labels, minlength=len(self.study.prompts.classes)).min())

    def altered(self) -> AlteredPictures:
        """The training pictures, altered at random."""
        options = self.study.options
        scale = (options.crop_scale[0], options.crop_scale[1])
        return AlteredPictures(self.train, Augmentation(scale, options.random_flip), self.study.clip)

    @cached_property
    def training_examples(self) -> Examples:
        """What frozen towers make of the training pictures and of altered views of them."""
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

    def _pixels(self, pictures: Sequence[LabelledPicture]) -> torch.Tensor:
        return torch.stack([raw_pixels(read(picture)) for picture in pictures])

    def inputs(self, pictures: Sequence[LabelledPicture], reads: str) -> torch.Tensor:
        """What a predictor that `reads` features or pixels is given of `pictures`: (n, width)."""
        return self._pixels(pictures) if reads == "pixels" else self.study.features(pictures)[0]
