"""The lower part of the screen Runs: two to four runs of one kind side by side, and one prompt for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import Markup

from pipelines.errors import InputError
from training.runs.naming import method_name
from training.subject.measured import Sample, sampled_steps, samples
from webui.context import QUIET, AppContext
from webui.form_schema import written
from webui.generation import AT_ONCE, generated, reference_of, request_for, steps_of
from webui.plots import COLOURS, Plot, line_plot, running_mean, value_tables
from webui.render import parts, sample_image, thumbnail
from webui.runs import RunView, accuracies, in_percent, series, views
from webui.screens import judge
from webui.workspace import Workspace

MIN_RUNS, LETTERS = 2, "ABCD"
# By title, the column of each plot and how to read it.
PLOTS = {
    "Training loss": "The running mean of the loss on the photos. Compare the validation loss to choose a run.",
    **{title: hint for title, (_, hint) in judge.PLOTS.items() if title != "Memorisation"},
}
SMOOTHED = 1 / 16
LONGEST_VALUE = 120
# Options that differ for every run.
IGNORED_OPTIONS = frozenset({"output_dir", "resume_from_checkpoint", "cache_dir", "hub_token"})
OTHER_IMAGES = (
    "These runs have no sample images with the same prompt and seed, so they cannot be compared. "
    "Generate a prompt of your choice with all of them below."
)
NO_ACCURACY = "There is no accuracy yet. A run writes its report when it is done."
NO_ADAPTER = "no saved adapter yet"
SAME_OPTIONS = "None. The runs have the same options."


def comparable(workspace: Workspace, ids: Sequence[str]) -> list[RunView]:
    """The runs with these ids.

    Raises: InputError if they are not two to four, one does not exist or cannot be read, or their tasks differ.
    """
    unique = list(dict.fromkeys(ids))
    if not MIN_RUNS <= len(unique) <= len(LETTERS):
        raise InputError(f"Choose {MIN_RUNS} to {len(LETTERS)} runs to compare, got {len(unique)}.")
    runs = [RunView(workspace.run(run_id)) for run_id in unique]
    if len({view.task for view in runs}) > 1:
        raise InputError("Subject runs and classifiers cannot be compared with each other. Choose runs of the same kind.")
    if errors := [view.metrics_error for view in runs if view.metrics_error]:
        raise InputError(" ".join(errors))
    return runs


def comparison(runs: Sequence[RunView]) -> Markup:
    """The letter of each run, images or accuracies, the options that differ, and the values of the plots for screen readers."""
    legend = parts.facts([(letter, view.label) for letter, view in zip(LETTERS, runs, strict=False)])
    results = _accuracies(runs) if runs[0].task == "classify" else _images(runs)
    return legend + results + _differences(runs) + value_tables([*plots(runs).values()])


def _images(runs: Sequence[RunView]) -> Markup:
    """Images of the same prompt and seed."""
    steps = [_compared_step(view) for view in runs]
    by_run = [_samples(view, step) for view, step in zip(runs, steps, strict=True)]
    common = [key for key in by_run[0] if all(key in each for each in by_run)]
    if not common:
        return parts.warning(OTHER_IMAGES)
    rows = [(*key, [sample_image(each[key], key[0]) for each in by_run]) for key in common]
    return parts.section("Same prompt, same seed", _by_prompt(steps, rows))


def _compared_step(view: RunView) -> int | None:
    """The step whose samples are compared: the recommended one, else the last; None without samples."""
    steps, recommended = sampled_steps(view.record), judge.recommended_step(view)
    return recommended if recommended in steps else max(steps, default=None)


def _samples(view: RunView, step: int | None) -> dict[tuple[str, int], Sample]:
    return {} if step is None else {(each.prompt, each.seed): each for each in samples(view.record, step)}


def _by_prompt(steps: Sequence[int | None], rows: Sequence[tuple[str, int, Sequence[str]]]) -> Markup:
    """A row for each prompt and seed, with a cell for each run; `steps` are those of the runs."""
    names = ["" if step is None else f", step {step}" if step else ", base model" for step in steps]
    heads = ["", *(f"{letter}{name}" for letter, name in zip(LETTERS, names, strict=False))]
    return parts.table(heads, [[f"{prompt} (seed {seed})", *cells] for prompt, seed, cells in rows])


def plots(runs: Sequence[RunView]) -> dict[str, Plot]:
    """The plots by title, with a line for each run; empty ones for classifiers."""
    columns = [_columns(view) for view in runs]
    last = max((step for column in columns for values in column.values() for step in values), default=1)
    lines = {title: [sorted(column.get(title, {}).items()) for column in columns] for title in PLOTS}
    return {title: Plot(title, dict(zip(LETTERS, of_runs, strict=False)), (0.0, float(last))) for title, of_runs in lines.items()}


def _columns(view: RunView) -> dict[str, dict[int, float]]:
    losses = [] if view.task == "classify" else series(view).get("loss", [])
    smoothed = dict(running_mean(losses, max(1, round(len(losses) * SMOOTHED))))
    return ({} if view.task == "classify" else judge.columns(view)) | {"Training loss": smoothed}


def _accuracies(runs: Sequence[RunView]) -> Markup:
    """The test accuracy of each method and number of shots."""
    by_run = [{(row.method, row.shots): in_percent(row.top1) for row in accuracies(view)} for view in runs]
    keys = sorted({key for each in by_run for key in each}, key=str)
    if not keys:
        return parts.warning(NO_ACCURACY)
    rows = [[f"{method_name(key[0])}, {key[1]} images per class", *(each.get(key, "") for each in by_run)] for key in keys]
    hint = "Accuracy on the test images with its 95% confidence interval."
    return parts.section("Accuracy", parts.table(["", *LETTERS[: len(runs)]], rows), hint)


def _differences(runs: Sequence[RunView]) -> Markup:
    """The options that differ."""
    flat = [dict(_options(view.options or view.launch_options)) for view in runs]
    rows = [[name, *(_value(each.get(name)) for each in flat)] for name in dict.fromkeys(chain(*flat))]
    different = [row for row in rows if len(set(row[1:])) > 1]
    table = parts.table(["Option", *LETTERS[: len(runs)]], different) if different else parts.note(SAME_OPTIONS)
    return parts.section("Options that differ", table)


def _options(options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for group, fields in options.items():
        for name, value in fields.items() if isinstance(fields, dict) else ():
            if name not in IGNORED_OPTIONS:
                yield f"{group}: {name}", value


def _value(value: Any) -> str:
    """An option for people; of a path on this machine, only the name."""
    text = Path(value).name if isinstance(value, str) and Path(value).is_absolute() else written(value) or "default"
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}…"


def generated_with_all(workspace: Workspace, runs: Sequence[RunView], prompt: str, seed: int) -> Iterator[Markup]:
    """Generate `prompt` with the adapter of each run from the same seed; yields the table so far.

    Raises: InputError if an adapter or the prompt cannot be used.
    """
    steps = [steps_of(view.record).chosen for view in runs]
    cells = [NO_ADAPTER if step is None else parts.note("generating") for step in steps]
    for index, (view, step) in enumerate(zip(runs, steps, strict=True)):
        if step is None:
            continue
        request = request_for(workspace, [(reference_of(view.id, step), 1.0, None)], prompt=prompt, seed=seed)
        for event in generated(workspace, request):
            if isinstance(event, Path):
                cells[index] = parts.image(thumbnail(event), prompt, "pixel")
            yield _by_prompt(steps, [(prompt, seed, cells)])


def build(context: AppContext) -> None:
    """Put this part into the open tab."""
    _Compare(context)


class _Compare:
    """The components of this part and the handlers of their events."""

    def __init__(self, context: AppContext) -> None:
        self.settings, sent = context.settings, gr.State(None)
        gr.HTML("<h2>Side by side</h2>")
        hint = f"Two to {len(LETTERS)} of the same kind: images, losses, scores and the options that differ."
        limits = {"multiselect": True, "max_choices": len(LETTERS)}
        self.chosen = gr.Dropdown(label="Runs to compare", info=hint, elem_id="runs-compare", **limits)
        small = {"scale": 0, "min_width": 140}
        with gr.Row(elem_classes="buttons"):
            compare = gr.Button("Compare", variant="primary", elem_id="runs-compare-show", **small)
        compared = gr.HTML(visible=False, elem_id="runs-compared", elem_classes="compare")
        with gr.Row():
            colours = dict(zip(LETTERS, COLOURS, strict=True))
            plots = [line_plot(title, LETTERS, hint, colours, min_width=420) for title, hint in PLOTS.items()]
        named = {"open": False, "visible": False, "elem_id": "runs-compare-form"}
        with gr.Accordion("Generate one prompt with all of them", **named) as form:
            with gr.Row(equal_height=True):
                prompt = gr.Textbox(label="Prompt", elem_id="runs-compare-prompt", scale=4)
                named = {"precision": 0, "minimum": 0, "scale": 1, "min_width": 100, "elem_id": "runs-compare-seed"}
                seed = gr.Number(0, label="Seed", **named)
            with gr.Row(elem_classes="buttons"):
                generate = gr.Button("Generate", variant="primary", elem_id="runs-compare-generate", **small)
                cancel = gr.Button("Cancel", elem_id="runs-compare-cancel", **small)
            images = gr.HTML(visible=False, elem_id="runs-compare-images", elem_classes="compare")
        context.refreshes["runs"].click(self.choices, sent, [self.chosen, sent], trigger_mode="multiple", **QUIET)
        begun = compare.click(self.compare, self.chosen, [compared, form, prompt, images, *plots], api_visibility="private")
        begun.success(self.plot, self.chosen, plots, **QUIET)
        given = [self.chosen, prompt, seed]
        started = generate.click(self.generate_all, given, images, api_visibility="private", **AT_ONCE)
        cancel.click(None, cancels=[started], api_visibility="private")

    def choices(self, before: Any, request: gr.Request) -> list[Any]:
        """The runs, sent if they have changed."""
        now = [(view.label, view.id) for view in views(self.settings.workspace(request))]
        return [gr.skip() if now == before else gr.Dropdown(choices=now), now]

    def compare(self, ids: list[str] | None, request: gr.Request) -> list[Any]:
        """The comparison and the form below it; the plots become empty, since they show other runs only after that."""
        runs = comparable(self.settings.workspace(request), ids or [])
        is_subject = runs[0].task == "subject"
        prompt = gr.Textbox(value=str(runs[0].chosen("data", "instance_prompt") or "")) if is_subject else gr.skip()
        form = [gr.Accordion(visible=is_subject), prompt, gr.HTML(value="", visible=False)]
        return [gr.HTML(value=comparison(runs), visible=True), *form, *(gr.LinePlot(value=None, visible=False) for _ in PLOTS)]

    def plot(self, ids: list[str], request: gr.Request) -> list[Any]:
        """The plots of the compared runs."""
        return [plot.update().make() for plot in plots(comparable(self.settings.workspace(request), ids)).values()]

    def generate_all(self, ids: list[str] | None, prompt: str, seed: float | None, request: gr.Request) -> Iterator[Any]:
        """The images of the prompt so far."""
        workspace = self.settings.workspace(request)
        for table in generated_with_all(workspace, comparable(workspace, ids or []), prompt, int(seed or 0)):
            yield gr.HTML(value=table, visible=True)
