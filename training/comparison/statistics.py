"""Intervals and paired tests over datasets and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import rankdata

from pipelines.fewshot.metric_values import Interval

RESAMPLES, CONFIDENCE = 2000, 0.95


def bootstrap_interval(values: Mapping[str, Sequence[float]], seed: int = 0) -> Interval:
    """The mean over datasets and seeds, with the interval of a bootstrap over both.

    Each resample takes as many datasets with replacement, and as many seeds of each with replacement [Davison and Hinkley 1997,
    section 3.8]. With a single dataset, the seeds alone are resampled. The bounds are percentiles.

    Args:
        values: of each dataset, one for each seed.
        seed: of the resampling.
    """
    groups = [np.asarray(group, dtype=float) for group in values.values()]
    rng = np.random.default_rng(seed)
    # (datasets, resamples, datasets of a resample): means of resampled seeds, anew for each occurrence of a dataset.
    means = np.stack([rng.choice(group, (RESAMPLES, len(groups), len(group))).mean(axis=-1) for group in groups])
    chosen = rng.integers(len(groups), size=(RESAMPLES, len(groups)))
    resampled = np.take_along_axis(means, chosen[None], axis=0)[0].mean(axis=1)
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(np.mean([group.mean() for group in groups])), float(low), float(high))


def signed_rank_p(differences: Sequence[float]) -> float:
    """The two-sided p-value of Wilcoxon's signed-rank test that paired `differences` are symmetric about 0; 1 if all are 0.

    The distribution of the statistic over all signs is exact with ties too, where scipy's falls back to the normal distribution:
    accuracies on few images have many ties, and corrected p-values are in its tail. Zeros are ranked, then dropped [Pratt 1959].
    """
    values = np.asarray(differences, dtype=float)
    # Mean ranks are multiples of a half.
    doubled = np.rint(2 * rankdata(np.abs(values))).astype(int)[values != 0]
    counts = np.zeros(doubled.sum() + 1)
    counts[0] = 1.0
    for rank in doubled:
        counts[rank:] += counts[:-rank].copy()
    positive = doubled[values[values != 0] > 0].sum()
    tail = min(positive, doubled.sum() - positive)
    return float(min(1.0, 2 * counts[: tail + 1].sum() / counts.sum()))


def smallest_p(count: int) -> float:
    """The smallest p-value that `signed_rank_p` can give for `count` differences: all of them have one sign."""
    return min(1.0, 2.0 ** (1 - count))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number, in the given order [Holm 1979].

    adjusted_(k) = max over j <= k of min(1, (m - j + 1) p_(j));  p_(1) <= ... <= p_(m)
    """
    values = np.asarray(p_values, dtype=float)
    order = np.argsort(values, kind="stable")
    scaled = np.minimum(1.0, values[order] * np.arange(len(values), 0, -1))
    adjusted = np.empty_like(values)
    adjusted[order] = np.maximum.accumulate(scaled)
    return adjusted.tolist()
