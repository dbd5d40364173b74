"""The screen Train: the progress of the selected run, and the buttons that its state allows."""

from __future__ import annotations

from collections.abc import Hashable
from math import ceil
from typing import Any

import gradio as gr

from training.runs.record import RunRecord
from training.runs.run_files import CROSS_VALIDATION, FOLDS, DryRunReport, ImageChecks
from training.runs.run_log import log_tail
from training.subject.measured import heldout_curve, newest_sheet, sampled_steps, samples, subject_images
from webui import launching
from webui.context import QUIET, AppContext
from webui.plots import PALE, Plot, line_plot, running_mean, value_tables
from webui.render import LazyUpdate, component, lazy_text, render, sample_image, text, thumbnail, updates
from webui.runs import RunView, duration, series, view_of

ASKED = {
    "stop": "The run stops after the current step and saves a checkpoint.",
    "sample": "Sample images are generated after the current step.",
    "save": "A checkpoint is saved after the current step.",
}
BUTTONS = {"stop": "Stop", "sample": "Sample now", "save": "Save now", "resume": "Resume", "next": "Judge the result"}
# The screen with the result of a run, and the words on the button that opens it.
RESULTS = {
    "subject": ("judge", "Judge the result"),
    "classify": ("classify", "See the classifier"),
    "arena": ("arena", "See the comparison"),
}
# The title, the series and how to read it, of each plot.
STEPS, MEAN = "each step", "running mean"
PLOTS = {
    "loss": ("Training loss", (STEPS, MEAN), "Lower is better. Single steps vary much; the mean shows the trend."),
    "heldout": ("Validation loss", ("validation loss",), "Measured on photos that are not trained on. Lower is better."),
    "rate": ("Learning rate", ("learning rate",), ""),
}
# The running mean of the loss covers this share of the steps, and at least so many.
SMOOTHED, LEAST_SMOOTHED = 1 / 16, 5
SHEET_SIDE = 1024


def contents(view: RunView | None, log_open: bool = False) -> dict[str, LazyUpdate]:
    """The current content of the screen by the names of its outputs."""
    actions = () if view is None else (*view.actions, *(("next",) if view.state == "done" else ()))
    buttons = {name: component(gr.Button, name in actions) for name in BUTTONS}
    state = {"state": text(render("train.html", view=view)), "log_frame": component(gr.Accordion, view is not None), **buttons}
    if view is None:
        plots = {name: Plot(title, {}, (0.0, 1.0)).update() for name, (title, *_) in PLOTS.items()}
        return state | plots | {name: text("") for name in ("values", "facts", "samples", "log")}
    plots, facts = losses(view), {"report": view.read_file(DryRunReport), "left_out": view.status.expected_left_out}
    return {
        **state,
        "next": component(gr.Button, "next" in actions, value=RESULTS[view.task][1]),
        **{name: plot.update() for name, plot in plots.items()},
        "values": text(value_tables([*plots.values()])),
        "facts": text(render("train_facts.html", **facts, duration=duration, notes=notes(view))),
        "samples": sample_images(view),
        "log": text(render("log.html", log=log_tail(view.record)) if log_open else ""),
    }


def current_part(view: RunView) -> RunRecord:
    """The record whose losses are plotted: the current fold of cross-validation or trial of an experiment, else the run."""
    status, folder = view.status, view.record.path
    in_fold = status.phase == CROSS_VALIDATION and status.fold is not None
    part = folder / (f"{FOLDS}/{status.fold - 1}" if in_fold else str(status.trial or ""))
    return RunRecord(part) if part.resolve().is_relative_to(folder.resolve()) else view.record


def losses(view: RunView) -> dict[str, Plot]:
    """The training loss with its running mean, the validation loss and the learning rate, by the names of `PLOTS`."""
    part = RunView(current_part(view))
    logged, curve = series(part), [] if part.metrics_error is not None else heldout_curve(part.record)
    points, heldout = logged.get("loss", []), [(float(point.step), point.heldout) for point in curve]
    mean = running_mean(points, max(LEAST_SMOOTHED, ceil(len(points) * SMOOTHED)))
    last = max((x for x, _ in [*points, *heldout]), default=0.0)
    x_range = (0.0, float(part.status.total or last))
    lines_of = {"loss": (points, mean), "heldout": (heldout,), "rate": (logged.get("lr", []),)}
    return {
        name: Plot(title, dict(zip(names, lines_of[name], strict=True)), x_range) for name, (title, names, _) in PLOTS.items()
    }


def notes(view: RunView) -> list[str]:
    """The unused files in the run's folders, and the prompts that were truncated."""
    checks = view.read_file(ImageChecks) or ImageChecks()
    accounts = [account for account in (checks.folder, checks.class_folder) if account is not None]
    sentences = [sentence for account in accounts for sentence in (*account.warnings(), *account.infos())]
    return sentences + [prompt["summary"] for prompt in checks.long_prompts]


def sample_images(view: RunView) -> LazyUpdate:
    """The sample images by step, and the training photos."""
    record, steps = view.record, sampled_steps(view.record)
    changed = [(step, record.samples_at(step).stat().st_mtime_ns) for step in steps]
    sheet = None if steps else newest_sheet(record)

    def make() -> str:
        groups = [(step, samples(record, step)) for step in steps]
        photos, single = subject_images(record), None if sheet is None else thumbnail(sheet, SHEET_SIDE)
        waits = view.is_active and view.task == "subject"
        values = {"groups": groups, "photos": photos, "sheet": single, "waits": waits, "image": sample_image}
        return render("train_samples.html", **values)

    return lazy_text((record.path, *changed, sheet, view.is_active), make)


def build(context: AppContext) -> None:
    """Put the screen into the open tab."""
    components, seen, log_open = _layout(), gr.State({}), gr.State(False)

    def refresh(run_id: str | None, sees: dict[str, Hashable], is_open: bool, request: gr.Request) -> dict[Any, Any]:
        now = contents(view_of(context.settings.workspace(request), run_id), is_open)
        return updates(now, sees, components, seen)

    def act(event: gr.EventData, run_id: str, request: gr.Request) -> list[Any]:
        # An updated button has another id than the one in `components`.
        workspace, action = context.settings.workspace(request), event.target.elem_id.removeprefix("train-")
        if action == "next":
            return context.show(workspace, run_id, RESULTS[RunView(workspace.run(run_id)).task][0])
        if action in ("stop", "resume"):
            getattr(launching, action)(workspace, run_id)
        else:
            launching.ask(workspace, run_id, action)
        if action in ASKED:
            gr.Info(ASKED[action])
        return context.show(workspace, run_id)

    inputs, outputs = [context.train_run, seen, log_open], [*components.values(), seen]
    refreshing = {"fn": refresh, "inputs": inputs, "outputs": outputs, **QUIET}
    context.refreshes["train"].click(trigger_mode="always_last", **refreshing)
    components["log_frame"].expand(lambda: True, outputs=log_open, api_visibility="private").then(**refreshing)
    components["log_frame"].collapse(lambda: False, outputs=log_open, api_visibility="private")
    clicks = [components[name].click for name in BUTTONS]
    gr.on(clicks, act, context.train_run, context.outputs, api_visibility="private").then(**refreshing)


def _layout() -> dict[str, Any]:
    """The screen's components by name."""
    components: dict[str, Any] = {"state": gr.HTML(elem_id="train-state")}
    with gr.Row(elem_classes="buttons"):
        for name, label in BUTTONS.items():
            variant = {"stop": "stop", "resume": "primary", "next": "primary"}.get(name, "secondary")
            components[name] = gr.Button(label, variant=variant, visible=False, elem_id=f"train-{name}", min_width=180, scale=0)
    with gr.Row():
        with gr.Column(min_width=320, elem_id="train-plots"):
            for name, (title, names, hint) in PLOTS.items():
                components[name] = line_plot(title, names, hint, {STEPS: PALE}, elem_id=f"train-{name}")
            components["values"] = gr.HTML(visible=False)
            components["facts"] = gr.HTML(visible=False, elem_id="train-facts")
        with gr.Column(min_width=320):
            components["samples"] = gr.HTML(visible=False, elem_id="train-samples")
    with gr.Accordion("Log", open=False, visible=False, elem_id="train-log") as components["log_frame"]:
        components["log"] = gr.HTML(visible=False)
    return components
