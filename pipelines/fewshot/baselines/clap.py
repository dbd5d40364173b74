"""CLAP: a linear probe with a penalty on its distance from the class prompts  [Silva-Rodriguez et al. 2024].

"A closer look at the few-shot adaptation of large vision-language models", arXiv 2312.12730.
"""

from __future__ import annotations

from itertools import product

import torch
from torch.nn import functional as F

from pipelines.fewshot.baselines.choosing import choose_predictor
from pipelines.fewshot.baselines.predictors import LinearHead, Predictor
from pipelines.fewshot.baselines.task import FewShotTask
from pipelines.fewshot.baselines.training import Schedule, sgd, train
from pipelines.randomness import keyed_generator

# The authors train prototypes of about ten times the length at a rate of 0.1; a hundredth of it changes the cosines equally.
LEARNING_RATES = (1e-3, 1e-2)
# The range of squared lengths of the authors' prototypes.
PENALTY_WEIGHTS = (100.0, 10.0, 1.0)
EPOCHS = 300


def multipliers(task: FewShotTask) -> torch.Tensor:
    """Mean zero-shot probability of the true class over the training images of each class: (classes,)."""
    views = task.train.all_views()
    probabilities = (views @ task.zero_shot_weight().T).softmax(dim=-1).mean(dim=0)
    true_class = probabilities.gather(1, task.train.labels[:, None])[:, 0]
    return torch.zeros(len(task.classes)).to(true_class).index_add_(0, task.train.labels, true_class) / task.counts()


def fit(task: FewShotTask, seed: int) -> Predictor:
    """min over W of  mean -log softmax(scale cos(x, w))[y] + penalty_weight mean_c lambda_c |w_c - t_c|^2,  from W = T.

    The multipliers lambda stay at their initial values, as in the authors' experiments. Unlike there, `penalty_weight` and the
    learning rate are chosen on the validation images: with features of length 1 the best penalty depends on the encoder.
    """
    settings = list(product(PENALTY_WEIGHTS, LEARNING_RATES))
    return choose_predictor((constrained_probe(task, seed, *one) for one in settings), len(settings), task.validation)


def constrained_probe(task: FewShotTask, seed: int, penalty_weight: float, learning_rate: float) -> Predictor:
    """Train the predictor of one setting."""
    start, weights = task.class_features, multipliers(task)
    prototypes = start.clone().requires_grad_()

    def loss_of(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean loss of features (batch, d) and labels (batch,)."""
        logits = task.logit_scale * features @ F.normalize(prototypes, dim=-1).T
        penalty = (weights * (prototypes - start).square().sum(dim=-1)).mean()
        return F.cross_entropy(logits, labels) + penalty_weight * penalty

    train([prototypes], loss_of, task.train, Schedule(sgd(learning_rate), EPOCHS), keyed_generator(seed))
    weight = task.logit_scale * F.normalize(prototypes.detach(), dim=-1)
    setting = {"penalty_weight": penalty_weight, "learning_rate": learning_rate}
    return Predictor(LinearHead.unbiased(weight), prototypes.numel(), setting, open_vocabulary=True)
