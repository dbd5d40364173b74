"""CLIP-Adapter: image features mixed with the output of a bottleneck on them  [Gao et al. 2021].

"CLIP-Adapter: better vision-language models with feature adapters", arXiv 2110.04544.
"""

from __future__ import annotations

from itertools import product

import torch
from torch.nn import functional as F

from pipelines.fewshot.baselines.choosing import choose_predictor
from pipelines.fewshot.baselines.predictors import Bottleneck, Predictor, adapted
from pipelines.fewshot.baselines.task import FewShotTask
from pipelines.fewshot.baselines.training import Schedule, sgd, train
from pipelines.randomness import keyed_generator

REDUCTION, EPOCHS = 4, 300
RATIOS = (0.2, 0.4, 0.6, 0.8)
LEARNING_RATES = (1e-3, 1e-2, 1e-1)


def fit(task: FewShotTask, seed: int) -> Predictor:
    """min over D, U of  mean -log softmax(scale cos(ratio relu(U relu(D x)) + (1 - ratio) x, T))[y].

    Without biases the bottleneck is positively homogeneous, so features of length 1 are as good as the encoder's. The ratio
    and the learning rate are chosen on the validation images, from the grid of Silva-Rodriguez et al. 2024.
    """
    settings = list(product(LEARNING_RATES, RATIOS))
    return choose_predictor((bottleneck(task, seed, *one) for one in settings), len(settings), task.validation)


def bottleneck(task: FewShotTask, seed: int, learning_rate: float, ratio: float) -> Predictor:
    """Train the predictor of one setting."""
    generator, width = keyed_generator(seed), task.class_features.shape[1]
    hidden = max(1, width // REDUCTION)
    down = _start(hidden, width, generator).to(task.class_features).requires_grad_()
    up = _start(width, hidden, generator).to(task.class_features).requires_grad_()
    weight = task.zero_shot_weight()

    def loss_of(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean loss of features (batch, d) and labels (batch,)."""
        return F.cross_entropy(adapted(features, down, up, ratio) @ weight.T, labels)

    train([down, up], loss_of, task.train, Schedule(sgd(learning_rate), EPOCHS), generator)
    head = Bottleneck(weight=weight, down=down, up=up, ratio=torch.tensor(ratio))
    return Predictor(head, down.numel() + up.numel(), {"ratio": ratio, "learning_rate": learning_rate}, open_vocabulary=True)


def _start(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """The initial weight (rows, columns) of nn.Linear: uniform in +-1 / sqrt(columns)."""
    return (2 * torch.rand(rows, columns, generator=generator) - 1) / columns**0.5
