"""Generators seeded by a key, so that random numbers do not depend on what was sampled before."""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from pipelines.lazy_modules import torch


class RandomStream(IntEnum):
    """The second number of a key, after the seed: each use of random numbers has a separate generator."""

    ORDER = 0
    BATCH = 1
    ADAPTER_START = 2
    CALIBRATION = 3
    NOISE_OFFSET = 4
    SCORES = 5
    BUCKETS = 6
    CLASS_ORDER = 7
    CROPS = 8
    HELD_OUT = 9
    VIEWS = 10
    PREDICTION_TYPE = 11
    ADAPTER = 12


def keyed_generator(*key: int) -> torch.Generator:
    """A CPU generator for `key`, non-negative integers such as (seed, step); equal keys give equal random numbers."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
