"""The door for baselines: `fit(name, task, seed)` gives a predictor, whatever the method. A new one is one line here.

All see the same few pictures through the same frozen towers, and choose their settings on validation alone. Predictors go to
files in `predictors`; `vocabulary` adds classes by their prompts.
"""

from __future__ import annotations

from collections.abc import Callable

from pipelines.errors import InputError
from pipelines.fewshot.baselines import (
    clap,
    clip_adapter,
    coop,
    gda,
    linear_probe,
    pixels,
    taskres,
    tip_adapter,
    zeroshot,
)
from pipelines.fewshot.baselines.predictors import Predictor
from pipelines.fewshot.baselines.task import FewShotTask

BASELINES: dict[str, Callable[[FewShotTask, int], Predictor]] = {
    "zeroshot": zeroshot.fit,
    "linear_probe": linear_probe.fit,
    "clap": clap.fit,
    "tip_adapter": tip_adapter.fit,
    "tip_adapter_f": tip_adapter.fit_keys,
    "coop": coop.fit,
    "clip_adapter": clip_adapter.fit,
    "taskres": taskres.fit,
    "gda": gda.fit,
    "pixels": pixels.fit,
}


def fit(name: str, task: FewShotTask, seed: int) -> Predictor:
    """Fit the baseline called `name`; everything random is drawn from `seed`.

    Raises: InputError if there is none of that name, or the task lacks what it reads.
    """
    if name not in BASELINES:
        raise InputError(f"method must be one of {', '.join(BASELINES)}, got {name!r}.")
    return BASELINES[name](task, seed)
