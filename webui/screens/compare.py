"""The lower part of the screen Runs: two to four runs of one kind side by side, and one prompt for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import Markup

from pipelines.errors import InputError
from training.runs.naming import method_name
from training.subject.measured import Sample, sampled_steps, samples
from webui.context import QUIET, AppContext
from webui.generation import reference_of, request_for, steps_of
from webui.inference_worker import WORKER
from webui.plots import COLOURS, Plot, line_plot, running_mean
from webui.render import parts, sample_image, thumbnail
from webui.runs import RunView, accuracies, in_percent, series, views
from webui.screens import judge
from webui.workspace import Settings, Workspace

MIN_RUNS, LETTERS = 2, "ABCD"
# By title, the column of each plot and how to read it.
PLOTS = {
    "Training loss": "The running mean of the loss on the photos. Compare the validation loss to choose a run.",
    "Validation loss": "The loss on a photo that is not trained on. Lower is better.",
    "Image similarity (CLIP-I)": "How similar the images are to the photos. Higher is better.",
    "Prompt similarity (CLIP-T)": "How well the images follow their prompts. Higher is better.",
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
    """The letter of each run, images or accuracies, and the options that differ."""
    legend = parts.facts([(letter, view.label) for letter, view in zip(LETTERS, runs, strict=False)])
    return legend + (_accuracies(runs) if runs[0].task == "classify" else _images(runs)) + _differences(runs)


def _images(runs: Sequence[RunView]) -> Markup:
    """Images of the same prompt and seed, from the recommended or last step of each run."""
    steps = [compared_step(view) for view in runs]
    by_run = [_samples(view, step) for view, step in zip(runs, steps, strict=True)]
    common = [key for key in by_run[0] if all(key in each for each in by_run)]
    if not common:
        return parts.warning(OTHER_IMAGES)
    rows = [[_prompt(*key), *(sample_image(each[key], key[0]) for each in by_run)] for key in common]
    return parts.section("Same prompt, same seed", parts.table(_heads(steps), rows))


def _heads(steps: Sequence[int | None]) -> list[str]:
    names = ["" if step is None else f", step {step}" if step else ", base model" for step in steps]
    return ["", *(f"{letter}{name}" for letter, name in zip(LETTERS, names, strict=False))]


def compared_step(view: RunView) -> int | None:
    """The step whose samples are compared: the recommended one, else the last; None without samples."""
    steps, recommended = sampled_steps(view.record), judge.recommended_step(view)
    return recommended if recommended in steps else max(steps, default=None)


def _samples(view: RunView, step: int | None) -> dict[tuple[str, int], Sample]:
    return {} if step is None else {(each.prompt, each.seed): each for each in samples(view.record, step)}


def _prompt(prompt: str, seed: int) -> str:
    return f"{prompt} (seed {seed})"


def plots(runs: Sequence[RunView]) -> dict[str, Plot]:
    """The plots by title, with a line for each run; empty ones for classifiers."""
    columns = [_columns(view) for view in runs]
    last = max((step for column in columns for values in column.values() for step in values), default=1)
    plots = {}
    for title in PLOTS:
        lines = {letter: sorted(column.get(title, {}).items()) for letter, column in zip(LETTERS, columns, strict=False)}
        plots[title] = Plot(title, lines, (0.0, float(last)))
    return plots


def _columns(view: RunView) -> dict[str, dict[int, float]]:
    if view.task == "classify":
        return {}
    losses = series(view).get("loss", [])
    return judge.columns(view) | {"Training loss": dict(running_mean(losses, max(1, round(len(losses) * SMOOTHED))))}


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
    values = {name: [_value(each.get(name)) for each in flat] for each in flat for name in each}
    rows = [[name, *cells] for name, cells in values.items() if len(set(cells)) > 1]
    table = parts.table(["Option", *LETTERS[: len(runs)]], rows) if rows else parts.note("None. The runs have the same options.")
    return parts.section("Options that differ", table)


def _options(options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for group, fields in options.items():
        for name, value in fields.items() if isinstance(fields, dict) else ():
            if name not in IGNORED_OPTIONS:
                yield f"{group}: {name}", value


def _value(value: Any) -> str:
    """An option for people; of a path on this machine, only the name."""
    if value is None or isinstance(value, bool):
        return {None: "default", True: "yes", False: "no"}[value]
    if isinstance(value, str) and Path(value).is_absolute():
        return Path(value).name
    words = ", ".join(map(str, value)) if isinstance(value, list) else f"{value:.6g}" if isinstance(value, float) else str(value)
    return words if len(words) <= LONGEST_VALUE else f"{words[: LONGEST_VALUE - 1]}…"


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
        with closing(WORKER.stream("generate", workspace, request)) as events:
            for event in events:
                if isinstance(event, Path):
                    cells[index] = parts.image(thumbnail(event), prompt, "pixel")
                yield parts.table(_heads(steps), [[_prompt(prompt, seed), *cells]])


def build(context: AppContext) -> None:
    """Put this part into the open tab."""
    settings, components, sent = context.settings, _layout(), gr.State(None)

    def choices(before: Any, request: gr.Request) -> list[Any]:
        now = [(view.label, view.id) for view in views(settings.workspace(request))]
        return [gr.skip() if now == before else gr.Dropdown(choices=now), now]

    context.refreshes["runs"].click(choices, sent, [components["chosen"], sent], trigger_mode="multiple", **QUIET)

    def compare(ids: list[str] | None, request: gr.Request) -> list[Any]:
        return _compared(comparable(settings.workspace(request), ids or []))

    def plot_runs(ids: list[str], request: gr.Request) -> list[Any]:
        return [plot.update().make() for plot in plots(comparable(settings.workspace(request), ids)).values()]

    outputs = [components[name] for name in ("comparison", "form", "prompt", "images", *PLOTS)]
    compared = components["show"].click(compare, components["chosen"], outputs, api_visibility="private")
    compared.success(plot_runs, components["chosen"], [components[title] for title in PLOTS], **QUIET)

    _build_generation(settings, components)


def _build_generation(settings: Settings, components: dict[str, Any]) -> None:
    def generate_all(ids: list[str] | None, prompt: str, seed: float | None, request: gr.Request) -> Iterator[Any]:
        workspace = settings.workspace(request)
        for table in generated_with_all(workspace, comparable(workspace, ids or []), prompt, int(seed or 0)):
            yield gr.HTML(value=table, visible=True)

    inputs = [components[name] for name in ("chosen", "prompt", "seed")]
    device = {"concurrency_id": "device", "concurrency_limit": 1, "api_visibility": "private"}
    started = components["generate"].click(generate_all, inputs, components["images"], **device)
    components["cancel"].click(None, cancels=[started], api_visibility="private")


def _compared(runs: Sequence[RunView]) -> list[Any]:
    """Updates of the comparison, of the form below it, and of the plots, which show other runs only after they were empty."""
    is_subject = runs[0].task == "subject"
    prompt = gr.Textbox(value=str(runs[0].chosen("data", "instance_prompt") or "")) if is_subject else gr.skip()
    form = [gr.Accordion(visible=is_subject), prompt, gr.HTML(value="", visible=False)]
    return [gr.HTML(value=comparison(runs), visible=True), *form, *(gr.LinePlot(value=None, visible=False) for _ in PLOTS)]


def _layout() -> dict[str, Any]:
    """The components by name."""
    gr.HTML("<h2>Side by side</h2>")
    components: dict[str, Any] = {}
    components["chosen"] = gr.Dropdown(
        label="Runs to compare",
        info=f"Two to {len(LETTERS)} of the same kind: images, losses, scores and the options that differ.",
        multiselect=True,
        max_choices=len(LETTERS),
        elem_id="runs-compare",
    )
    small = {"scale": 0, "min_width": 140}
    with gr.Row(elem_classes="buttons"):
        components["show"] = gr.Button("Compare", variant="primary", elem_id="runs-compare-show", **small)
    components["comparison"] = gr.HTML(visible=False, elem_id="runs-compared", elem_classes="compare")
    with gr.Row():
        for title, hint in PLOTS.items():
            components[title] = line_plot(title, LETTERS, hint, dict(zip(LETTERS, COLOURS, strict=True)), min_width=420)
    components["form"] = gr.Accordion(
        "Generate one prompt with all of them", open=False, visible=False, elem_id="runs-compare-form"
    )
    with components["form"]:
        with gr.Row(equal_height=True):
            components["prompt"] = gr.Textbox(label="Prompt", elem_id="runs-compare-prompt", scale=4)
            components["seed"] = gr.Number(
                label="Seed", value=0, precision=0, minimum=0, elem_id="runs-compare-seed", scale=1, min_width=100
            )
        with gr.Row(elem_classes="buttons"):
            components["generate"] = gr.Button("Generate", variant="primary", elem_id="runs-compare-generate", **small)
            components["cancel"] = gr.Button("Cancel", elem_id="runs-compare-cancel", **small)
        components["images"] = gr.HTML(visible=False, elem_id="runs-compare-images", elem_classes="compare")
    return components
