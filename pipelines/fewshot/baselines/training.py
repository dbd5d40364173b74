"""The one loop of the baselines that train on frozen features: a few numbers, a few seconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from pipelines.fewshot.baselines.task import Examples


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: the learning rate falls to zero on a cosine, step by step.

    Args:
        optimizer: makes the optimiser of the trained tensors; its learning rate is the peak.
        epochs: passes over the images.
        batch_size: images a step.
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
) -> None:
    """Minimise `loss_of` over `parameters`, in place. Each image is shown in one of its views, drawn anew in every epoch.

    Args:
        loss_of: features (batch, d) and labels (batch,) to a scalar.
        generator: draws the order and the views.
    """
    parameters, views = list(parameters), examples.all_views()
    optimizer = schedule.optimizer(parameters)
    steps = schedule.epochs * math.ceil(len(examples) / schedule.batch_size)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in tqdm(range(schedule.epochs), desc="training on features", leave=False, delay=5):
        for chosen in torch.randperm(len(examples), generator=generator).split(schedule.batch_size):
            view = torch.randint(len(views), chosen.shape, generator=generator)
            loss = loss_of(views[view, chosen], examples.labels[chosen])
            # Of these alone: a tower that the loss passes through keeps no gradients.
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.grad = gradient
            optimizer.step()
            falling.step()
