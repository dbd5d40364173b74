"""The door for baselines: `fit(name, task, seed)` gives a predictor, whatever the method. A new one is one line here.

All see the same few images through the same frozen towers, and choose their settings on validation alone. Predictors go to
files in `predictors`; `vocabulary` adds classes by their prompts.
"""

from __future__ import annotations

import pkgutil
from typing import TYPE_CHECKING

from pipelines.errors import InputError

if TYPE_CHECKING:
    from pipelines.fewshot.baselines.predictors import Predictor
    from pipelines.fewshot.baselines.task import FewShotTask

# Where each one's function lies: a file is imported when its baseline is fitted, so that --help imports no scikit-learn.
BASELINES = {
    "zeroshot": "zeroshot:fit",
    "linear_probe": "linear_probe:fit",
    "clap": "clap:fit",
    "tip_adapter": "tip_adapter:fit",
    "tip_adapter_f": "tip_adapter:fit_keys",
    "coop": "coop:fit",
    "clip_adapter": "clip_adapter:fit",
    "taskres": "taskres:fit",
    "gda": "gda:fit",
    "pixels": "pixels:fit",
}


def fit(name: str, task: FewShotTask, seed: int) -> Predictor:
    """Fit the baseline called `name`; everything random is drawn from `seed`.

    Raises: InputError if there is none of that name, or the task lacks what it reads.
    """
    if name not in BASELINES:
        raise InputError(f"method must be one of {', '.join(BASELINES)}, got {name!r}.")
    return pkgutil.resolve_name(f"{__name__}.{BASELINES[name]}")(task, seed)
