"""ProLIP: the last projection of the image encoder is fine-tuned, close to the pretrained one  [Fahes et al. 2024].

"CLIP's visual embedding projector is a few-shot cornucopia", arXiv 2410.05270.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional as F

from pipelines.errors import InputError
from pipelines.fewshot.baselines.choosing import choose_predictor
from pipelines.fewshot.baselines.predictors import Predictor, ProjectedHead
from pipelines.fewshot.baselines.task import FewShotTask
from pipelines.fewshot.baselines.training import Schedule, train
from pipelines.fewshot.projection import project
from pipelines.randomness import keyed_generator

# The authors' optimizer, steps and learning rates; the smaller ones of their grid change nothing within these steps.
EPOCHS, EPSILON = 300, 1e-4
LEARNING_RATES = (1e-5, 1e-4, 1e-3, 1e-2)


def fit(task: FewShotTask, seed: int) -> Predictor:
    """min over W of  mean -log softmax(scale cos(W h, T))[y] + lambda |W - W_0|^2,  from the pretrained W_0, lambda = 1 / shots.

    h is the output of the image encoder before the projection. The learning rate is chosen on the validation images.

    Raises: InputError if the task has no projection and embeddings.
    """
    if task.projection is None or task.train.embeddings is None or task.validation.embeddings is None:
        raise InputError(
            "The method 'prolip' trains the projection of the image encoder, got features only. Set projection of FewShotTask, "
            "and embeddings of its Examples."
        )
    predictors = (projected(task, seed, rate, 1 / task.shots) for rate in LEARNING_RATES)
    return choose_predictor(predictors, len(LEARNING_RATES), task.validation)


def projected(task: FewShotTask, seed: int, learning_rate: float, penalty: float) -> Predictor:
    """Train the predictor of one learning rate and one factor `penalty`, lambda in the equation of `fit`."""
    start, bias, text = task.projection.weight, task.projection.bias, task.zero_shot_weight()
    weight = start.clone().requires_grad_()

    def loss_of(embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss of embeddings (batch, p) and labels (batch,)."""
        features = project(embeddings, weight, bias)
        return F.cross_entropy(features @ text.T, labels) + penalty * (weight - start).square().sum()

    optimizer = partial(torch.optim.Adam, lr=learning_rate, eps=EPSILON)
    # One step for each view of all images, as the authors do.
    schedule = Schedule(optimizer, EPOCHS, batch_size=len(task.train))
    train([weight], loss_of, task.train, schedule, keyed_generator(seed), task.train.embeddings)
    head = ProjectedHead(weight=text, projection=weight.detach(), bias=bias)
    setting = {"learning_rate": learning_rate, "penalty": penalty}
    return Predictor(head, weight.numel(), setting, reads="embeddings", open_vocabulary=True)
