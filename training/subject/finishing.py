"""The steps after training: export, recommendation, certificate, images side by side, model card."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from torch import nn

from pipelines.adapter_method import ADAPTER_NAME, trained_parameters
from pipelines.built_in import model_path
from pipelines.images import labelled_grid, read_image
from pipelines.subject import adapters
from pipelines.subject.base_model import load_base_model
from pipelines.subject.generate import Sampling
from pipelines.subject.scores import ImageScorer
from training.options import SubjectOptions
from training.runs import naming
from training.runs.card_text import CARD
from training.runs.run import RunDirectory
from training.runs.run_files import CERTIFYING, COMPARING, EXPORTING, UPLOADING, Suggestion
from training.subject.certificate import StockModel, certify
from training.subject.checkpoint_selection import steps_to_sample
from training.subject.evaluating import evaluate
from training.subject.image_scoring import suggest_for, write_suggestion
from training.subject.measured import adapter_at, heldout_curve, sample_scores, samples, saved_steps
from training.subject.model_card import GRID, has_exports, write_model_card
from training.subject.preparing import DatasetSplit
from training.subject.publishing import assemble, push_to_hub
from training.subject.samples import ValidationSampler
from training.subject.validation import log_scores

logger = get_logger(__name__)
SUGGESTED = "suggested"
# Few prompts and steps are enough to compare pixels.
CERTIFIED_PROMPTS, CERTIFIED_STEPS = 2, 8


@dataclass(frozen=True)
class Trained:
    """A pipeline with a trained adapter.

    Args:
        components: the adapted modules.
        sampler: generates an image for each validation prompt.
        scorer: scores these images; None if none are generated.
        subject_images: training images as the model sees them.
        before: the base model's images for the validation prompts; empty without validation images.
        split: the training images and the held-out images.
        base_model: the identity of the base model.
        began: when the run started, by the monotonic clock, in seconds.
    """

    pipeline: StableDiffusionXLPipeline
    components: dict[str, nn.Module]
    sampler: ValidationSampler
    scorer: ImageScorer | None
    subject_images: Sequence[Image.Image]
    before: Sequence[Image.Image]
    split: DatasetSplit
    base_model: dict[str, Any]
    began: float


def finish(run: RunDirectory, trained: Trained, options: SubjectOptions) -> None:
    """Export the adapter, recommend a step, certify, and write the model card; on the main process only.

    Raises: CertificateError if stock diffusers generates other images than the trained pipeline.
    """
    run.begin(EXPORTING)
    export(run, trained, options, options.optimisation.max_train_steps)
    sample_candidates(run, trained, options)
    suggestion = suggest_for(run, options.optimisation.max_train_steps)
    write_suggestion(run, suggestion)
    logger.info(f"Recommended: step {suggestion.step} of {suggestion.last}. {suggestion.why}")
    for warning in suggestion.warnings:
        logger.warning(warning)
    rows = image_rows(run, trained, options, export_suggested(run, trained, options, suggestion), suggestion)
    if rows:
        labelled_grid(rows, options.output.validation_prompt).save(run.path / GRID)
    if options.validation.evaluate:
        evaluate(run, trained.sampler, trained.scorer, trained.split, options, trained.base_model)
    if options.validation.certify and has_exports(run):
        run.begin(CERTIFYING)
        certify_run(run, trained, options)
    summarise(run, trained, options, suggestion)
    if options.validation.private or options.validation.push_to_hub:
        folder = assemble(run, options, len(trained.split.train), public_grid(rows, options))
        if options.validation.push_to_hub:
            run.begin(UPLOADING)
            run.update_status(published=push_to_hub(folder, options.validation, repository_name(run, options)))


def summarise(run: RunDirectory, trained: Trained, options: SubjectOptions, suggestion: Suggestion) -> None:
    """Write the final figures to the status, and the model card; log where the results are."""
    count = sum(parameter.numel() for parameter in trained_parameters(trained.components))
    seconds = round(time.monotonic() - trained.began, 1)
    run.update_status(num_trainable_parameters=count, suggested_step=suggestion.step, seconds=seconds)
    write_model_card(run, options, len(trained.split.train))
    grid = f" Images before and after: {run.path / GRID}." if (run.path / GRID).exists() else ""
    logger.info(f"Trained {count:,} parameters in {seconds / 60:.1f} min.{grid}")
    folders = ("diffusers", "kohya") if has_exports(run) else ("adapter",)
    paths = " and ".join(str(run.path / name) for name in folders)
    logger.info(f"The adapter is in {paths}. Details are in {run.path / CARD}.")


def export(run: RunDirectory, trained: Trained, options: SubjectOptions, step: int, recommended: bool = False) -> None:
    """Write the adapter at `step` in all formats, under the run's title.

    Args:
        recommended: to the folder `suggested/`, from the adapter `SUGGESTED`.
    """
    private, groups = options.validation.private, options.to_dict()
    title = "adapter" if private else naming.title_of(run.path, groups, "subject")
    folder, name = (run.path / SUGGESTED, SUGGESTED) if recommended else (run.path, ADAPTER_NAME)
    stem, header = naming.file_stem(title, step), naming.header_of(title, groups, step, private)
    adapters.save_everywhere(trained.pipeline, trained.components, folder, stem, name, header)


def repository_name(run: RunDirectory, options: SubjectOptions) -> str:
    """The name of the repository on the hub, if none is given: that of the run, or "adapter" if that must not be published."""
    return "adapter" if options.validation.private else run.path.name


def public_grid(rows: Sequence[tuple[str, Sequence[Image.Image]]], options: SubjectOptions) -> Image.Image | None:
    """The grid of images for the published card; with `--private`, without training images and prompts. None without images."""
    prompts = options.output.validation_prompt
    if not rows:
        return None
    if not options.validation.private:
        return labelled_grid(rows, prompts)
    return labelled_grid(rows[1:], [str(index + 1) for index in range(len(prompts))])


def sample_candidates(run: RunDirectory, trained: Trained, options: SubjectOptions) -> None:
    """Generate, save and score the missing samples of the steps to be compared."""
    for step in steps_to_sample(
        heldout_curve(run), saved_steps(run), sample_scores(run), options.validation.num_candidate_images
    ):
        run.begin(COMPARING)
        with using_adapter(trained.pipeline, adapter_at(run, step)):
            images = trained.sampler.generate()
        trained.sampler.save(run, step, images)
        log_scores(run, step, trained.scorer, images, trained.sampler.prompts)


@contextmanager
def using_adapter(pipeline: StableDiffusionXLPipeline, path: Path) -> Iterator[None]:
    """A context in which the pipeline uses the adapter at `path`, named `SUGGESTED`, in place of the trained one."""
    adapters.load_adapter(pipeline, path, SUGGESTED)
    pipeline.set_adapters([SUGGESTED])
    try:
        yield
    finally:
        pipeline.delete_adapters([SUGGESTED])
        pipeline.set_adapters([ADAPTER_NAME])


def export_suggested(run: RunDirectory, trained: Trained, options: SubjectOptions, suggestion: Suggestion) -> list[Image.Image]:
    """Export the recommended adapter to `suggested/` unless it is the last one; returns its samples, if there are any."""
    adapter_folder = adapter_at(run, suggestion.step)
    if suggestion.step == suggestion.last or not adapter_folder.is_dir():
        return []
    with using_adapter(trained.pipeline, adapter_folder):
        export(run, trained, options, suggestion.step, recommended=True)
        return samples_of(run, trained, suggestion.step) if options.output.validation_images else []


def samples_of(run: RunDirectory, trained: Trained, step: int) -> list[Image.Image]:
    """The samples of `step`, whose adapter the pipeline has, from their files if they were generated before."""
    saved = samples(run, step)
    if [each.prompt for each in saved] != list(trained.sampler.prompts):
        return trained.sampler.generate()
    return [read_image(each.path) for each in saved]


def image_rows(
    run: RunDirectory,
    trained: Trained,
    options: SubjectOptions,
    suggested: Sequence[Image.Image],
    suggestion: Suggestion,
) -> list[tuple[str, Sequence[Image.Image]]]:
    """The rows of the grid of images; none without validation images.

    Args:
        suggested: the samples of the recommended step, if it is not the last one.
    """
    if not options.output.validation_images:
        return []
    rows = [
        ("the subject", trained.subject_images[: len(trained.before)]),
        ("before", trained.before),
        (f"after, {options.adapter.method}", samples_of(run, trained, suggestion.last)),
        (f"recommended, step {suggestion.step}", suggested),
    ]
    return rows if suggested else rows[:-1]


def certify_run(run: RunDirectory, trained: Trained, options: SubjectOptions) -> None:
    """Write the certificate.

    After training on a quantised model, the reference is the native adapter on the unquantised one, which others load.
    """
    given, pipeline = options.model, trained.pipeline
    name, vae = model_path(given.pretrained_model_name_or_path), given.pretrained_vae_model_name_or_path
    prediction = given.prediction()
    scheduler = (prediction.scheduler_class, prediction.scheduler_arguments())
    model = StockModel(name, given.variant, given.revision, vae, given.single_file_config, *scheduler)
    if given.quantize is not None:
        plain = {**given.source, "quantize": None}
        pipeline = load_base_model(name, trained.pipeline.text_encoder.dtype, trained.pipeline.device, **plain)
        adapters.load_adapter(pipeline, run.path, ADAPTER_NAME)
    sampling = Sampling(num_inference_steps=CERTIFIED_STEPS, resolution=trained.sampler.sampling.resolution)
    prompts = options.output.validation_prompt[:CERTIFIED_PROMPTS]
    certify(pipeline, run.path, model, prompts, sampling, options.optimisation.seed, options.adapter.create().exports_exactly)
