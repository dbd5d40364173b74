"""Options of adapter methods whose defaults are too large for the tiny models."""

TINY = {"block_size": 4, "n_frequency": 40}
