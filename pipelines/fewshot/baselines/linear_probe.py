"""A linear probe: logistic regression on the image tower's features, prompts unused  [Radford et al. 2021, A.3]."""

from __future__ import annotations

from pipelines.fewshot.baselines.choosing import choose_predictor
from pipelines.fewshot.baselines.logistic import INVERSE_PENALTIES, regularisation_path
from pipelines.fewshot.baselines.predictors import Predictor
from pipelines.fewshot.baselines.task import FewShotTask


def fit(task: FewShotTask, seed: int) -> Predictor:
    """min over W, b of  sum -log softmax(W x + b)[y] + |W|^2 / 2 C,  C chosen on validation.

    x is counted from the images' mean in units of their root mean square distance from it, so that the same C serve every
    tower. The solver draws nothing: `seed` changes nothing.
    """
    path = regularisation_path(task.train.features, task.train.labels)
    predictors = (Predictor(head, head.weight.numel() + head.bias.numel(), {"C": C}) for C, head in path)
    return choose_predictor(predictors, len(INVERSE_PENALTIES), task.validation)
