"""What a run keeps of its steps, and what it suggests by all that it measured."""

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
    """Save the adapter as it is now, in its smallest native layout, so that it can be used and exported at once."""
    target = adapter_at(run, step)
    aside = target.with_name(f".writing-{target.name}")
    shutil.rmtree(aside, ignore_errors=True)
    save_small(components, aside)
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)


def suggest_for(run: RunDirectory, last: int) -> Suggestion:
    """What the run suggests by all that it measured; `last` is its last step."""
    return suggest(heldout_curve(run), last, sample_scores(run))


def write_suggestion(run: RunDirectory, suggestion: Suggestion) -> None:
    """Write suggestion.json, with the folder of the recommended adapter if it was saved."""
    folder = adapter_at(run, suggestion.step)
    replace(suggestion, adapter=str(folder.relative_to(run.path)) if folder.is_dir() else None).write(run.path)
