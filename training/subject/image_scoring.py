"""The saved adapters of a run, and the recommended step."""

from __future__ import annotations

import shutil
from dataclasses import replace

from torch import nn

from pipelines.subject.adapters import save_small
from training.runs.run import RunDirectory
from training.runs.run_files import Suggestion
from training.subject.checkpoint_selection import suggest
from training.subject.measured import adapter_at, heldout_curve, sample_scores


def keep_adapter(run: RunDirectory, step: int, components: dict[str, nn.Module]) -> None:
    """Save the adapter at `step` in its smallest native layout."""
    target = adapter_at(run, step)
    aside = target.with_name(f".writing-{target.name}")
    shutil.rmtree(aside, ignore_errors=True)
    save_small(components, aside)
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)


def suggest_for(run: RunDirectory, last: int) -> Suggestion:
    """The recommended step by the losses and scores of the run, whose last step is `last`."""
    return suggest(heldout_curve(run), last, sample_scores(run))


def write_suggestion(run: RunDirectory, suggestion: Suggestion) -> None:
    """Write suggestion.json, with the folder of the recommended adapter if it was saved."""
    folder = adapter_at(run, suggestion.step)
    replace(suggestion, adapter=str(folder.relative_to(run.path)) if folder.is_dir() else None).write(run.path)
