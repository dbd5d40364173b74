"""Gaussian discriminant analysis added to zero-shot classification, without training  [Wang et al. 2024].

"A hard-to-beat baseline for training-free CLIP-based adaptation", arXiv 2402.04087.
"""

from __future__ import annotations

import math

import torch

from pipelines.fewshot.baselines.choosing import choose
from pipelines.fewshot.baselines.predictors import LinearHead, Predictor
from pipelines.fewshot.baselines.task import FewShotTask

# Smaller mean squared distances of unit features from their class means are rounding errors.
LEAST_SPREAD = 1e-12
ALPHAS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)


def gaussian_classifier(features: torch.Tensor, labels: torch.Tensor, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The classifier of Gaussian classes with one covariance and equal priors, in double precision.

        w_c = P m_c;   b_c = log(1 / classes) - m_c P m_c / 2
        P = d ((N - 1) S + tr(S) I)^-1,  the ridge-like estimate of the precision by Kubokawa and Srivastava

    with the class means m and the covariance S about them, over N - 1. Without any spread, P = I.

    Args:
        features: (N, d); labels: (N,) int64, every class at least once.
    Returns: the weight (classes, d) and the bias (classes,).
    """
    features = features.double()
    means = torch.stack([features[labels == label].mean(dim=0) for label in range(classes)])
    centred = features - means[labels]
    scatter = centred.T @ centred
    count, width = features.shape
    identity = torch.eye(width).to(features)
    precision = identity
    if float(scatter.trace()) > LEAST_SPREAD * count:
        precision = width * torch.linalg.inv(scatter + scatter.trace() / (count - 1) * identity)
    weight = means @ precision
    return weight, -(weight * means).sum(dim=-1) / 2 - math.log(classes)


def fit(task: FewShotTask, seed: int) -> Predictor:
    """logits = scale T x + alpha (W x + b),  alpha chosen on the validation images. Every view counts as an image."""
    views = task.train.all_views()
    weight, bias = gaussian_classifier(views.flatten(0, 1), task.train.labels.repeat(len(views)), len(task.classes))
    weight, bias, zero_shot = weight.float(), bias.float(), task.zero_shot_weight()

    def head(alpha: float) -> LinearHead:
        """The sum of both classifiers."""
        return LinearHead(weight=zero_shot + alpha * weight, bias=alpha * bias)

    features = task.validation.features
    alpha = choose(((alpha, head(alpha)(features)) for alpha in ALPHAS), task.validation.labels)
    return Predictor(head(alpha), num_trainable_parameters=0, setting={"alpha": alpha})
