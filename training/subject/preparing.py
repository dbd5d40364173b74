"""Before a subject's training: check, split and encode its images, and generate class images."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import StableDiffusionXLPipeline

from pipelines.buckets import AUTOMATIC, Size, automatic_buckets, parse_buckets, size_multiple
from pipelines.cache import TensorCache
from pipelines.subject.adapters import without_adapters
from pipelines.subject.captions import find_captioned
from pipelines.subject.data import TrainingImage
from pipelines.subject.encoding import CachedLatents, CropConfig, LatentEncoder
from pipelines.subject.generate import Sampling, generate
from pipelines.subject.heldout import choose_heldout
from pipelines.subject.image_checks import ImageCheckReport, check_images
from pipelines.subject.prior import ClassImages, in_sizes
from pipelines.subject.prompt_length import LongPrompt, long_prompts
from training.options import SubjectOptions
from training.options.data import DataOptions
from training.runs.run import RunDirectory
from training.runs.run_files import CLASS_IMAGES, ENCODING, ImageChecks
from training.subject.cross_validation import log_cost

PRIOR_DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CACHE, CLASS_FOLDER = "cache", "class_pictures"
logger = get_logger(__name__)


@dataclass(frozen=True)
class DatasetSplit:
    """The training images, the held-out images, and the checks of all of them.

    Args:
        folds: indices in `train` of the images that cross-validation leaves out.
    """

    train: list[TrainingImage]
    heldout: list[TrainingImage]
    report: ImageCheckReport
    folds: tuple[int, ...] = ()


def checked_images(options: DataOptions, seed: int) -> DatasetSplit:
    """Find, check and split the images.

    Raises: InputError naming the folder or file, or a missing class prompt.
    """
    folder, class_folder = options.instance_data_dir, options.class_data_dir
    within = (class_folder, options.excluded_images or ())
    report = check_images(folder, options.resolution, options.dataloader_num_workers, *within)
    captioned = find_captioned(folder, options.instance_prompt, *within)
    if options.with_prior_preservation:
        prompts = options.class_prompts()
        if class_folder is not None:
            classes = ClassImages(Path(class_folder), prompts, options.num_class_images, model="")
            report = replace(report, class_folder=classes.account())
    _log(report)
    usable = [image for image in captioned if image.path in report.usable]
    names = [image.path.relative_to(options.instance_data_dir).as_posix() for image in usable]
    chosen = choose_heldout(names, options.heldout_image, seed)
    if chosen.folds:
        log_cost(len(chosen.folds))
    train_on = [image for index, image in enumerate(usable) if index != chosen.index]
    heldout = [] if chosen.index is None else [usable[chosen.index]]
    return DatasetSplit(train_on, heldout, report, chosen.folds)


def _log(report: ImageCheckReport) -> None:
    """Log the report if it has warnings, else only where captions come from."""
    if report.has_warnings:
        logger.warning("Image checks:\n%s", report.summary())
        return
    for account in report.accounts:
        for words in account.infos():
            logger.info(words)


@dataclass(frozen=True)
class Encoded:
    """The encoded training images, and the held-out images; None without these."""

    subject: CachedLatents
    heldout: CachedLatents | None

    def folds(self, indices: tuple[int, ...]) -> Iterator[tuple[CachedLatents, CachedLatents]]:
        """For each of `indices`, all other training images, and the one at that index."""
        for index in indices:
            rest = [other for other in range(len(self.subject)) if other != index]
            yield self.subject.only(rest), self.subject.only([index])


class Preparation:
    """Encodes images and generates class images with the base model.

    Args:
        pipeline: the base model without an adapter.
        load: loads it again in another precision.
        sampling: for class images; its resolution is also that of the training.
    Raises: InputError if the sizes of buckets do not fit the model.
    """

    def __init__(
        self,
        pipeline: StableDiffusionXLPipeline,
        load: Callable[[torch.dtype], StableDiffusionXLPipeline],
        options: SubjectOptions,
        sampling: Sampling,
        run: RunDirectory,
        accelerator: Accelerator,
    ) -> None:
        self.pipeline, self.load, self.options, self.sampling = pipeline, load, options.data, sampling
        self.model, self.run, self.accelerator = options.model.pretrained_model_name_or_path, run, accelerator
        self.validation_prompts = options.output.validation_prompt
        self.share = (accelerator.process_index, accelerator.num_processes)
        self.crop_config = crop_config_for(size_multiple(pipeline), options.data, sampling.resolution, options.optimisation.seed)
        cache = TensorCache(Path(options.data.cache_dir or run.path / CACHE))
        self.encoder = LatentEncoder(
            pipeline, cache, options.data.dataloader_num_workers, self.share, accelerator.wait_for_everyone
        )

    def encode(self, images: DatasetSplit) -> Encoded:
        """Encode the images and prompts."""
        report = replace(images.report, long_prompts=tuple(self._long_prompts([*images.train, *images.heldout])))
        for prompt in report.long_prompts:
            logger.warning(prompt.summary())
        record_report(report, self.sampling.resolution, self.run)
        self.run.begin(ENCODING)
        subject = self.encoder.encode(images.train, self.crop_config)
        central = CropConfig(self.crop_config.sizes, size_conditioning=self.crop_config.size_conditioning)
        return Encoded(subject, self.encoder.encode(images.heldout, central) if images.heldout else None)

    def _long_prompts(self, images: Sequence[TrainingImage]) -> list[LongPrompt]:
        """The prompts and captions that the model's tokenizers truncate."""
        data = self.options
        prompts = dict.fromkeys(self.validation_prompts, "validation prompt")
        if data.with_prior_preservation:
            classes = data.class_prompts()
            prompts |= dict.fromkeys(classes.values(), "class prompt")
        prompts |= dict.fromkeys(data.subject_prompts(), "instance prompt")
        captions = [(image.path, image.prompt) for image in images]
        return long_prompts((self.pipeline.tokenizer, self.pipeline.tokenizer_2), prompts, captions)

    def class_images(self, sizes: Collection[Size], count: int | None = None) -> CachedLatents | None:
        """Encode the class images after generating missing ones; None without prior preservation.

        Args:
            sizes: of the training images.
            count: images of each class, up to `num_class_images`; by default all.
        Raises: InputError if existing class images were generated from another prompt or model.
        """
        data = self.options
        if not data.with_prior_preservation:
            return None
        folder = Path(data.class_data_dir or self.run.path / CLASS_FOLDER)
        prompts = data.class_prompts()
        count = min(count or data.num_class_images, data.num_class_images)
        with without_adapters(self.pipeline):
            images = self._generated(ClassImages(folder, prompts, count, self.model, self.share))
            self.run.begin(ENCODING)
            used, crop_sizes = in_sizes(images, sorted(set(sizes)))
            return self.encoder.encode(used, self.crop_config, crop_sizes)

    def _generated(self, wanted: ClassImages) -> list[TrainingImage]:
        """The class images, after all processes together have generated the missing ones."""
        missing = wanted.missing()
        self.accelerator.wait_for_everyone()
        if missing:
            self.run.begin(CLASS_IMAGES)
            precision = self.options.prior_generation_precision
            pipeline = self.pipeline if precision is None else self.load(PRIOR_DTYPES[precision])
            make = partial(generate, pipeline, sampling=self.sampling, batch_size=self.options.sample_batch_size)
            settings = asdict(self.sampling) | {"sampler": type(pipeline.scheduler).__name__.removesuffix("Scheduler")}
            wanted.make(missing, make, settings)
        self.accelerator.wait_for_everyone()
        return wanted.images()


def record_report(report: ImageCheckReport, resolution: int, run: RunDirectory) -> None:
    """Write the image checks, now that the resolution is known, and log the report if some images are too small for it."""
    complete = report.for_resolution(resolution)
    if complete != report:
        logger.warning("Image checks for training at %d pixels:\n%s", resolution, complete.summary())
    if run.writes:
        ImageChecks.from_json(complete.to_dict()).write(run.path)


def crop_config_for(multiple: int, options: DataOptions, resolution: int, seed: int) -> CropConfig:
    """The crops of images.

    Args:
        multiple: the number of which the model needs the sides of images to be multiples.
    Raises: InputError if the sizes given do not fit the model.
    """
    sizes: tuple[Size, ...] = ((resolution, resolution),)
    if options.aspect_ratio_buckets is not None:
        text = options.aspect_ratio_buckets.strip()
        sizes = automatic_buckets(resolution, multiple) if text == AUTOMATIC else parse_buckets(text, multiple)
    crops = 0 if options.center_crop else options.crops_per_image
    return CropConfig(sizes, crops, options.random_flip, options.size_conditioning or "image", seed)
