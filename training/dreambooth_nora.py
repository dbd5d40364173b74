"""Train an adapter of SDXL on a handful of images of one subject.

    accelerate launch training/dreambooth_nora.py
    accelerate launch training/dreambooth_nora.py --instance_data_dir PHOTOS --instance_prompt "a photo of sks dog"

All output goes into one run directory: images before and after training, metrics, checkpoints, and the adapter in PEFT's format,
for diffusers, and for A1111, ComfyUI and sd-scripts.
"""

from __future__ import annotations

import gc

# First: it filters warnings that libraries emit while they are imported.
import pipelines  # noqa: F401

# isort: split
from training.engine.console import configure_logging
from training.engine.stopping import exit_codes
from training.options import SubjectOptions, parse_options

if __name__ == "__main__":
    # Imports make a million objects that live to the end. Searching them for garbage takes a fifth of the start.
    gc.disable()
    # Before the slow imports of model libraries, so that --help and wrong flags are answered at once.
    with configure_logging(), exit_codes():
        given_options = parse_options(description=__doc__)

# isort: split
import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image

from nora_vision import sdxl_calibration
from pipelines.export_error import expected_left_out, has_lycoris_form, left_out_sentence
from pipelines.optimizers import OptimizerSettings, Rates, parameter_groups, trainable_parameters
from pipelines.prompt_syntax import training_warnings
from pipelines.quantization import CALIBRATION, UNQUANTIZED, compute_dtype, summary
from pipelines.subject import adapters
from pipelines.subject.base_model import load_base_model, model_resolution, quantization_errors
from pipelines.subject.batches import SubjectBatches
from pipelines.subject.calibration import runs_on_subject
from pipelines.subject.data import load_examples
from pipelines.subject.encoding import CachedLatents
from pipelines.subject.generate import Sampling
from pipelines.subject.loss import DenoisingLoss, TrainingBatches
from pipelines.subject.mismatch import check_prediction_type
from pipelines.subject.scores import create_image_scorer
from training.engine.dry_run import PeakMemory, run_dry_run
from training.engine.loop import LoopOptions, Periodic, Trainable, train, training_losses
from training.engine.memory_fallback import with_memory_fallback
from training.engine.opening import check_outputs, open_run
from training.engine.sharding import check_can_shard, summon_full_params
from training.options.optimisation import OptimisationOptions
from training.runs.provenance import file_records, model_identity, write_provenance
from training.runs.run import RunDirectory
from training.runs.run_files import CALIBRATING, LOADING, SAMPLING, TRAINING, DryRunReport
from training.subject import plan
from training.subject.cross_validation import leave_one_out
from training.subject.finishing import Trained, finish
from training.subject.preparing import DatasetSplit, Preparation, checked_images
from training.subject.publishing import check_can_push
from training.subject.samples import ValidationSampler, save_subject
from training.subject.validation import ValidationCallback

DISPLAYED_IMAGES = 8
# As a script its __name__ is __main__.
logger = get_logger("training.dreambooth_nora")
WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def main(options: SubjectOptions) -> RunDirectory:
    """Load the base model, attach the adapter, train it and export it; returns the run's directory.

    Raises: InputError for wrong input, before any long work starts.
    """
    began = time.monotonic()
    accelerator = accelerator_for(options)
    images = checked(options, accelerator)
    subject = Path(options.data.instance_data_dir).resolve().name
    run = open_run(options, f"{subject}-{options.adapter.method}", accelerator)
    with run.recording():
        training = SubjectTraining(accelerator, run, options, images)
        try:
            before = [] if options.output.dry_run else training.sample_base_model()
            training.attach()
            training.dry_run()
            if options.output.dry_run:
                return run
            training.start()
        finally:
            training.discard_unquantized()
        training.add_class_images()
        training.record_provenance()
        training.cross_validate()
        validation = training.start_validation(before)
        training.train(validation)
        with summon_full_params(training.loss):
            training.method.round_trained()
            if accelerator.is_main_process:
                finish(run, training.result(validation, before, began), options)
        accelerator.wait_for_everyone()
    return run


def accelerator_for(options: SubjectOptions) -> Accelerator:
    """The accelerator, as accelerate was configured."""
    # Text encoders whose training has stopped get no gradients.
    ddp = DistributedDataParallelKwargs(find_unused_parameters=options.optimisation.stop_text_encoder_training is not None)
    return Accelerator(mixed_precision=options.model.mixed_precision, kwargs_handlers=[ddp])


def checked(options: SubjectOptions, accelerator: Accelerator) -> DatasetSplit:
    """The images, after all checks that do not need the model.

    Raises: InputError naming the option or file that cannot be used.
    """
    optimisation, method = options.optimisation, options.adapter.create()
    check_can_shard(accelerator, optimisation.optimizer, optimisation.use_8bit_adam, [method])
    check_outputs(options)
    check_can_push(options.validation)
    images = checked_images(options.data, optimisation.seed)
    prompts = options.prompts(image.prompt for image in (*images.train, *images.heldout))
    inexact = [] if method.exports_exactly else [method.export_note]
    for sentence in (*training_warnings(prompts), *options.unused(), *inexact):
        logger.warning(sentence)
    return images


class SubjectTraining:
    """The steps of the recipe, in order. The constructor loads the base model and encodes the images."""

    def __init__(self, accelerator: Accelerator, run: RunDirectory, options: SubjectOptions, images: DatasetSplit) -> None:
        self.accelerator, self.run, self.options, self.images = accelerator, run, options, images
        model, self.seed = options.model, options.optimisation.seed
        self._plan()
        run.begin(LOADING)
        load = partial(load_base_model, model.pretrained_model_name_or_path, device=accelerator.device, **model.source)
        dtype, self.unquantized = WEIGHT_DTYPES[accelerator.mixed_precision], unquantized_folder(run, options, accelerator)
        self.pipeline = load(dtype, unquantized=self.unquantized)
        if errors := quantization_errors(self.pipeline):
            logger.info(summary(model.quantize, compute_dtype(dtype, accelerator.device), errors))
            run.update_status(quantization_errors=errors)
        self.resolution = options.data.resolution or model_resolution(self.pipeline)
        run.update_status(resolution=self.resolution)
        sampling = Sampling(resolution=self.resolution)
        self.preparation = Preparation(self.pipeline, load, options, sampling, run, accelerator)
        self.encoded = self.preparation.encode(images)
        check_prediction_type(self.pipeline, self.encoded.subject, self.seed)
        # Enough for the dry run; the other class images are generated after it.
        self.batch_size = options.optimisation.train_batch_size
        self.class_images = self.preparation.class_images(self.encoded.subject.sizes, self.batch_size)
        name = model.pretrained_model_name_or_path
        self.sampler = ValidationSampler(
            self.pipeline, options.output.validation_prompt, self.seed, sampling, name, self.batch_size
        )
        paths = [image.path for image in images.train[:DISPLAYED_IMAGES]]
        self.displayed = [example.image() for example in load_examples(paths, self.resolution)]

    def _plan(self) -> None:
        """Plan the phases, with the pace of an earlier run until the dry run measures this one's."""
        progress, options = self.run.progress, self.options
        self.run.plan(plan.phases(options, len(self.images.folds)))
        pace = plan.expected_pace(self.run.path.parent, options.model.pretrained_model_name_or_path)
        # An earlier session of a resumed run has done a part of it that is not known here.
        if pace is not None and progress.share is None and not options.output.dry_run:
            progress.estimate(plan.estimated_seconds(options, pace))

    def sample_base_model(self) -> list[Image.Image]:
        """Generate the base model's samples; they and some training images are saved at once, unless they were before."""
        if self.run.writes and not self.run.subject.exists():
            save_subject(self.run, self.displayed)
        if not self.options.output.validation_images:
            return []
        self.run.begin(SAMPLING)
        before = self.sampler.generate()
        if self.run.writes and not self.run.samples_at(0).exists():
            self.sampler.save(self.run, 0, before)
        return before

    def attach(self) -> None:
        """Add the adapter."""
        optimisation = self.options.optimisation
        self.components = adapters.attach(self.pipeline, self.options.adapter, self.seed)
        self.loss = DenoisingLoss(self.pipeline, optimisation.snr_gamma, optimisation.do_edm_style_training)
        self.peak, self.started = PeakMemory(self.accelerator.device), False

    def dry_run(self) -> None:
        """Measure some steps and restore everything; before the adapter is initialised, where the method allows that.

        Raises: DoesNotFitError if the training does not fit.
        """
        # The first step under FSDP shards the weights, from which the adapter is initialised.
        sharded = self.accelerator.distributed_type == DistributedType.FSDP
        if sharded or not adapters.prepare_dry_run(self.options.adapter, self.components):
            self.start()
        trainable = self._trainable(self.encoded.subject, self.class_images)
        limit = self.options.output.memory_limit_gb
        run_dry_run(self.accelerator, self.run, trainable, loop_options(self.options), limit, self.peak)
        if (report := DryRunReport.read(self.run.path)) is not None and not self.options.output.dry_run:
            pace = plan.Pace.of(report, self.options.to_dict(), self.run.progress.measured)
            self.run.progress.estimate(plan.estimated_seconds(self.options, pace))

    def start(self) -> None:
        """Initialise the adapter from the base model and the subject, unless this is done."""
        if self.started:
            return
        self.started = True
        self.run.begin(CALIBRATING)
        accelerator, subject, adapter = self.accelerator, self.encoded.subject, self.options.adapter
        share = (accelerator.process_index, accelerator.num_processes)
        # A dry run leaves training mode on.
        runs = runs_on_subject(self.loss.eval(), subject, self.seed, *share, self.batch_size)
        batches = self._batches(subject, None)
        losses = partial(training_losses, self.loss, batches, accelerator, per_epoch=batches.batches.per_epoch)
        cache, fixed = self.run.path / CALIBRATION, sdxl_calibration(self.pipeline)
        adapters.start(adapter, self.components, runs, cache, self.seed, losses, fixed, self.unquantized)
        if left_out := expected_left_out(self.components):
            logger.warning(left_out_sentence(left_out, has_lycoris_form(self.components)))
            self.run.update_status(expected_left_out=left_out)
        self.discard_unquantized()

    def discard_unquantized(self) -> None:
        """Delete the weights before quantisation, which only the initialisation of the adapter reads."""
        if self.unquantized is not None:
            shutil.rmtree(self.unquantized)
            self.unquantized = None

    def add_class_images(self) -> None:
        """Generate the missing class images, for prior preservation, and encode all of them."""
        with summon_full_params(self.loss):
            self.class_images = self.preparation.class_images(self.encoded.subject.sizes)

    def record_provenance(self) -> None:
        """Write provenance.json; see `write_provenance`."""
        options, split = self.options, {"images": self.images.train, "heldout": self.images.heldout}
        self.base_model = model_identity(options.model.pretrained_model_name_or_path, self.pipeline)
        files = {name: file_records(image.path for image in images) for name, images in split.items()}
        write_provenance(self.run, options.to_dict(), self.base_model, self.pipeline.device, files, seed=self.seed)

    def cross_validate(self) -> None:
        """Cross-validate if there are too few images to hold one out."""
        if self.images.folds:
            folds = tuple(self.encoded.folds(self.images.folds))
            steps = self.options.optimisation.max_train_steps
            on = partial(self._trainable, class_images=self.class_images, steps=plan.fold_steps(steps))
            every = self.options.validation.measured_every(steps)
            leave_one_out(self.accelerator, self.run, self.loss, folds, on, loop_options(self.options), every, self.batch_size)

    def start_validation(self, before: Sequence[Image.Image]) -> ValidationCallback:
        """The validation during training, whose scores start with the samples `before` of the base model, if there are any."""
        self.run.begin(TRAINING)
        with summon_full_params(self.loss):
            model = self.options.validation.image_scorer
            scorer = None
            if self.run.writes and (before or self.options.validation.evaluate):
                scorer = create_image_scorer(model, self.pipeline, self.displayed, before, self.resolution, self.batch_size)
            subject, heldout = self.encoded.subject, self.encoded.heldout
            validation = ValidationCallback(
                self.run, self.loss, subject, heldout, self.sampler, self.components, scorer, self.batch_size
            )
            validation.begin(before)
        return validation

    def train(self, validation: ValidationCallback) -> None:
        """Train to the end; the adapter then holds its moving average if there is one."""
        trainable = self._trainable(self.encoded.subject, self.class_images)
        every = self.options.validation.measured_every(self.options.optimisation.max_train_steps)
        actions = [Periodic(every, validation.measure)]
        if self.options.output.validation_images:
            actions.append(Periodic(self.options.output.validation_steps, validation.show, validation.sample))
        train(self.accelerator, self.run, trainable, loop_options(self.options), actions)
        self.run.update_status(peak_memory=self.peak.read())
        if trainable.ema is not None:
            trainable.ema.copy_to(trainable_parameters(trainable.optimizer))
        self.method = trainable.method

    def result(self, validation: ValidationCallback, before: Sequence[Image.Image], began: float) -> Trained:
        """The trained pipeline, for export and certification."""
        return Trained(
            self.pipeline,
            self.components,
            self.sampler,
            validation.scorer,
            self.displayed,
            before,
            self.images,
            self.base_model,
            began,
        )

    def _batches(self, subject: CachedLatents, class_images: CachedLatents | None) -> TrainingBatches:
        optimisation, data = self.options.optimisation, self.options.data
        size, with_tokens = self.batch_size * self.accelerator.num_processes, self.options.adapter.train_text_encoder
        weight, num_timesteps = data.prior_loss_weight, self.loss.num_timesteps
        batches = SubjectBatches(subject, with_tokens, size, num_timesteps, optimisation.seed, class_images, weight)
        return TrainingBatches(batches, optimisation.seed, optimisation.noise_offset, optimisation.text_encoder_batches)

    def _trainable(self, subject: CachedLatents, class_images: CachedLatents | None, steps: int | None = None) -> Trainable:
        """The loss, its batches, the optimiser over the adapter's parameters, its schedule, and their moving average.

        Args:
            steps: of this training; by default `max_train_steps`.
        """
        optimisation, method = self.options.optimisation, self.options.adapter.create()
        if self.options.model.gradient_checkpointing:
            self.loss.unet.enable_gradient_checkpointing()
        rates = Rates(optimisation.learning_rate, tuple(optimisation.text_encoder_lr or ()), method.learning_rate_factor)
        optimizer = optimizer_settings(optimisation, self.options.model.quantize).optimizer(parameter_groups(self.loss, rates))
        schedule = get_scheduler(
            optimisation.lr_scheduler,
            optimizer,
            num_warmup_steps=optimisation.lr_warmup_steps,
            num_training_steps=optimisation.max_train_steps,
            num_cycles=optimisation.lr_num_cycles,
            power=optimisation.lr_power,
        )
        ema = EMAModel(trainable_parameters(optimizer), decay=optimisation.ema_decay) if optimisation.use_ema else None
        hooks = method.training(list(self.components.values()), steps or optimisation.max_train_steps)
        return Trainable(self.loss, self._batches(subject, class_images), optimizer, schedule, ema, hooks)


def unquantized_folder(run: RunDirectory, options: SubjectOptions, accelerator: Accelerator) -> Path | None:
    """This process's folder for the weights before quantisation until the method has read them; None if it does not."""
    if options.model.quantize is None or not options.adapter.create().uses_unquantized_weights:
        return None
    return run.path / CALIBRATION / f"{UNQUANTIZED}-{accelerator.process_index}"


def optimizer_settings(optimisation: OptimisationOptions, quantize: str | None = None) -> OptimizerSettings:
    """The settings of the optimiser, which is paged for a quantised base model."""
    return OptimizerSettings(
        optimisation.optimizer,
        optimisation.use_8bit_adam,
        quantize is not None,
        (optimisation.adam_beta1, optimisation.adam_beta2),
        optimisation.adam_epsilon,
        optimisation.adam_weight_decay,
    )


def loop_options(options: SubjectOptions) -> LoopOptions:
    """The options of the training loop."""
    optimisation, out = options.optimisation, options.output
    return LoopOptions(
        max_train_steps=optimisation.max_train_steps,
        seed=optimisation.seed,
        gradient_accumulation_steps=optimisation.gradient_accumulation_steps,
        max_grad_norm=optimisation.max_grad_norm,
        checkpointing_steps=out.checkpointing_steps,
        checkpoints_total_limit=out.checkpoints_total_limit,
        dataloader_num_workers=options.data.dataloader_num_workers,
    )


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    with configure_logging(), exit_codes():
        with_memory_fallback(main, given_options, "training.dreambooth_nora")
