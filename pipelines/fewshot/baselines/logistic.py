"""Logistic regression by scikit-learn for a range of penalties."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from pipelines.fewshot.baselines.predictors import LinearHead

# Inverse penalties, strongest penalty first, for centred inputs of root mean square length 1.
INVERSE_PENALTIES = tuple(float(value) for value in np.logspace(-2, 4, 13))
MAX_ITERATIONS = 1000


@dataclass(frozen=True)
class Span:
    """Coordinates in the span of the inputs, in which a penalised fit has the same solution and at most n dimensions.

        z = (x - mean) V / length        the minimum of  sum loss(c . z) + |c|^2 / 2 C  lies in the span

    Args:
        mean: (width,).
        axes: V (width, rank), orthonormal.
        length: root mean square distance from the mean.
    """

    mean: np.ndarray
    axes: np.ndarray
    length: float

    @classmethod
    def of(cls, inputs: np.ndarray) -> Span:
        """The span of `inputs` (n, width)."""
        mean = inputs.mean(axis=0)
        centred = inputs - mean
        length = float(np.sqrt(np.square(centred).sum(axis=1).mean())) or 1.0
        return cls(mean, np.linalg.svd(centred, full_matrices=False)[2].T, length)

    def coordinates(self, inputs: np.ndarray) -> np.ndarray:
        """The coordinates (n, rank) of `inputs` (n, width)."""
        return (inputs - self.mean) @ self.axes / self.length

    def head(self, coefficients: np.ndarray, intercepts: np.ndarray) -> LinearHead:
        """The classifier of inputs for a fit of their coordinates: coefficients (classes, rank), intercepts (classes,)."""
        weight = coefficients @ self.axes.T / self.length
        bias = intercepts - weight @ self.mean
        return LinearHead(weight=torch.from_numpy(weight), bias=torch.from_numpy(bias))


def regularisation_path(
    inputs: torch.Tensor, labels: torch.Tensor, inverse_penalties: tuple[float, ...] = INVERSE_PENALTIES
) -> Iterator[tuple[float, LinearHead]]:
    """Fit multinomial logistic regression for each C of `inverse_penalties`.

    Args:
        inputs: (n, width).
        labels: (n,) int64, every class at least once.
    """
    values, classes = inputs.double().cpu().numpy(), labels.cpu().numpy()
    span = Span.of(values)
    coordinates = span.coordinates(values)
    # With warm_start each fit starts from the solution with the previous, stronger penalty.
    model = LogisticRegression(max_iter=MAX_ITERATIONS, warm_start=True)
    for inverse_penalty in inverse_penalties:
        model.set_params(C=inverse_penalty)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(coordinates, classes)
        coefficients, intercepts = model.coef_, model.intercept_
        if len(coefficients) == 1:
            # For two classes scikit-learn stores only the second, relative to zero.
            coefficients, intercepts = np.vstack([0 * coefficients, coefficients]), np.append(0.0, intercepts)
        yield inverse_penalty, span.head(coefficients, intercepts)
