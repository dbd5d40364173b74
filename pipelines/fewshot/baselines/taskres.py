"""TaskRes: a learned residual added to each class feature  [Yu et al. 2023].

"Task residual for tuning vision-language models", arXiv 2211.10277.
"""

from __future__ import annotations

from functools import partial
from itertools import product

import torch
from torch.nn import functional as F

from pipelines.fewshot.baselines.choosing import choose_predictor
from pipelines.fewshot.baselines.predictors import LinearHead, Predictor
from pipelines.fewshot.baselines.task import FewShotTask
from pipelines.fewshot.baselines.training import Schedule, train
from pipelines.randomness import keyed_generator

# The authors' two values of each, and a smaller learning rate.
ALPHAS = (0.5, 1.0)
LEARNING_RATES = (2e-5, 2e-4, 2e-3)
FEW_SHOTS, FEW_EPOCHS, MANY_EPOCHS = 4, 100, 200


def fit(task: FewShotTask, seed: int) -> Predictor:
    """min over R of  mean -log softmax(scale cos(x, t + alpha r))[y],  from R = 0 (zero-shot).

    alpha and the learning rate are chosen on the validation images.
    """
    settings = list(product(LEARNING_RATES, ALPHAS))
    return choose_predictor((residual(task, seed, *one) for one in settings), len(settings), task.validation)


def residual(task: FewShotTask, seed: int, learning_rate: float, alpha: float) -> Predictor:
    """Train the predictor of one setting."""
    residuals = torch.zeros_like(task.class_features, requires_grad=True)

    def weight() -> torch.Tensor:
        """The classifier, (classes, d)."""
        return task.logit_scale * F.normalize(task.class_features + alpha * residuals, dim=-1)

    def loss_of(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean loss of features (batch, d) and labels (batch,)."""
        return F.cross_entropy(features @ weight().T, labels)

    epochs = FEW_EPOCHS if task.shots <= FEW_SHOTS else MANY_EPOCHS
    schedule = Schedule(partial(torch.optim.Adam, lr=learning_rate), epochs)
    train([residuals], loss_of, task.train, schedule, keyed_generator(seed))
    setting = {"alpha": alpha, "learning_rate": learning_rate}
    return Predictor(LinearHead.unbiased(weight()), residuals.numel(), setting, open_vocabulary=True)
