"""The control: logistic regression on raw pixels. A method that does not beat it gains nothing from CLIP."""

from __future__ import annotations

from pipelines.fewshot.baselines.choosing import choose_predictor, pixels_of
from pipelines.fewshot.baselines.logistic import INVERSE_PENALTIES, regularisation_path
from pipelines.fewshot.baselines.predictors import Predictor
from pipelines.fewshot.baselines.task import FewShotTask


def fit(task: FewShotTask, seed: int) -> Predictor:
    """Like `linear_probe`, but on raw pixels (see `raw_pixels`), which are also the input of the predictor.

    Raises: InputError if the task's examples have no pixels.
    """
    path = regularisation_path(pixels_of(task.train), task.train.labels)
    predictors = (Predictor(head, head.weight.numel() + head.bias.numel(), {"C": C}, reads="pixels") for C, head in path)
    return choose_predictor(predictors, len(INVERSE_PENALTIES), task.validation)
