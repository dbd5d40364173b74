"""The training loop of the baselines that are trained on frozen features."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from pipelines.fewshot.baselines.task import Examples


@dataclass(frozen=True)
class Schedule:
    """The length of the training and its optimizer; the learning rate decays to zero on a cosine.

    Args:
        optimizer: creates the optimizer of the trained tensors, with the peak learning rate.
        epochs: number of passes over the images.
        batch_size: images per step.
    """

    optimizer: Callable[[list[torch.Tensor]], torch.optim.Optimizer]
    epochs: int
    batch_size: int = 256


def sgd(learning_rate: float) -> Callable[[list[torch.Tensor]], torch.optim.Optimizer]:
    """Stochastic gradient descent with momentum 0.9."""
    return lambda parameters: torch.optim.SGD(parameters, lr=learning_rate, momentum=0.9)


def train(
    parameters: Sequence[torch.Tensor],
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    examples: Examples,
    schedule: Schedule,
    generator: torch.Generator,
    views: torch.Tensor | None = None,
) -> None:
    """Minimise `loss_of` over `parameters`, in place. Every epoch uses a random view of each image.

    Args:
        loss_of: the loss () of features (batch, d) and labels (batch,).
        generator: of the order and the views.
        views: (v, n, width), the inputs instead of the views of the features.
    """
    parameters, views = list(parameters), examples.all_views() if views is None else views
    optimizer = schedule.optimizer(parameters)
    steps = schedule.epochs * math.ceil(len(examples) / schedule.batch_size)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in tqdm(range(schedule.epochs), desc="training on features", leave=False, delay=5):
        for chosen in torch.randperm(len(examples), generator=generator).split(schedule.batch_size):
            view = torch.randint(len(views), chosen.shape, generator=generator)
            loss = loss_of(views[view, chosen], examples.labels[chosen])
            # Only of these: the text encoder that CoOp's loss passes through must not accumulate gradients.
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.grad = gradient
            optimizer.step()
            scheduler.step()
