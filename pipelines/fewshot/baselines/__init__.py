"""Baselines on frozen features: `fit(name, task, seed)` fits any of them. A new one needs one line in `BASELINES`.

All baselines use the same images and frozen encoders, and choose their hyperparameters only on the validation images.
`predictors` saves and loads them; `vocabulary` adds classes by their prompts.
"""

from __future__ import annotations

import pkgutil
from typing import TYPE_CHECKING

from pipelines.errors import InputError

if TYPE_CHECKING:
    from pipelines.fewshot.baselines.predictors import Predictor
    from pipelines.fewshot.baselines.task import FewShotTask

# Module and function of each baseline, imported when it is fitted, so that --help does not import scikit-learn.
BASELINES = {
    "zeroshot": "zeroshot:fit",
    "linear_probe": "linear_probe:fit",
    "lp_plus_plus": "lp_plus_plus:fit",
    "clap": "clap:fit",
    "tip_adapter": "tip_adapter:fit",
    "tip_adapter_f": "tip_adapter:fit_keys",
    "coop": "coop:fit",
    "clip_adapter": "clip_adapter:fit",
    "taskres": "taskres:fit",
    "prolip": "prolip:fit",
    "gda": "gda:fit",
    "pixels": "pixels:fit",
}
# Those that need the embeddings before the projection of the image encoder.
READ_EMBEDDINGS = frozenset({"prolip"})


def fit(name: str, task: FewShotTask, seed: int) -> Predictor:
    """Fit the baseline `name`; `seed` determines all random numbers.

    Raises: InputError for an unknown name, or a task without the data that the baseline needs.
    """
    if name not in BASELINES:
        raise InputError(f"method must be one of {', '.join(BASELINES)}, got {name!r}.")
    return pkgutil.resolve_name(f"{__name__}.{BASELINES[name]}")(task, seed)
