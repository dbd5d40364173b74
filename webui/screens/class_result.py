"""Classify, part 3: a classifier's accuracy, confusion matrix, mistakes, calibration and files."""

from __future__ import annotations

from typing import Any

import gradio as gr

from pipelines.errors import InputError
from webui import class_files, class_html, class_runs
from webui.class_results import Result, result_of
from webui.class_runs import ClassifyContext
from webui.context import QUIET, show_errors
from webui.runs import RunView

EMPTY = "<p class='empty'>No classifier yet. Train one first.</p>"
WAITING = "<p class='empty'>This classifier is {state}. Its result appears here when it is done.</p>"


def build(context: ClassifyContext) -> None:
    """Put the part into the open tab."""
    parts = _layout()
    _wire(context, parts)


def _layout() -> dict[str, Any]:
    parts: dict[str, Any] = {"empty": gr.HTML(EMPTY, elem_id="classify-no-result")}
    with gr.Column(visible=False, elem_id="classify-result") as parts["all"]:
        parts["method"] = gr.Dropdown(
            label="Method",
            info="The method that the figures below describe.",
            filterable=False,
            interactive=True,
            elem_id="classify-method",
        )
        parts["words"] = gr.HTML(elem_id="classify-words")
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=300):
                gr.HTML("<h3>Confusion matrix</h3>")
                parts["confusion"] = gr.HTML(
                    js_on_load=class_html.MATRIX_JS, apply_default_css=False, elem_id="classify-confusion"
                )
            with gr.Column(scale=2, min_width=300):
                gr.HTML("<h3>Accuracy per class</h3>")
                parts["classes"] = gr.HTML(elem_id="classify-per-class")
        parts["cell"] = gr.HTML(elem_id="classify-cell")
        gr.HTML("<h3>Most confident mistakes</h3>")
        parts["worst"] = gr.HTML(elem_id="classify-worst")
        gr.HTML("<h3>Calibration</h3>")
        parts["calibration"] = gr.HTML(elem_id="classify-calibration")
        parts["reliability"] = gr.HTML(elem_id="classify-reliability")
        gr.HTML("<h3>Comparison of methods</h3>")
        parts["methods"] = gr.HTML(apply_default_css=False, elem_id="classify-methods")
        gr.HTML("<h3>Downloads</h3>")
        with gr.Row(elem_classes="buttons"):
            for name, title in class_files.TITLES.items():
                parts[name] = gr.DownloadButton(title, size="sm", min_width=180, elem_id=f"classify-download-{name}")
    return parts


def _wire(context: ClassifyContext, parts: dict[str, Any]) -> None:
    settings = context.app.settings
    names = ("words", "confusion", "cell", "classes", "worst", "calibration", "reliability", "methods", *class_files.TITLES)
    outputs = [parts[name] for name in ("empty", "all", "method", *names)]
    seen = gr.State(None)

    def load(run_id: str | None, trial: str | None, request: gr.Request) -> tuple[RunView | None, Result | None]:
        view = class_runs.view_of(settings.workspace(request), run_id)
        return view, None if view is None else result_of(view.record, trial)

    @show_errors
    def refresh(run_id: str | None, trial: str | None, before: Any, request: gr.Request) -> list[Any]:
        view, result = load(run_id, trial, request)
        now = None if view is None else (view.id, view.state, result is not None and result.trial.folder)
        if now == before and now is not None:
            return [gr.skip()] * (len(outputs) + 1)
        if result is None:
            return [gr.HTML(_waiting(view), visible=True), gr.Column(visible=False), *[gr.skip()] * (len(names) + 1), now]
        return [gr.HTML(visible=False), gr.Column(visible=True), _methods(result), *_result_updates(result), now]

    @show_errors
    def open_cell(run_id: str, trial: str | None, event: gr.EventData, request: gr.Request) -> str:
        return _cell(load(run_id, trial, request)[1], event)

    given = [context.run, parts["method"]]
    # Loading the images imports the dataset readers, so nothing is loaded before the part is opened.
    opened = [context.refresh_trigger.change, parts["method"].input]
    gr.on(opened, refresh, [*given, seen], [*outputs, seen], trigger_mode="always_last", **QUIET)
    parts["confusion"].select(open_cell, given, [parts["cell"]], **QUIET)


def _waiting(view: RunView | None) -> str:
    return EMPTY if view is None else WAITING.format(state=view.state)


def _cell(result: Result | None, event: gr.EventData) -> str:
    """The images of the cell that was clicked in the confusion matrix."""
    labels = range(len(result.classes)) if result is not None else range(0)
    true, predicted = (getattr(event, name, None) for name in ("true", "predicted"))
    if not all(isinstance(label, int) and label in labels for label in (true, predicted)):
        raise InputError("This number belongs to another classifier. Reload the page.")
    return class_html.cell_images(result, true, predicted)


def _methods(result: Result) -> gr.Dropdown:
    """A dropdown of the methods of all splits."""
    several = len(result.report.seeds) > 1 or len(result.report.shots) > 1
    choices = []
    for one in result.report.trials:
        split = f" ({one.shots} images per class, seed {one.seed})" if several else ""
        choices.append((class_html.method_title(one.method) + split, one.folder))
    return gr.Dropdown(choices, value=result.trial.folder)


def _result_updates(result: Result) -> list[Any]:
    """Updates of everything below the choice of the method."""
    files = class_files.downloads(result)
    return [
        class_html.result_summary(result),
        class_html.confusion(result),
        "",
        class_html.per_class(result),
        class_html.worst_mistakes(result),
        class_html.calibration(result),
        class_html.reliability(result),
        class_html.methods_table(result),
        *(gr.DownloadButton(value=files.get(name), visible=name in files) for name in class_files.TITLES),
    ]
