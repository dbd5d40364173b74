"""What comes after training: export, suggestion, certificate, images side by side, model card."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from accelerate.logging import get_logger
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from torch import nn

from pipelines.adapter_method import ADAPTER_NAME, trained_parameters
from pipelines.built_in import model_path
from pipelines.images import labelled_grid
from pipelines.subject import adapters
from pipelines.subject.base_model import load_base_model
from pipelines.subject.generate import Sampling
from pipelines.subject.scores import ImageScorer
from training.options import SubjectOptions
from training.runs.card_text import CARD
from training.runs.run import RunDirectory
from training.runs.run_files import Suggestion
from training.subject.certificate import StockModel, certify
from training.subject.checkpoint_selection import to_draw
from training.subject.image_scoring import suggest_for, write_suggestion
from training.subject.measured import adapter_at, heldout_curve, kept_steps, sample_scores
from training.subject.model_card import GRID, write_model_card
from training.subject.publishing import assemble, push_to_hub
from training.subject.samples import ValidationSampler
from training.subject.validation import log_scores

logger = get_logger(__name__)
SUGGESTED = "suggested"
# Few, since a certificate compares numbers and not beauty.
CERTIFIED_PROMPTS, CERTIFIED_STEPS = 2, 8


@dataclass(frozen=True)
class Trained:
    """A pipeline whose adapter has been trained.

    Args:
        components: what of the pipeline is adapted.
        sampler: draws an image for each validation prompt with the pipeline as it is.
        judge: scores those images.
        shown, before: training images, of which as many are shown as there are of the others: what the base model drew.
        resolution: side of the images in pixels.
        images: how many were trained on.
        began: by the monotonic clock, in seconds.
    """

    pipeline: StableDiffusionXLPipeline
    components: dict[str, nn.Module]
    sampler: ValidationSampler
    judge: ImageScorer
    subject_images: Sequence[Image.Image]
    before: Sequence[Image.Image]
    resolution: int
    images: int
    began: float


def finish(run: RunDirectory, trained: Trained, options: SubjectOptions) -> None:
    """Export everything, suggest a step, certify, and write the model card; on the main process only.

    Raises: CertificateError if stock diffusers does not draw what the trained model draws.
    """
    run.update_status(phase="exporting")
    adapters.save_everywhere(trained.pipeline, trained.components, run.path, title_of(run, options))
    subject = trained.subject_images[: len(trained.before)]
    rows = [("the subject", subject), ("before", trained.before), (f"after, {options.adapter.method}", trained.sampler.draw())]
    images_by_step = draw_candidates(run, trained, options)
    suggestion = suggest_for(run, options.optimisation.max_train_steps)
    write_suggestion(run, suggestion)
    logger.info(f"Suggested: step {suggestion.step} of {suggestion.last}. {suggestion.why}")
    for warning in suggestion.warnings:
        logger.warning(warning)
    rows += suggested_rows(run, trained, options, suggestion, images_by_step.get(suggestion.step))
    labelled_grid(rows, options.output.validation_prompt).save(run.path / GRID)
    if options.validation.certify:
        run.update_status(phase="certifying")
        certify_run(run, trained, options)
    numbers = sum(parameter.numel() for parameter in trained_parameters(trained.components))
    run.update_status(
        num_trainable_parameters=numbers, suggested_step=suggestion.step, seconds=round(time.monotonic() - trained.began, 1)
    )
    write_model_card(run, options, trained.images)
    logger.info(f"{numbers:,} trained numbers, in {(time.monotonic() - trained.began) / 60:.1f} min. Look at {run.path / GRID}.")
    logger.info(f"The adapter is in {run.path / 'diffusers'} and {run.path / 'kohya'}; all else is told by {run.path / CARD}.")
    if options.validation.private or options.validation.push_to_hub:
        folder = assemble(run, options, trained.images, public_grid(rows, options))
        if options.validation.push_to_hub:
            run.update_status(phase="uploading")
            run.update_status(published=push_to_hub(folder, options.validation, title_of(run, options)))


def title_of(run: RunDirectory, options: SubjectOptions) -> str:
    """What the exported files are called: as the run, whose name may hold the subject's."""
    return "adapter" if options.validation.private else run.path.name


def public_grid(rows: Sequence[tuple[str, Sequence[Image.Image]]], options: SubjectOptions) -> Image.Image:
    """The images for the published card: all, or without the subject's own and the words."""
    prompts = options.output.validation_prompt
    if not options.validation.private:
        return labelled_grid(rows, prompts)
    return labelled_grid(rows[1:], [str(index + 1) for index in range(len(prompts))])


def draw_candidates(run: RunDirectory, trained: Trained, options: SubjectOptions) -> dict[int, list[Image.Image]]:
    """Draw samples with the adapters of the steps to be compared that have none, and score them; returns them by step."""
    prompts, images_by_step = options.output.validation_prompt, {}
    for step in to_draw(heldout_curve(run), kept_steps(run), sample_scores(run), options.validation.num_candidate_images):
        run.update_status(phase="comparing")
        with kept_adapter(trained.pipeline, adapter_at(run, step)):
            images_by_step[step] = trained.sampler.draw()
        trained.sampler.save(run, step, images_by_step[step])
        log_scores(run, step, trained.judge, images_by_step[step], prompts)
    return images_by_step


@contextmanager
def kept_adapter(pipeline: StableDiffusionXLPipeline, path: Path) -> Iterator[None]:
    """Have the pipeline draw with the adapter at `path`, called `SUGGESTED`, in place of the trained one meanwhile."""
    adapters.load_adapter(pipeline, path, SUGGESTED)
    pipeline.set_adapters([SUGGESTED])
    try:
        yield
    finally:
        pipeline.delete_adapters([SUGGESTED])
        pipeline.set_adapters([ADAPTER_NAME])


def suggested_rows(
    run: RunDirectory,
    trained: Trained,
    options: SubjectOptions,
    suggestion: Suggestion,
    images: list[Image.Image] | None = None,
) -> list[tuple[str, list[Image.Image]]]:
    """Export the suggested adapter to `suggested/`, unless it is the last one; its images are `images` if given."""
    adapter_folder = adapter_at(run, suggestion.step)
    if suggestion.step == suggestion.last or not adapter_folder.is_dir():
        return []
    title = f"{title_of(run, options)}-step-{suggestion.step}"
    with kept_adapter(trained.pipeline, adapter_folder):
        adapters.save_everywhere(trained.pipeline, trained.components, run.path / SUGGESTED, title, SUGGESTED)
        images = images or trained.sampler.draw()
    return [(f"suggested, step {suggestion.step}", images)]


def certify_run(run: RunDirectory, trained: Trained, options: SubjectOptions) -> None:
    """Write the run's certificate.

    A quantised model is not what others load: there the native adapter on the plain base model is what files must equal.
    """
    given, pipeline = options.model, trained.pipeline
    name, vae = model_path(given.pretrained_model_name_or_path), given.pretrained_vae_model_name_or_path
    said = given.prediction()
    scheduler = (said.scheduler_class, said.scheduler_arguments())
    model = StockModel(name, given.variant, given.revision, vae, given.single_file_config, *scheduler)
    if given.quantize is not None:
        plain = {**given.source, "quantize": None}
        pipeline = load_base_model(name, trained.pipeline.text_encoder.dtype, trained.pipeline.device, **plain)
        adapters.load_adapter(pipeline, run.path, ADAPTER_NAME)
    sampling = Sampling(num_inference_steps=CERTIFIED_STEPS, resolution=trained.resolution)
    prompts = options.output.validation_prompt[:CERTIFIED_PROMPTS]
    certify(pipeline, run.path, model, prompts, sampling, options.optimisation.seed)
