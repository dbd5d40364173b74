"""The control: logistic regression on raw pixels. What does not beat it has learned nothing from CLIP."""

from __future__ import annotations

from pipelines.fewshot.baselines.choosing import choose_predictor, pixels_of
from pipelines.fewshot.baselines.logistic import INVERSE_PENALTIES, regularisation_path
from pipelines.fewshot.baselines.predictors import Predictor
from pipelines.fewshot.baselines.task import FewShotTask


def fit(task: FewShotTask, seed: int) -> Predictor:
    """As `linear_probe`, of the images' raw pixels (see `raw_pixels`); its `logits` takes those too.

    Raises: InputError if the task's examples have no pixels.
    """
    path = regularisation_path(pixels_of(task.train), task.train.labels)
    predictors = (Predictor(head, head.weight.numel() + head.bias.numel(), {"C": C}, reads="pixels") for C, head in path)
    return choose_predictor(predictors, len(INVERSE_PENALTIES), task.validation)
