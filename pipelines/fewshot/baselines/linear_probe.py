"""Linear probe: logistic regression on image features, without prompts  [Radford et al. 2021, A.3]."""

from __future__ import annotations

from pipelines.fewshot.baselines.choosing import choose_predictor
from pipelines.fewshot.baselines.logistic import INVERSE_PENALTIES, regularisation_path
from pipelines.fewshot.baselines.predictors import Predictor
from pipelines.fewshot.baselines.task import FewShotTask


def fit(task: FewShotTask, seed: int) -> Predictor:
    """min over W, b of  sum -log softmax(W x + b)[y] + |W|^2 / 2 C,  C chosen on the validation images.

    x is centred on the mean of the images and divided by their root mean square distance from it, so that the same values of C
    suit every encoder. The solver is deterministic: `seed` has no effect.
    """
    path = regularisation_path(task.train.features, task.train.labels)
    predictors = (Predictor(head, head.weight.numel() + head.bias.numel(), {"C": C}) for C, head in path)
    return choose_predictor(predictors, len(INVERSE_PENALTIES), task.validation)
