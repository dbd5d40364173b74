"""Randomness as a function of a key, so that nothing drawn depends on what was drawn before."""

from __future__ import annotations

import numpy as np
import torch


def keyed_generator(*key: int) -> torch.Generator:
    """A CPU generator for `key`, non-negative integers such as (seed, step); equal keys give equal draws."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
