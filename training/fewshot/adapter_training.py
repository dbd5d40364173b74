"""The training of an adapter in a trial: its calibration images, loss, batches, optimizer and loop."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from diffusers.optimization import get_scheduler
from torch import nn
from tqdm.auto import tqdm

from pipelines.adapter_options import AdapterOptions
from pipelines.clip import Clip
from pipelines.fewshot import adapters
from pipelines.fewshot.batches import LabelledBatches, SampledViews
from pipelines.fewshot.data import LabelledImageDataset
from pipelines.fewshot.loss import ClassificationLoss
from pipelines.optimizers import OptimizerSettings, Rates, parameter_groups
from training.engine.loop import LoopOptions, Trainable
from training.fewshot.experiment import SplitImages
from training.options.fewshot import FewShotOptions

WARMUP_SHARE = 0.05
# Batch size of the calibration; a smaller training batch size lowers it.
CALIBRATION_BATCH = 64


class CalibrationBatches:
    """All images in batches (n, 3, h, w), no larger than those of the training, so that they need less memory than a step.

    They can be iterated over again, as calibrations in groups of layers do.
    """

    def __init__(self, inputs: LabelledImageDataset, train_batch_size: int, has_bar: bool) -> None:
        self.loader, self.has_bar = torch.utils.data.DataLoader(inputs, min(CALIBRATION_BATCH, train_batch_size)), has_bar

    def __iter__(self) -> Iterator[torch.Tensor]:
        for pixels, _ in tqdm(self.loader, desc="calibrating", leave=False, delay=5, disable=not self.has_bar):
            yield pixels


def loop_options(options: FewShotOptions, steps: int, seed: int) -> LoopOptions:
    """The options of the training loop."""
    return LoopOptions(
        steps,
        seed=seed,
        gradient_accumulation_steps=options.optimisation.gradient_accumulation_steps,
        max_grad_norm=options.optimisation.max_grad_norm,
        checkpointing_steps=options.output.checkpointing_steps,
        checkpoints_total_limit=options.output.checkpoints_total_limit,
        dataloader_num_workers=options.data.dataloader_num_workers,
    )


def loss_and_batches(
    images: SplitImages, clip: Clip, components: dict[str, nn.Module], train_batch_size: int, processes: int
) -> tuple[ClassificationLoss, LabelledBatches]:
    """The loss and its batches; the features of an encoder that is not adapted are computed once."""
    experiment = images.experiment
    reads_features = adapters.IMAGE not in components
    class_features = None if adapters.TEXT in components else experiment.class_features
    loss = ClassificationLoss(clip, experiment.prompts, class_features, reads_features)
    labels = torch.tensor([image.label for image in images.train])
    size = processes * min(train_batch_size, math.ceil(len(labels) / processes))
    inputs = SampledViews(images.training_examples.all_views()) if reads_features else images.augmented()
    return loss, LabelledBatches(inputs, labels, size, images.split.seed)


def to_train(
    loss: ClassificationLoss,
    batches: LabelledBatches,
    components: dict[str, nn.Module],
    adapter: AdapterOptions,
    settings: OptimizerSettings,
    steps: int,
    learning_rate: float,
) -> Trainable:
    """The loss with an optimiser of the adapter's parameters, a cosine schedule to zero, and the method's hooks."""
    method = adapter.create()
    optimizer = settings.optimizer(parameter_groups(loss, Rates(learning_rate, factor=method.learning_rate_factor)))
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=round(WARMUP_SHARE * steps), num_training_steps=steps)
    return Trainable(loss, batches, optimizer, schedule, method=method.training(list(components.values()), steps))
