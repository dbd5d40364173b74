"""Runs side by side: samples with the same prompts and seeds, options that differ, losses, and scores or accuracies."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.errors import InputError
from training.runs.run_files import Suggestion
from training.subject.measured import Sample, sampled_steps, samples
from webui.curves import Series, plot, running_mean
from webui.figures import SCORES, accuracies, in_percent, method_name, series
from webui.render import sample_image
from webui.runs import RunView
from webui.workspace import Workspace

# The style sheet has four colours for curves.
MIN_RUNS, MAX_RUNS = 2, 4
SMOOTHED = 1 / 16
LONGEST_VALUE = 120
# Options that differ for every run.
IGNORED_OPTIONS = frozenset({"output_dir", "resume_from_checkpoint", "cache_dir", "hub_token"})
OTHER_IMAGES = (
    "These runs have no sample images with the same prompt and seed, so they cannot be compared. "
    "Generate a prompt of your choice with all of them below."
)
NO_ACCURACY = "There is no accuracy yet. A run writes its report when it is done."


@dataclass(frozen=True)
class Compared:
    """Runs of the same task for comparison.

    Args:
        views: the runs in the order of the columns.
    """

    views: tuple[RunView, ...]

    @classmethod
    def of(cls, workspace: Workspace, ids: Sequence[str]) -> Compared:
        """The runs with these ids.

        Raises: InputError if they are not two to four, one does not exist, or their tasks differ.
        """
        unique = list(dict.fromkeys(ids or ()))
        if not MIN_RUNS <= len(unique) <= MAX_RUNS:
            raise InputError(f"Choose {MIN_RUNS} to {MAX_RUNS} runs to compare, got {len(unique)}.")
        views = tuple(RunView(workspace.run(run_id)) for run_id in unique)
        if len({view.task for view in views}) > 1:
            raise InputError("Subject runs and classifiers cannot be compared with each other. Choose runs of the same kind.")
        return cls(views)

    @property
    def task(self) -> str:
        """The task of the runs."""
        return self.views[0].task

    def in_html(self) -> str:
        """The comparison as HTML."""
        parts = [self.legend()]
        parts += [self.table()] if self.task == "classify" else [self.images(), self.curves()]
        return f'<div class="compare">{"".join(parts)}{self.differences()}</div>'

    def legend(self) -> str:
        """The letter of each run."""
        items = (f"<li><b>{letter(position)}</b> {_text(view.title)}</li>" for position, view in enumerate(self.views))
        return f'<ul class="compared">{"".join(items)}</ul>'

    def images(self) -> str:
        """Sample images with the same prompts and seeds, from the recommended or last step of each run."""
        steps = [compared_step(view) for view in self.views]
        by_run = [_samples(view, step) for view, step in zip(self.views, steps, strict=True)]
        common = [key for key in by_run[0] if all(key in each for each in by_run)]
        if not common:
            return f'<p class="warning">{OTHER_IMAGES}</p>'
        rows = {f"{key[0]} (seed {key[1]})": _cells(by_run, key) for key in common}
        heads = [f"{letter(position)}, {'base model' if step == 0 else f'step {step}'}" for position, step in enumerate(steps)]
        return "<h3>Same prompt, same seed</h3>" + side_by_side(heads, rows)

    def curves(self) -> str:
        """One plot of the losses, and one for each score."""
        logged = [series(view) for view in self.views]
        last = max((points[-1][0] for each in logged for points in each.values() if points), default=1)
        lines = []
        for position, each in enumerate(logged):
            losses = each.get("loss", [])
            smooth = running_mean(losses, max(1, round(len(losses) * SMOOTHED)))
            lines.append(Series(f"{letter(position)}: training loss", smooth, "line", position + 1))
            lines.append(Series(f"{letter(position)}: validation loss", each.get("heldout_loss", []), "marks", position + 1))
        plots = [plot("Training and validation loss (lower is better)", lines, (0, last))]
        for name, title in SCORES.items():
            points = [Series(letter(position), each.get(name, []), "marks", position + 1) for position, each in enumerate(logged)]
            plots.append(plot(f"{title} (higher is better)", points, (0, last), css="half"))
        return "".join(plots)

    def table(self) -> str:
        """The test accuracy of each method and number of shots, with its 95% confidence interval."""
        accuracy = [{(row.method, row.shots): row.top1 for row in accuracies(view)} for view in self.views]
        keys = sorted({key for each in accuracy for key in each}, key=str)
        if not keys:
            return f'<p class="warning">{NO_ACCURACY}</p>'
        rows = {}
        for key in keys:
            method, shots = key
            rows[f"{method_name(method)}, {shots} images per class"] = [
                in_percent(each[key]) if key in each else "" for each in accuracy
            ]
        note = '<p class="quiet">Accuracy on the test images with its 95% confidence interval.</p>'
        heads = [letter(position) for position in range(len(self.views))]
        return f"<h3>Accuracy</h3>{note}" + side_by_side(heads, rows)

    def differences(self) -> str:
        """The options that differ between the runs."""
        flat = [_flat(view.options or view.launch_options) for view in self.views]
        names = list(dict.fromkeys(name for each in flat for name in each))
        rows = {
            name: [_value(each.get(name)) for each in flat]
            for name in names
            if any(each.get(name) != flat[0].get(name) for each in flat)
        }
        heads = [letter(position) for position in range(len(self.views))]
        content = side_by_side(heads, rows) if rows else "<p>None. The runs have the same options.</p>"
        return f"<h3>Options that differ</h3>{content}"


def letter(index: int) -> str:
    """The letter of a column."""
    return chr(ord("A") + index)


def compared_step(view: RunView) -> int | None:
    """The step whose samples are compared: the recommended one, else the last; None without samples."""
    steps = sampled_steps(view.record)
    suggestion = view.read_file(Suggestion)
    suggested = None if suggestion is None else suggestion.step
    return suggested if suggested in steps else max(steps, default=None)


def _cells(runs: Sequence[Mapping[tuple[str, int], Sample]], key: tuple[str, int]) -> list[str]:
    """The image of each run for a prompt and seed."""
    return [sample_image(each[key], key[0]) for each in runs]


def side_by_side(heads: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """A table with a column for each run; cells are HTML, heads and names are text."""
    top = "".join(f"<th scope='col'>{_text(head)}</th>" for head in heads)
    body = "".join(
        f"<tr><th scope='row'>{_text(name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        for name, cells in rows.items()
    )
    return f'<div class="scroll"><table class="plain"><thead><tr><th></th>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _samples(view: RunView, step: int | None) -> dict[tuple[str, int], Sample]:
    return {} if step is None else {(each.prompt, each.seed): each for each in samples(view.record, step)}


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    return dict(_options(options))


def _options(options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for group, fields in options.items():
        for name, value in fields.items() if isinstance(fields, dict) else ():
            if name not in IGNORED_OPTIONS:
                yield f"{group}: {name}", value


def _value(value: Any) -> str:
    if isinstance(value, list):
        words = ", ".join(map(str, value))
    else:
        named = {None: "default", True: "yes", False: "no"}
        words = named[value] if value is None or isinstance(value, bool) else _number(value)
    return _text(words if len(words) <= LONGEST_VALUE else f"{words[: LONGEST_VALUE - 1]}…")


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _text(words: str) -> str:
    return html.escape(words)
