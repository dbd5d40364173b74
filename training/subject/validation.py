"""What a subject's training is watched by: the losses with fixed noise, kept adapters, and sample images."""

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
from training.subject.samples import ValidationSampler, save_subject

# Of the training images, for the loss that the held-out one is compared with.
SEEN_IMAGES, SEEN_DRAWS = 4, 16
# At once: the most, and the pixels that take little memory beside the model even where it trains on fewer.
MEASURED_BATCH, SMALL_PIXELS = 16, 512 * 512


def measured_losses(
    loss: DenoisingLoss, heldout: CachedLatents, seen: CachedLatents, batch_size: int = MEASURED_BATCH
) -> dict[str, float]:
    """The loss with fixed noise on what is held out, and on some of the images that are trained on.

    Args:
        batch_size: of the training.
    """
    at_once = [measured_at_once(images, batch_size) for images in (heldout, seen)]
    return {
        "heldout_loss": mean_denoising_loss(loss, heldout, batch_size=at_once[0]),
        "seen_loss": mean_denoising_loss(loss, seen, SEEN_DRAWS, batch_size=at_once[1], limit=SEEN_IMAGES),
    }


def measured_at_once(images: CachedLatents, batch_size: int) -> int:
    """How many draws of noise are measured at once: as many as a batch of the training has images, so that measuring takes less
    memory than a step; more of images so small that `SMALL_PIXELS` are not reached.
    """
    largest = max(height * width for height, width in images.sizes)
    return min(MEASURED_BATCH, max(batch_size, SMALL_PIXELS // largest))


def log_scores(run: RunDirectory, step: int, judge: ImageScorer, images: Sequence[Image.Image], prompts: Sequence[str]) -> None:
    """Log the scores of the images `images` from `prompts` after `step` steps: means of likeness and following, the worst of
    copying.
    """
    scores = judge.scores(images, prompts)
    of_step = StepScores(
        subject=fmean(each.subject for each in scores),
        prompt=fmean(each.prompt for each in scores),
        copy=max(each.copy for each in scores),
        nearest=max(each.nearest for each in scores),
        nearest_limit=judge.nearest_limit,
    )
    run.log(step, **{metric_name(name): value for name, value in asdict(of_step).items()})


@dataclass(frozen=True)
class ValidationCallback:
    """Watches one training.

    Args:
        run: where everything goes.
        loss: of the model in training.
        seen, heldout: what is trained on, and what is not; None where all is trained on.
        sampler: draws the sample images.
        components: what the adapter is on.
        judge: scores the images that are drawn, or None.
        batch_size: of the training.
    """

    run: RunDirectory
    loss: DenoisingLoss
    seen: CachedLatents
    heldout: CachedLatents | None
    sampler: ValidationSampler
    components: dict[str, nn.Module]
    judge: ImageScorer | None = None
    batch_size: int = MEASURED_BATCH

    def begin(self, before: Sequence[Image.Image], subject_images: Sequence[Image.Image]) -> None:
        """Measure the base model, once a run, and keep and score what it drew; keep the images `subject_images` beside it."""
        if not self.run.writes or self.run.metrics():
            return
        if self.heldout is not None:
            self.run.log(0, **measured_losses(self.loss, self.heldout, self.seen, self.batch_size))
        save_subject(self.run, subject_images)
        self.sampler.save(self.run, 0, before)
        self._score(0, before)

    def measure(self, step: int) -> float | None:
        """Keep the adapter and log the losses; returns that of the held-out image."""
        keep_adapter(self.run, step, self.components)
        if self.heldout is None:
            return None
        losses = measured_losses(self.loss, self.heldout, self.seen, self.batch_size)
        self.run.log(step, **losses)
        return losses["heldout_loss"]

    def show(self, step: int) -> None:
        """Draw the validation prompts, and score the images."""
        keep_adapter(self.run, step, self.components)
        images = self.sampler.draw()
        self.sampler.save(self.run, step, images)
        self._score(step, images)

    def sample(self, step: int) -> None:
        """Draw the validation prompts for people alone: a step that was asked for changes nothing of what is suggested."""
        self.sampler.save(self.run, step, self.sampler.draw())

    def _score(self, step: int, images: Sequence[Image.Image]) -> None:
        if self.judge is not None:
            log_scores(self.run, step, self.judge, images, self.sampler.prompts)
