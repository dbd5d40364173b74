"""Validation during a subject's training: losses with fixed noise, saved adapters, and sample images with scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

from PIL import Image
from torch import nn

from pipelines.subject.encoding import CachedLatents
from pipelines.subject.evaluation import mean_denoising_loss
from pipelines.subject.loss import DenoisingLoss
from pipelines.subject.scores import ImageScorer
from training.runs.run import RunDirectory
from training.runs.run_files import StepScores
from training.subject.image_scoring import keep_adapter
from training.subject.measured import metric_name
from training.subject.samples import ValidationSampler

# Training images, and draws of noise for each, of the training loss that the validation loss is compared with.
SEEN_IMAGES, SEEN_DRAWS = 4, 16
# The largest batch of a measurement, and a number of pixels per batch that needs little memory compared with the model.
MEASURED_BATCH, SMALL_PIXELS = 16, 512 * 512


def measured_losses(
    loss: DenoisingLoss, heldout: CachedLatents, seen: CachedLatents, batch_size: int = MEASURED_BATCH
) -> dict[str, float]:
    """The loss with fixed noise on the held-out images and on some training images.

    Args:
        batch_size: of the training.
    """
    heldout_batch, seen_batch = (measurement_batch(images, batch_size) for images in (heldout, seen))
    return {
        "heldout_loss": mean_denoising_loss(loss, heldout, batch_size=heldout_batch),
        "seen_loss": mean_denoising_loss(loss, seen, SEEN_DRAWS, batch_size=seen_batch, limit=SEEN_IMAGES),
    }


def measurement_batch(images: CachedLatents, batch_size: int) -> int:
    """The batch size of a measurement: that of the training, so that it needs less memory than a training step, or more for
    small images, up to `SMALL_PIXELS` in total.
    """
    return inference_batch(max(height * width for height, width in images.sizes), batch_size)


def inference_batch(pixels: int, batch_size: int) -> int:
    """The batch size for images of so many `pixels` without gradients; see `measurement_batch`."""
    return min(MEASURED_BATCH, max(batch_size, SMALL_PIXELS // pixels))


def log_scores(run: RunDirectory, step: int, scorer: ImageScorer, images: Sequence[Image.Image], prompts: Sequence[str]) -> None:
    """Log the scores of the `images` of `prompts` at `step`: the mean similarities, and the highest measures of copying."""
    scores = scorer.scores(images, prompts)
    of_step = StepScores(
        subject=fmean(each.subject for each in scores),
        prompt=fmean(each.prompt for each in scores),
        copy=max(each.copy for each in scores),
        nearest=max(each.nearest for each in scores),
        nearest_limit=scorer.nearest_limit,
    )
    run.log(step, **{metric_name(name): value for name, value in asdict(of_step).items()})


@dataclass(frozen=True)
class ValidationCallback:
    """Validates the model during training.

    Args:
        run: gets the losses, scores, images and adapters.
        loss: of the model in training.
        seen, heldout: the training images and the held-out images; None without held-out images.
        sampler: generates the sample images.
        components: the adapted modules.
        scorer: scores the sample images; None for no scores.
        batch_size: of the training.
    """

    run: RunDirectory
    loss: DenoisingLoss
    seen: CachedLatents
    heldout: CachedLatents | None
    sampler: ValidationSampler
    components: dict[str, nn.Module]
    scorer: ImageScorer | None = None
    batch_size: int = MEASURED_BATCH

    def begin(self, before: Sequence[Image.Image]) -> None:
        """Measure the base model and score its samples `before`, unless an earlier session has done so."""
        if not self.run.writes or self.run.metrics():
            return
        if self.heldout is not None:
            self.run.log(0, **measured_losses(self.loss, self.heldout, self.seen, self.batch_size))
        self._score(0, before)

    def measure(self, step: int) -> float | None:
        """Save the adapter and log the losses; returns the validation loss, None without held-out images."""
        keep_adapter(self.run, step, self.components)
        if self.heldout is None:
            return None
        losses = measured_losses(self.loss, self.heldout, self.seen, self.batch_size)
        self.run.log(step, **losses)
        return losses["heldout_loss"]

    def show(self, step: int) -> None:
        """Save the adapter, and generate, save and score the sample images."""
        keep_adapter(self.run, step, self.components)
        images = self.sampler.generate()
        self.sampler.save(self.run, step, images)
        self._score(step, images)

    def sample(self, step: int) -> None:
        """Generate and save the sample images on request. They are not scored, so that a request does not change the result."""
        self.sampler.save(self.run, step, self.sampler.generate())

    def _score(self, step: int, images: Sequence[Image.Image]) -> None:
        if self.scorer is not None and images:
            log_scores(self.run, step, self.scorer, images, self.sampler.prompts)
