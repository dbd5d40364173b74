"""Train an adapter of SDXL on a handful of pictures of one subject.

    accelerate launch training/dreambooth_nora.py
    accelerate launch training/dreambooth_nora.py --instance_data_dir PICTURES --instance_prompt "a photo of sks dog"

Everything it makes goes into one run directory: pictures before and after, metrics, checkpoints, and the adapter in its own
format, for diffusers, and for A1111, ComfyUI and sd-scripts.
"""

from __future__ import annotations

# First: it leaves out warnings that libraries give while they are imported.
import pipelines  # noqa: F401

# isort: split
import time
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedDataParallelKwargs
from diffusers import StableDiffusionXLPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image

from pipelines.methods import method_named
from pipelines.optimizers import Adam, Rates, optimised, parameter_groups
from pipelines.prompt_syntax import training_warnings
from pipelines.subject import adapters
from pipelines.subject.base_model import load_base_model, model_resolution
from pipelines.subject.batches import SubjectBatches
from pipelines.subject.calibration import runs_on_subject
from pipelines.subject.data import Example, load_examples
from pipelines.subject.encoding import EncodedPictures
from pipelines.subject.generate import Sampling
from pipelines.subject.loss import DenoisingLoss, TrainingBatches
from pipelines.subject.mismatch import check_prediction_type
from pipelines.subject.scores import judge_by
from training.engine.console import speaking
from training.engine.dry_run import PeakMemory, rehearse_first
from training.engine.ladder import with_ladder
from training.engine.loop import LoopOptions, Periodic, Trainable, train
from training.engine.opening import check_outputs, open_run
from training.engine.sharding import check_can_shard, whole
from training.engine.stopping import exit_codes
from training.options import SubjectOptions, parse_options
from training.runs.provenance import file_records, model_identity, write_provenance
from training.runs.run import RunDirectory
from training.subject.finishing import Trained, finish
from training.subject.folds import leave_one_out
from training.subject.preparing import Division, Preparation, checked_pictures
from training.subject.publishing import check_can_push
from training.subject.samples import Sampler
from training.subject.watching import Watch

SHOWN_PICTURES = 8
# Its own name where it is run is __main__.
logger = get_logger("training.dreambooth_nora")
WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def main(options: SubjectOptions) -> RunDirectory:
    """Load, attach, train, export; returns the run's directory.

    Raises: InputError where something given cannot be used, before any long work starts.
    """
    began = time.monotonic()
    # Text encoders that are trained no more are parameters that no gradient reaches.
    ddp = DistributedDataParallelKwargs(find_unused_parameters=options.optimisation.stop_text_encoder_training is not None)
    accelerator = Accelerator(mixed_precision=options.model.mixed_precision, kwargs_handlers=[ddp])
    check_can_shard(accelerator, options.optimisation.optimizer, options.optimisation.use_8bit_adam)
    check_outputs(options)
    check_can_push(options.judging)
    pictures = checked_pictures(options.data, options.optimisation.seed)
    for sentence in training_warnings(options.prompts(picture.prompt for picture in (*pictures.train, *pictures.heldout))):
        logger.warning(sentence)
    subject = Path(options.data.instance_data_dir).resolve().name
    run = open_run(options, f"{subject}-{options.adapter.method}", accelerator)
    with run.recording():
        run.update_status(phase="loading")
        model, dtype = options.model, WEIGHT_DTYPES[accelerator.mixed_precision]
        load = partial(load_base_model, model.pretrained_model_name_or_path, device=accelerator.device, **model.source)
        pipeline = load(dtype)
        seed = options.optimisation.seed
        resolution = options.data.resolution or model_resolution(pipeline)
        run.update_status(resolution=resolution)
        preparation = Preparation(pipeline, load, options, Sampling(resolution=resolution), run, accelerator)
        encoded = preparation.encode(pictures)
        subject = encoded.subject
        check_prediction_type(pipeline, subject, seed)
        # As many as one batch holds: whether the training fits is told before the others are drawn.
        batch_size = options.optimisation.train_batch_size
        few = preparation.class_pictures(subject.sizes, batch_size)
        prompts = options.output.validation_prompt
        sampling, name = Sampling(resolution=resolution), model.pretrained_model_name_or_path
        sampler = Sampler(pipeline, prompts, seed, sampling, name, batch_size)
        before = [] if options.output.dry_run else sampler.draw()

        run.update_status(phase="calibrating")
        components = adapters.attach(pipeline, options.adapter)
        loss = DenoisingLoss(pipeline, options.optimisation.snr_gamma, options.optimisation.do_edm_style_training)
        peak, share = PeakMemory(accelerator.device), (accelerator.process_index, accelerator.num_processes)
        runs = runs_on_subject(loss, subject, seed, *share, batch_size)
        adapters.start(options.adapter, components, runs, run.path / "calibration", seed)

        learning = partial(to_train, loss, options=options, processes=accelerator.num_processes)
        rehearse_first(accelerator, run, learning(subject, few), loop_options(options), options.output.memory_limit_gb, peak)
        if options.output.dry_run:
            return run

        with whole(loss):
            class_pictures = preparation.class_pictures(subject.sizes)
        record_provenance(run, options, pipeline, pictures)
        if pictures.folds:
            folds = encoded.folds(pictures.folds)
            on = partial(learning, class_pictures=class_pictures)
            every = options.judging.measured_every(options.optimisation.max_train_steps)
            leave_one_out(accelerator, run, loss, folds, on, loop_options(options), every, batch_size)

        trainable = learning(subject, class_pictures)
        run.update_status(phase="training", step=0, total=options.optimisation.max_train_steps)
        shown = pictures_of(load_examples([picture.path for picture in pictures.train[:SHOWN_PICTURES]], resolution))
        with whole(loss):
            judging = partial(judge_by, options.judging.judge_model, pipeline, shown, before, resolution, batch_size)
            judge = judging() if run.writes else None
            watch = Watch(run, loss, subject, encoded.heldout, sampler, options.adapter, components, judge, batch_size)
            watch.begin(before, shown)
        train(accelerator, run, trainable, loop_options(options), watched(watch, options))
        if trainable.ema is not None:
            trainable.ema.copy_to(optimised(trainable.optimizer))

        with whole(loss):
            if accelerator.is_main_process:
                trained = Trained(pipeline, components, sampler, judge, shown, before, resolution, len(subject), began)
                finish(run, trained, options)
        accelerator.wait_for_everyone()
    return run


def record_provenance(
    run: RunDirectory, options: SubjectOptions, pipeline: StableDiffusionXLPipeline, pictures: Division
) -> None:
    """Write down what the run is made of; see `write_provenance`."""
    write_provenance(
        run,
        options.to_dict(),
        model_identity(options.model.pretrained_model_name_or_path, pipeline),
        pipeline.device,
        {"pictures": file_records(p.path for p in pictures.train), "heldout": file_records(p.path for p in pictures.heldout)},
        seed=options.optimisation.seed,
    )


def to_train(
    loss: DenoisingLoss,
    subject: EncodedPictures,
    class_pictures: EncodedPictures | None,
    options: SubjectOptions,
    processes: int,
) -> Trainable:
    """The loss, its batches, the optimiser over the adapter's parameters, its schedule, and their moving average."""
    how, method = options.optimisation, method_named(options.adapter.method)
    if options.model.gradient_checkpointing:
        loss.unet.enable_gradient_checkpointing()
    size = how.train_batch_size * processes
    batches = SubjectBatches(
        subject,
        options.adapter.train_text_encoder,
        size,
        loss.num_timesteps,
        how.seed,
        class_pictures,
        options.data.prior_loss_weight,
    )
    batches = TrainingBatches(batches, how.seed, how.noise_offset, how.text_encoder_batches)
    rates = Rates(how.learning_rate, tuple(how.text_encoder_lr or ()), how.lora_plus_ratio, method.b_like)
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


def watched(watch: Watch, options: SubjectOptions) -> list[Periodic]:
    """What is done now and then."""
    every = options.judging.measured_every(options.optimisation.max_train_steps)
    return [Periodic(every, watch.measure), Periodic(options.output.validation_steps, watch.show, watch.sample)]


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
    with speaking(), exit_codes():
        with_ladder(main, parse_options(description=__doc__), "training.dreambooth_nora")
