"""LP++: a linear probe with weights of a visual prototype plus a learned multiple of the text feature  [Huang et al. 2024].

"LP++: a surprisingly strong linear probe for few-shot CLIP", arXiv 2404.02285.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional as F

from pipelines.fewshot.baselines.choosing import choose_predictor
from pipelines.fewshot.baselines.predictors import LinearHead, Predictor
from pipelines.fewshot.baselines.task import FewShotTask

# The authors' number of steps, momentum, steps between two of alpha, and factor of its initial value.
STEPS, MOMENTUM, ALPHA_EVERY, ALPHA_FACTOR = 300, 0.9, 10, 250.0


def fit(task: FewShotTask, seed: int) -> Predictor:
    """min over w, alpha of  mean -log softmax((w_k + alpha_k t_k) . x)[y],  by gradient descent on the blocks w and alpha.

    The step sizes follow from bounds of the Lipschitz constants of the two gradients, so that there is no learning rate to
    choose. The number of steps is chosen on the validation images. Every view counts as an image. The optimisation is
    deterministic: `seed` has no effect.
    """
    text = task.class_features
    predictors = (
        Predictor(LinearHead.unbiased(weight + alpha[:, None] * text), weight.numel() + alpha.numel(), {"steps": step})
        for step, (weight, alpha) in enumerate(descent(task), start=1)
    )
    return choose_predictor(predictors, STEPS, task.validation)


def descent(task: FewShotTask) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """w (classes, d) and alpha (classes,) after each step.

    w starts as the sums of the images of each class, alpha as 250 times the mean similarity of an image and its class.
    """
    views, text = task.train.all_views(), task.class_features
    features, labels = views.flatten(0, 1), task.train.labels.repeat(len(views))
    targets = F.one_hot(labels, len(text)).to(features)
    similarity = features @ text.T
    weight = targets.T @ features / len(views)
    class_means = (targets * similarity).sum(dim=0) / targets.sum(dim=0)
    alpha = torch.full((len(text),), ALPHA_FACTOR * float(class_means.mean())).to(text)
    weight_step, alpha_step = step_sizes(features, similarity)
    velocity = torch.zeros_like(weight)
    for step in range(1, STEPS + 1):
        velocity = MOMENTUM * velocity + errors(features @ weight.T + alpha * similarity, targets).T @ features
        weight = weight - weight_step * velocity
        if step % ALPHA_EVERY == 0:
            alpha = alpha - alpha_step * (errors(features @ weight.T + alpha * similarity, targets) * similarity).sum(dim=0)
        yield weight, alpha


def errors(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The gradient of the mean cross-entropy with respect to `logits` (n, classes), for one-hot `targets` (n, classes)."""
    return (logits.softmax(dim=-1) - targets) / len(logits)


def step_sizes(features: torch.Tensor, similarity: torch.Tensor) -> tuple[float, float]:
    """The step sizes of w and alpha.

    The Hessian of the cross-entropy with respect to its logits is at most I / 2, and its diagonal at most I / 4. So the
    gradient in the weight of one class has the Lipschitz constant  lambda_max(X^T X) / 4 n,  whose inverse is the authors' step
    of w, and that in alpha at most  max_k sum_i (x_i . t_k)^2 / 2 n.

    Args:
        features: X (n, d).
        similarity: x_i . t_k, (n, classes).
    """
    count = len(features)
    largest = float(torch.linalg.matrix_norm(features, ord=2)) ** 2
    return 4 * count / largest, 2 * count / float(similarity.square().sum(dim=0).max())
