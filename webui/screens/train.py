"""The screen Train: the progress of the selected run, and the buttons that its state allows."""

from __future__ import annotations

import html
from collections.abc import Callable, Hashable
from typing import Any

import gradio as gr

from pipelines.errors import InputError
from training.subject.measured import Sample, newest_sheet, sampled_steps, samples, subject_images
from webui import launching, progress
from webui.context import AppContext, LazyUpdate, button, frame, keys, lazy_text, show_errors, text, updates
from webui.photo_account import photo_account
from webui.render import sample_image, thumbnail
from webui.runs import RunView
from webui.workspace import Workspace

EMPTY = """<div class="empty"><p><b>Nothing has been trained yet.</b></p><p>Add a few photos, review them under Check, and press
Train there. The progress then appears here.</p></div>"""
WAITING = """<div class="empty"><p>Sample images appear here: first from the base model, then at regular intervals during
training.</p></div>"""
YOURS = "one of your photos"
ASKED = {
    "stop": "The run stops after the current step and saves a checkpoint.",
    "sample": "Sample images are generated after the current step.",
    "save": "A checkpoint is saved after the current step.",
}
JUDGE = "Judge the result"
BUTTONS = {"stop": "Stop", "sample": "Sample now", "save": "Save now", "resume": "Resume"}


def parts(view: RunView | None, log_open: bool = False) -> dict[str, LazyUpdate]:
    """The current content of the screen by the names of its outputs."""
    if view is None:
        outputs = {name: text("") for name in ("head", "bar", "loss", "cost", "photos", "samples", "log")}
        hidden = {name: button(False) for name in (*BUTTONS, "next")}
        return {"empty": text(EMPTY), **outputs, **hidden, "log_frame": frame(False)}
    return {
        "empty": text(""),
        "head": text(progress.head(view)),
        "bar": text(progress.bar(view)),
        **{name: button(name in view.actions) for name in BUTTONS},
        "next": _next(view),
        "loss": text(progress.losses(view)),
        "cost": text(progress.cost(view.record)),
        "photos": text(photo_account(view)),
        "samples": _samples(view),
        "log_frame": frame(True),
        "log": text(f'<pre class="log">{html.escape(launching.log_tail(view.record))}</pre>' if log_open else ""),
    }


def _next(view: RunView) -> LazyUpdate:
    """The button that opens the screen with the results."""
    label = "See the classifier" if view.task == "classify" else JUDGE
    return button(view.state == "done", label)


def _samples(view: RunView) -> LazyUpdate:
    """The sample images, newest step first, and the training photos."""
    record = view.record
    changed = [(step, record.samples_at(step).stat().st_mtime_ns) for step in sampled_steps(record)]
    sheet = None if changed else newest_sheet(record)
    key = (record.path, *changed, sheet, view.task, view.is_active)
    if changed:
        return lazy_text(key, lambda: _sections(view))
    return lazy_text(key, lambda: _waiting(view) if sheet is None else _sheet(thumbnail(sheet, 1024)))


def _sections(view: RunView) -> str:
    newest, *older = sampled_steps(view.record)[::-1]
    rows = [f"<h3>{_of_step(newest)}</h3>{_grid(samples(view.record, newest), 'large')}"]
    rows += [f"<h4>{_of_step(step)}</h4>{_grid(samples(view.record, step))}" for step in older]
    photos = subject_images(view.record)
    rows += [f"<h4>Your photos, as the model sees them</h4>{_grid(photos)}"] if photos else []
    return f"<section aria-label='sample images'>{''.join(rows)}</section>"


def _of_step(step: int) -> str:
    return f"After step {step}" if step else "Before training"


def _grid(images: list[Sample], css: str = "") -> str:
    cells = "".join(
        f"<figure>{sample_image(each, each.prompt or YOURS)}"
        f"{f'<figcaption>{html.escape(each.prompt)}</figcaption>' if css else ''}</figure>"
        for each in images
    )
    return f'<div class="pictures {css}">{cells}</div>'


def _sheet(source: str) -> str:
    return f'<div class="scroll"><img src="{source}" alt="sample images"></div>'


def _waiting(view: RunView) -> str:
    if view.task == "classify" or not view.is_active:
        return ""
    return WAITING


def view_of(workspace: Workspace, run_id: str | None) -> RunView | None:
    """The selected run; None if there is none, or it was deleted."""
    try:
        return RunView(workspace.run(run_id)) if run_id else None
    except InputError:
        return None


def build(context: AppContext) -> None:
    """Put the screen into the open tab."""
    outputs = _layout()
    seen, log_open = gr.State({}), gr.State(False)

    @show_errors
    def refresh(run_id: str | None, seen: dict[str, Hashable], log_open: bool, request: gr.Request) -> list[Any]:
        view = view_of(context.settings.workspace(request), run_id)
        now = parts(view, log_open)
        return [*updates(now, seen, outputs), keys(now)]

    refreshing = {
        "fn": refresh,
        "inputs": [context.run, seen, log_open],
        "outputs": [*outputs.values(), seen],
        "show_progress": "hidden",
        "api_visibility": "private",
    }
    context.refresh_triggers["train"].change(trigger_mode="always_last", **refreshing)
    outputs["log_frame"].expand(lambda: True, outputs=log_open, api_visibility="private").then(**refreshing)
    outputs["log_frame"].collapse(lambda: False, outputs=log_open, api_visibility="private")
    _wire_buttons(context, outputs, refreshing)


def _wire_buttons(context: AppContext, buttons: dict[str, Any], refreshing: dict[str, Any]) -> None:
    """Attach the buttons; each refreshes the screen afterwards.

    Args:
        buttons: the screen's components by name.
        refreshing: the arguments of the listener that refreshes.
    """
    for action in ("stop", "sample", "save"):
        buttons[action].click(_asking(context, action), context.run, api_visibility="private").then(**refreshing)

    @show_errors
    def resume(run_id: str, request: gr.Request) -> list[dict[str, object]]:
        workspace = context.settings.workspace(request)
        launching.resume(workspace, run_id)
        return context.show(workspace, run_id)

    buttons["resume"].click(resume, context.run, context.outputs, api_visibility="private").then(**refreshing)

    @show_errors
    def open_results(run_id: str, request: gr.Request) -> gr.Tabs:
        view = view_of(context.settings.workspace(request), run_id)
        return gr.Tabs(selected="classify" if view is not None and view.task == "classify" else "judge")

    buttons["next"].click(open_results, context.run, context.tabs, api_visibility="private")


def _layout() -> dict[str, Any]:
    """The screen's components by name."""
    components: dict[str, Any] = {"empty": gr.HTML(EMPTY, elem_id="train-empty")}
    components["head"] = gr.HTML(visible=False, elem_id="train-phase")
    components["bar"] = gr.HTML(visible=False, elem_id="train-bar")
    with gr.Row(elem_classes="buttons"):
        for name, label in BUTTONS.items():
            variant = {"stop": "stop", "resume": "primary"}.get(name, "secondary")
            components[name] = gr.Button(label, variant=variant, visible=False, elem_id=f"train-{name}", min_width=140, scale=0)
        components["next"] = gr.Button(JUDGE, variant="primary", visible=False, elem_id="train-next", min_width=160, scale=0)
    with gr.Row():
        with gr.Column(min_width=320):
            components["loss"] = gr.HTML(visible=False, elem_id="train-loss")
            components["cost"] = gr.HTML(visible=False, elem_id="train-cost")
            components["photos"] = gr.HTML(visible=False, elem_id="train-photos")
        with gr.Column(min_width=320):
            components["samples"] = gr.HTML(visible=False, elem_id="train-samples")
    components["log_frame"] = gr.Accordion("Log", open=False, visible=False, elem_id="train-log")
    with components["log_frame"]:
        components["log"] = gr.HTML(visible=False)
    return components


def _asking(context: AppContext, action: str) -> Callable[[str, gr.Request], None]:
    """The handler of a button that sends the run a request."""

    @show_errors
    def ask(run_id: str, request: gr.Request) -> None:
        workspace = context.settings.workspace(request)
        if action == "stop":
            launching.stop(workspace, run_id)
        else:
            launching.ask(workspace, run_id, action)
        gr.Info(ASKED[action])

    return ask
