"""The choice of hyperparameters on the validation images, shared by all baselines."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from pipelines.errors import InputError
from pipelines.fewshot.baselines.predictors import Predictor
from pipelines.fewshot.baselines.task import Examples

Candidate = TypeVar("Candidate")


def choose(candidates: Iterable[tuple[Candidate, torch.Tensor]], labels: torch.Tensor) -> Candidate:
    """The candidate with the highest accuracy; ties are broken by the lowest cross-entropy, then by order.

    Ties are common, since a few images allow only a few accuracies. Candidates with non-finite logits are skipped.

    Args:
        candidates: each with its logits (n, classes) on the validation images.
        labels: (n,) int64.
    Raises: InputError if there is no candidate, or none with finite logits.
    """
    best: tuple[int, float] | None = None
    chosen: list[Candidate] = []
    tried = 0
    for candidate, logits in candidates:
        tried += 1
        if not bool(torch.isfinite(logits).all()):
            continue
        targets = labels.to(logits.device)
        score = (int((logits.argmax(dim=-1) == targets).sum()), -float(F.cross_entropy(logits, targets)))
        if best is None or score > best:
            best, chosen = score, [candidate]
    if not chosen:
        raise InputError(f"None of {tried} settings gives finite logits on the validation images. Lower the learning rates.")
    return chosen[0]


def choose_predictor(predictors: Iterable[Predictor], total: int, validation: Examples) -> Predictor:
    """Fit `total` predictors one by one and return the one that `choose` selects on `validation`."""
    bar = tqdm(predictors, total=total, desc="fitting settings", leave=False, delay=5)
    return choose(((one, one.logits(inputs_of(one, validation))) for one in bar), validation.labels)


def inputs_of(predictor: Predictor, examples: Examples) -> torch.Tensor:
    """The input (n, width) of `predictor` for `examples`."""
    if predictor.reads == "embeddings":
        return examples.embeddings[0]
    return examples.features if predictor.reads == "features" else pixels_of(examples)


def pixels_of(examples: Examples) -> torch.Tensor:
    """The raw pixels of `examples`, (n, p).

    Raises: InputError if there are none.
    """
    if examples.pixels is None:
        raise InputError("The method 'pixels' needs raw pixels, got features only. Set pixels of Examples.")
    return examples.pixels
