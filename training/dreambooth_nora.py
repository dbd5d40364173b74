"""Train an adapter of SDXL on a handful of pictures of one subject.

    accelerate launch training/dreambooth_nora.py
    accelerate launch training/dreambooth_nora.py --instance_data_dir PICTURES --instance_prompt "a photo of sks dog"

Everything it makes goes into one run directory: pictures before and after, metrics, checkpoints, and the adapter in its own
format, for diffusers, and for A1111, ComfyUI and sd-scripts.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list
from diffusers import StableDiffusionXLPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image

from pipelines.errors import InputError
from pipelines.methods import method_named
from pipelines.subject import adapters
from pipelines.subject.base_model import load_base_model, model_resolution
from pipelines.subject.batches import EncodedPictures, SubjectBatches, encode_examples
from pipelines.subject.calibration import runs_on_subject
from pipelines.subject.captions import find_captioned
from pipelines.subject.data import Example, Picture, load_examples
from pipelines.subject.doctor import Report, examine
from pipelines.subject.evaluation import choose_heldout
from pipelines.subject.generate import Sampling, generate
from pipelines.subject.loss import DenoisingLoss, TrainingBatches
from pipelines.subject.optimizers import Adam, Rates, averaged, optimised, parameter_groups
from training.checkpoints import newest_step
from training.finishing import Trained, finish
from training.folds import leave_one_out, say_cost
from training.loop import LoopOptions, Periodic, Trainable, train
from training.options import SubjectOptions, parse_options
from training.options.data import DataOptions
from training.options.output import LATEST
from training.provenance import write_provenance
from training.resuming import check_can_resume
from training.run import RunDirectory, write_text_atomically
from training.stopping import exit_codes
from training.tracking import start_tracker
from training.watching import Watch

PHOTOS = "photos.json"
logger = get_logger(__name__)
WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def main(options: SubjectOptions) -> RunDirectory:
    """Load, attach, train, export; returns the run's directory.

    Raises: InputError where something given cannot be used, before any long work starts.
    """
    began = time.monotonic()
    # Text encoders that are trained no more are parameters that no gradient reaches.
    ddp = DistributedDataParallelKwargs(find_unused_parameters=options.optimisation.stop_text_encoder_training is not None)
    accelerator = Accelerator(mixed_precision=options.model.mixed_precision, kwargs_handlers=[ddp])
    pictures = checked_pictures(options.data, options.optimisation.seed)
    run = open_run(options, accelerator)
    if run.writes:
        write_text_atomically(run.path / PHOTOS, json.dumps(pictures.report.to_dict(), indent=2) + "\n")
    with run.recording():
        run.update_status(phase="loading")
        model, dtype = options.model, WEIGHT_DTYPES[accelerator.mixed_precision]
        pipeline = load_base_model(model.pretrained_model_name_or_path, dtype, accelerator.device, model.variant)
        resolution = options.data.resolution or model_resolution(pipeline)
        examples, heldout_examples = (
            load_examples([picture.path for picture in part], resolution, options.data.size_conditioning)
            for part in (pictures.train, pictures.heldout)
        )
        subject = encode(pipeline, examples, pictures.train, options)
        heldout = encode(pipeline, heldout_examples, pictures.heldout, options)
        draw = sampler(pipeline, options, resolution)
        before = draw()

        run.update_status(phase="calibrating")
        components = adapters.attach(pipeline, options.adapter)
        loss = DenoisingLoss(pipeline, options.optimisation.snr_gamma, options.optimisation.do_edm_style_training)
        runs, seed = runs_on_subject(loss, subject, options.optimisation.seed), options.optimisation.seed
        adapters.start(options.adapter, components, runs, run.path / "calibration", seed)

        write_provenance(run, options, pipeline, *([p.path for p in part] for part in (pictures.train, pictures.heldout)))
        if pictures.folds:
            folds = (tuple(encode(pipeline, *part, options) for part in fold) for fold in pictures.each(examples))
            prepare = partial(to_train, loss, options=options, processes=accelerator.num_processes)
            every = options.judging.measured_every(options.optimisation.max_train_steps)
            leave_one_out(accelerator, run, loss, folds, prepare, loop_options(options), every)

        run.update_status(phase="training", step=0, total=options.optimisation.max_train_steps)
        trainable = to_train(loss, subject, options, accelerator.num_processes)
        watch = Watch(run, loss, subject, heldout, draw, options.output.validation_prompt, options.adapter, components)
        watch.begin()
        train(accelerator, run, trainable, loop_options(options), watched(watch, trainable, options))
        if trainable.ema is not None:
            trainable.ema.copy_to(optimised(trainable.optimizer))

        if accelerator.is_main_process:
            shown = pictures_of(examples[: len(before)])
            trained = Trained(pipeline, components, draw, shown, before, resolution, len(examples), began)
            finish(run, trained, options)
        accelerator.wait_for_everyone()
    return run


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

    def each(self, examples: list[Example]) -> Iterator[tuple[tuple[list[Example], list[Picture]], ...]]:
        """For each fold what is trained on, and what is left out: examples, and pictures, of `examples` as `train` has them."""
        for place in self.folds:
            rest = [other for other in range(len(examples)) if other != place]
            yield tuple(([examples[at] for at in part], [self.train[at] for at in part]) for part in (rest, [place]))


def checked_pictures(options: DataOptions, seed: int) -> Division:
    """Find the pictures and have each examined, so that what is wrong is known before anything is loaded.

    Raises: InputError naming the folder or file.
    """
    report = examine(options.instance_data_dir, options.resolution, options.dataloader_num_workers)
    captioned = find_captioned(options.instance_data_dir, options.instance_prompt)
    if any(diagnosis.findings for diagnosis in report.pictures) or report.findings:
        logger.warning("What the photo doctor found:\n%s", report.in_words())
    found = [picture for picture in captioned if picture.path in report.usable]
    chosen = choose_heldout([picture.path.name for picture in found], options.heldout_image, seed)
    if chosen.folds:
        say_cost(len(chosen.folds))
    train_on = [picture for place, picture in enumerate(found) if place != chosen.place]
    heldout = [] if chosen.place is None else [found[chosen.place]]
    return Division(train_on, heldout, report, chosen.folds)


def open_run(options: SubjectOptions, accelerator: Accelerator) -> RunDirectory:
    """The run's directory: the one given, or a new one that all processes agree on.

    Raises: InputError if it holds another run, or one with other options.
    """
    subject = Path(options.data.instance_data_dir).resolve().name
    fresh = Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{subject}-{options.adapter.method}"
    path = Path(broadcast_object_list([options.output.output_dir or str(fresh)])[0])
    options.output.output_dir = str(path)
    if options.output.resume_from_checkpoint == LATEST:
        check_can_resume(path, options.to_dict(), accelerator.num_processes)
    elif (path / "options.json").exists():
        raise InputError(f"{str(path)!r} holds a run. Give another --output_dir, or go on with --resume_from_checkpoint latest.")
    accelerator.wait_for_everyone()
    run = RunDirectory.create(path, options.to_dict(), accelerator.is_main_process)
    if run.writes:
        write_text_atomically(path / "command", shlex.join(["accelerate", "launch", *sys.argv]) + "\n")
        run.update_status(processes=accelerator.num_processes)
    run.trackers.extend(start_tracker(options.output.report_to, path, newest_step(run.checkpoints), run.writes))
    return run


def encode(
    pipeline: StableDiffusionXLPipeline, examples: list[Example], pictures: list[Picture], options: SubjectOptions
) -> EncodedPictures | None:
    """The examples with their prompts, encoded once for the whole training; None where there are none."""
    if not examples:
        return None
    prompts = [picture.prompt for picture in pictures]
    return encode_examples(pipeline, examples, prompts, options.data.random_flip)


def sampler(pipeline: StableDiffusionXLPipeline, options: SubjectOptions, resolution: int) -> Callable[[], list[Image.Image]]:
    """A function that draws the validation prompts, from the same noise each time."""
    prompts = options.output.validation_prompt
    seeds = range(options.optimisation.seed, options.optimisation.seed + len(prompts))

    def draw() -> list[Image.Image]:
        for component in (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2):
            component.eval()
        with torch.no_grad():
            return list(generate(pipeline, prompts, seeds, Sampling(resolution=resolution)))

    return draw


def to_train(loss: DenoisingLoss, subject: EncodedPictures, options: SubjectOptions, processes: int) -> Trainable:
    """The loss, its batches, the optimiser over the adapter's parameters, its schedule, and their moving average."""
    how, method = options.optimisation, method_named(options.adapter.method)
    if options.model.gradient_checkpointing:
        loss.unet.enable_gradient_checkpointing()
    size = how.train_batch_size * processes
    batches = SubjectBatches(subject, options.adapter.train_text_encoder, size, loss.num_timesteps, how.seed)
    batches = TrainingBatches(batches, how.seed, how.noise_offset, how.text_encoder_batches)
    rates = Rates(how.learning_rate, how.text_encoder_lr, how.lora_plus_ratio, method.b_like)
    betas, kind = (how.adam_beta1, how.adam_beta2), how.optimizer.lower()
    adam = Adam(kind, how.use_8bit_adam, betas, how.adam_epsilon, how.adam_weight_decay)
    optimizer = adam.optimizer(parameter_groups(loss, rates))
    schedule = get_scheduler(
        how.lr_scheduler,
        optimizer,
        num_warmup_steps=how.lr_warmup_steps,
        num_training_steps=how.max_train_steps,
        num_cycles=how.lr_num_cycles,
        power=how.lr_power,
    )
    ema = EMAModel(optimised(optimizer), decay=how.ema_decay) if how.use_ema else None
    return Trainable(loss, batches, optimizer, schedule, ema)


def watched(watch: Watch, trainable: Trainable, options: SubjectOptions) -> list[Periodic]:
    """What is done now and then, with the moving average of the trained parameters where there is one."""

    def with_average(action: Callable[[int], float | None]) -> Callable[[int], float | None]:
        def act(step: int) -> float | None:
            with averaged(trainable.ema, trainable.optimizer):
                return action(step)

        return act

    every = options.judging.measured_every(options.optimisation.max_train_steps)
    return [Periodic(every, with_average(watch.measure)), Periodic(options.output.validation_steps, with_average(watch.show))]


def loop_options(options: SubjectOptions) -> LoopOptions:
    """What of the options the loop needs."""
    how, out = options.optimisation, options.output
    return LoopOptions(
        max_train_steps=how.max_train_steps,
        seed=how.seed,
        gradient_accumulation_steps=how.gradient_accumulation_steps,
        max_grad_norm=how.max_grad_norm,
        checkpointing_steps=out.checkpointing_steps,
        checkpoints_total_limit=out.checkpoints_total_limit,
        dataloader_num_workers=options.data.dataloader_num_workers,
    )


def pictures_of(examples: list[Example]) -> list[Image.Image]:
    """The training pictures as the model sees them."""
    return [Image.fromarray(((example.pixels.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()) for example in examples]


if __name__ == "__main__":
    with exit_codes():
        main(parse_options(description=__doc__))
