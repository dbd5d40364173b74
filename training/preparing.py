"""What a subject's training needs before it can start: pictures examined, divided and encoded, those of the class made."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import StableDiffusionXLPipeline

from pipelines.cache import TensorCache
from pipelines.subject.buckets import AUTOMATIC, Size, automatic_buckets, parse_buckets, size_multiple
from pipelines.subject.captions import class_prompts, find_captioned
from pipelines.subject.data import Picture
from pipelines.subject.doctor import Report, examine
from pipelines.subject.encoding import EncodedPictures, Encoder, Framing
from pipelines.subject.evaluation import choose_heldout
from pipelines.subject.generate import Sampling, generate
from pipelines.subject.prior import ClassPictures, in_sizes
from training.folds import say_cost
from training.options import SubjectOptions
from training.options.data import DataOptions
from training.run import RunDirectory, write_text_atomically

PRIOR_DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CACHE, CLASS_PICTURES, PHOTOS = "cache", "class_pictures", "photos.json"
logger = get_logger(__name__)


@dataclass(frozen=True)
class Division:
    """The pictures to train on, those to measure on, and what the photo doctor found in all of them.

    Args:
        folds: places among `train` of those that are left out in turn, in short trainings before the real one.
    """

    train: list[Picture]
    heldout: list[Picture]
    report: Report
    folds: tuple[int, ...] = ()


def checked_pictures(options: DataOptions, seed: int) -> Division:
    """Find the pictures and have each examined, so that what is wrong is known before anything is loaded.

    Raises: InputError naming the folder or file, or a class prompt that is missing.
    """
    report = examine(options.instance_data_dir, options.resolution, options.dataloader_num_workers)
    captioned = find_captioned(options.instance_data_dir, options.instance_prompt)
    if options.with_prior_preservation:
        class_prompts(options.instance_data_dir, options.class_prompt)
    if any(diagnosis.findings for diagnosis in report.pictures) or report.findings:
        logger.warning("What the photo doctor found:\n%s", report.in_words())
    found = [picture for picture in captioned if picture.path in report.usable]
    names = [picture.path.relative_to(options.instance_data_dir).as_posix() for picture in found]
    chosen = choose_heldout(names, options.heldout_image, seed)
    if chosen.folds:
        say_cost(len(chosen.folds))
    train_on = [picture for place, picture in enumerate(found) if place != chosen.place]
    heldout = [] if chosen.place is None else [found[chosen.place]]
    return Division(train_on, heldout, report, chosen.folds)


@dataclass(frozen=True)
class Encoded:
    """The pictures as the UNet takes them: the subject's, those held out, and those of the class, where there are any."""

    subject: EncodedPictures
    heldout: EncodedPictures | None
    class_pictures: EncodedPictures | None

    def folds(self, places: tuple[int, ...]) -> Iterator[tuple[EncodedPictures, EncodedPictures]]:
        """For each of `places` all pictures of the subject but that one, and that one."""
        for place in places:
            rest = [other for other in range(len(self.subject)) if other != place]
            yield self.subject.only(rest), self.subject.only([place])


def prepare(
    pipeline: StableDiffusionXLPipeline,
    load: Callable[[torch.dtype], StableDiffusionXLPipeline],
    pictures: Division,
    options: SubjectOptions,
    sampling: Sampling,
    run: RunDirectory,
    accelerator: Accelerator,
) -> Encoded:
    """Make the class pictures that are missing, and encode all pictures and prompts, once for the whole training.

    Args:
        pipeline: the base model, before there is an adapter.
        load: loads it again in another precision.
        sampling: how class pictures are drawn; its resolution is also that of the training.
    Raises: InputError if sizes do not fit the model, or class pictures are of another prompt or model.
    """
    data, share = options.data, (accelerator.process_index, accelerator.num_processes)
    record_report(pictures.report, sampling.resolution, run)
    framing = framing_for(pipeline, data, sampling.resolution, options.optimisation.seed)
    others: list[Picture] = []
    if data.with_prior_preservation:
        folder = Path(data.class_data_dir or run.path / CLASS_PICTURES)
        prompts = class_prompts(data.instance_data_dir, data.class_prompt)
        model = options.model.pretrained_model_name_or_path
        # Three steps show what they need with as many as a batch holds; those are kept for the training itself.
        enough = options.optimisation.train_batch_size if options.output.dry_run else data.num_class_images
        wanted = ClassPictures(folder, prompts, min(enough, data.num_class_images), model, share)
        others = _class_pictures(wanted, pipeline, load, data, sampling, run, accelerator)
    run.update_status(phase="encoding")
    cache = TensorCache(Path(data.cache_dir or run.path / CACHE))
    encoder = Encoder(pipeline, cache, data.dataloader_num_workers, share, accelerator.wait_for_everyone)
    subject = encoder.encode(pictures.train, framing)
    central = Framing(framing.sizes, size_conditioning=framing.size_conditioning)
    heldout = encoder.encode(pictures.heldout, central) if pictures.heldout else None
    others, sizes = in_sizes(others, sorted(set(subject.sizes)))
    return Encoded(subject, heldout, encoder.encode(others, framing, sizes) if others else None)


def record_report(report: Report, resolution: int, run: RunDirectory) -> None:
    """Keep the photo doctor's report, now that the resolution is known, and say which pictures would be enlarged."""
    complete = report.for_resolution(resolution)
    if complete != report:
        logger.warning("What the photo doctor found for a training at %d pixels:\n%s", resolution, complete.in_words())
    if run.writes:
        write_text_atomically(run.path / PHOTOS, json.dumps(complete.to_dict(), indent=2) + "\n")


def framing_for(pipeline: StableDiffusionXLPipeline, options: DataOptions, resolution: int, seed: int) -> Framing:
    """How pictures are brought to size.

    Raises: InputError if the sizes given do not fit the model.
    """
    sizes: tuple[Size, ...] = ((resolution, resolution),)
    if options.aspect_ratio_buckets == AUTOMATIC:
        sizes = automatic_buckets(resolution, size_multiple(pipeline))
    elif options.aspect_ratio_buckets is not None:
        sizes = parse_buckets(options.aspect_ratio_buckets, size_multiple(pipeline))
    crops = 0 if options.center_crop else options.crops_per_picture
    return Framing(sizes, crops, options.random_flip, options.size_conditioning or "picture", seed)


def _class_pictures(
    wanted: ClassPictures,
    pipeline: StableDiffusionXLPipeline,
    load: Callable[[torch.dtype], StableDiffusionXLPipeline],
    options: DataOptions,
    sampling: Sampling,
    run: RunDirectory,
    accelerator: Accelerator,
) -> list[Picture]:
    """The class pictures; those that are missing are made first, by all processes together."""
    missing = wanted.missing()
    accelerator.wait_for_everyone()
    if missing:
        run.update_status(phase="drawing class pictures")
        precision = options.prior_generation_precision
        drawing = pipeline if precision is None else load(PRIOR_DTYPES[precision])
        draw = partial(generate, drawing, sampling=sampling, batch_size=options.sample_batch_size)
        settings = asdict(sampling) | {"sampler": type(drawing.scheduler).__name__.removesuffix("Scheduler")}
        wanted.make(missing, draw, settings)
    accelerator.wait_for_everyone()
    return wanted.found()
