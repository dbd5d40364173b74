"""Tip-Adapter: a key-value cache of the training images added to zero-shot, with fixed or trained keys  [Zhang et al. 2022].

"Tip-Adapter: training-free adaption of CLIP for few-shot classification", arXiv 2207.09519.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch.nn import functional as F

from pipelines.fewshot.baselines.choosing import choose, choose_predictor
from pipelines.fewshot.baselines.predictors import KeyValueCache, Predictor, key_value_logits
from pipelines.fewshot.baselines.task import FewShotTask
from pipelines.fewshot.baselines.training import Schedule, train
from pipelines.randomness import keyed_generator

ALPHAS = tuple(float(value) for value in np.logspace(-1, 2, 16))
BETAS = tuple(float(value) for value in np.logspace(-0.5, 2, 16))
LEARNING_RATES = (1e-3, 1e-2)
# The authors' epochs, but at least LEAST_STEPS steps: with few images an epoch is a single step.
EPOCHS, LEAST_STEPS, BATCH_SIZE = 20, 100, 256


def cache_of(task: FewShotTask) -> tuple[torch.Tensor, torch.Tensor]:
    """The cache: keys (n, d), the normalised means over the views of each image, and one-hot values (n, classes)."""
    keys = F.normalize(task.train.all_views().mean(dim=0), dim=-1)
    return keys, F.one_hot(task.train.labels, len(task.classes)).to(keys)


def fit(task: FewShotTask, seed: int) -> Predictor:
    """logits = scale T x + alpha exp(-beta (1 - K x)) V,  alpha and beta chosen on the validation images. Nothing is trained."""
    keys, values = cache_of(task)
    return _predictor(task, keys, values, *search(task, keys, values), num_trainable_parameters=0)


def fit_keys(task: FewShotTask, seed: int) -> Predictor:
    """Tip-Adapter-F: K is trained by cross-entropy from the values of Tip-Adapter, then alpha and beta are chosen again.

    The authors use the epoch that is best on the test images; here the last epoch is used. The learning rate is chosen on the
    validation images.
    """
    return choose_predictor(_trained(task, seed), len(LEARNING_RATES), task.validation)


def search(task: FewShotTask, keys: torch.Tensor, values: torch.Tensor) -> tuple[float, float]:
    """The best alpha and beta on the validation images for `keys` (n, d) and `values` (n, classes)."""
    features = task.validation.features
    zero_shot = features @ task.zero_shot_weight().T

    def candidates() -> Iterator[tuple[tuple[float, float], torch.Tensor]]:
        """Every pair of alpha and beta with its logits."""
        for beta in BETAS:
            similarity = key_value_logits(features, keys, values, beta)
            yield from (((alpha, beta), zero_shot + alpha * similarity) for alpha in ALPHAS)

    return choose(candidates(), task.validation.labels)


def _trained(task: FewShotTask, seed: int) -> Iterator[Predictor]:
    start, values = cache_of(task)
    alpha, beta = search(task, start, values)
    weight = task.zero_shot_weight()
    epochs = max(EPOCHS, math.ceil(LEAST_STEPS / math.ceil(len(task.train) / BATCH_SIZE)))
    for rate in LEARNING_RATES:
        keys = start.clone().requires_grad_()

        def loss_of(features: torch.Tensor, labels: torch.Tensor, cache_keys: torch.Tensor = keys) -> torch.Tensor:
            """The mean loss of features (batch, d) and labels (batch,)."""
            return F.cross_entropy(features @ weight.T + alpha * key_value_logits(features, cache_keys, values, beta), labels)

        schedule = Schedule(partial(torch.optim.AdamW, lr=rate, eps=1e-4), epochs, BATCH_SIZE)
        train([keys], loss_of, task.train, schedule, keyed_generator(seed))
        trained_keys = keys.detach()
        yield _predictor(
            task,
            trained_keys,
            values,
            *search(task, trained_keys, values),
            num_trainable_parameters=keys.numel(),
            learning_rate=rate,
        )


def _predictor(
    task: FewShotTask,
    keys: torch.Tensor,
    values: torch.Tensor,
    alpha: float,
    beta: float,
    num_trainable_parameters: int,
    **setting: float,
) -> Predictor:
    head = KeyValueCache(
        weight=task.zero_shot_weight(), keys=keys, values=values, alpha=torch.tensor(alpha), beta=torch.tensor(beta)
    )
    return Predictor(head, num_trainable_parameters, {"alpha": alpha, "beta": beta, **setting}, open_vocabulary=True)
