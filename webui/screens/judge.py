"""The screen Judge: the checkpoints of the selected run side by side, their scores, and the recommended step."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from training.subject.measured import sampled_steps, samples, saved_steps
from webui import verdict
from webui.context import AppContext, LazyUpdate, button, frame, keys, lazy_text, show_errors, text, updates
from webui.generation import steps_of
from webui.render import enlarged
from webui.runs import RunView
from webui.screens.train import view_of

EMPTY = """<div class="empty"><p><b>There are no results yet.</b></p><p>Once a run has started, its sample images appear here
side by side with the scores of each step.</p></div>"""
CLASSIFIER = """<div class="empty"><p><b>This run is a classifier.</b></p><p>Its accuracy and confusion matrix are on the screen
Classify.</p></div>"""
COMPARE = """<h3>Before and after</h3><p class="quiet">Left: the base model. Right: the selected step. Drag the line to
compare. Click an image in the table below to show it here.</p>"""
# The table is replaced at updates, so its container listens for all cells.
CHOOSING = """element.addEventListener('click', event => {
  const cell = event.target.closest('button[data-step]');
  if (!cell) return;
  trigger('click', {step: Number(cell.dataset.step), place: Number(cell.dataset.place)});
  document.getElementById('judge-compare').scrollIntoView({block: 'nearest', behavior: 'smooth'});
});"""
NAMES = (
    "empty",
    "suggestion",
    "table",
    "frame",
    "step",
    "place",
    "slider",
    "use",
    "curves",
    "figures",
    "details",
    "papers",
    "card",
)


@dataclass(frozen=True)
class Selection:
    """The step and the prompt shown in the comparison.

    Args:
        steps: the steps with samples, without the base model.
        step, prompt_index: the selected step and prompt; None without samples.
        forced: whether the page's selection must be replaced, because it belongs to another run or is gone.
    """

    steps: tuple[int, ...]
    step: int | None
    prompt_index: int | None
    forced: bool


def selection_of(view: RunView, step: int | None, prompt_index: int | None, outdated: bool) -> Selection:
    """The page's selection, else the recommended step, else the newest.

    Args:
        outdated: whether the page's selection is for another run or recommendation.
    """
    steps = tuple(each for each in sampled_steps(view.record) if each > 0)
    if not steps:
        return Selection((), None, None, outdated)
    suggested, count = verdict.suggested_step(view.record), len(samples(view.record, steps[-1]))
    forced = outdated or step not in steps or not isinstance(prompt_index, int) or not 0 <= prompt_index < count
    if forced:
        step, prompt_index = (suggested if suggested in steps else steps[-1]), min(1, count - 1)
    return Selection(steps, step, prompt_index, forced)


def parts(view: RunView | None, step: int | None, prompt_index: int | None, outdated: bool) -> dict[str, LazyUpdate]:
    """The current content of the screen by the names of its outputs."""
    if view is None or view.task == "classify":
        return _nothing_to_judge(EMPTY if view is None else CLASSIFIER)
    record, selection = view.record, selection_of(view, step, prompt_index, outdated)
    changed = tuple((each, record.samples_at(each).stat().st_mtime_ns) for each in sampled_steps(record))
    suggested = verdict.suggested_step(record)
    selected = None if selection.step is None else (selection.step, selection.prompt_index)
    card = verdict.card(record)
    return {
        "empty": text(""),
        "suggestion": text(verdict.suggestion(view)),
        "table": lazy_text((record.path, *changed, suggested, selected), lambda: verdict.sample_table(record, selected)),
        **_comparison(view, selection, suggested),
        "curves": text(verdict.curves(record)),
        "figures": text(verdict.figures(record)),
        "details": frame(bool(card)),
        "papers": text(verdict.certificate(record) if card else ""),
        "card": _markdown(card),
    }


def _nothing_to_judge(why: str) -> dict[str, LazyUpdate]:
    outputs = {name: text("") for name in NAMES}
    hidden = {"step": _dropdown([], None, True), "place": _dropdown([], None, True), "slider": _slider(None, None)}
    framed = {"frame": _group(False), "details": frame(False), "use": button(False), "card": _markdown("")}
    return {**outputs, **hidden, **framed, "empty": text(why)}


def _comparison(view: RunView, selection: Selection, suggested: int | None) -> dict[str, LazyUpdate]:
    """The updates of the comparison."""
    usable = selection.step is not None and selection.step in saved_steps(view.record)
    newest = samples(view.record, selection.step) if selection.step is not None else []
    steps = [(f"step {each} (recommended)" if each == suggested else f"step {each}", each) for each in selection.steps]
    return {
        "frame": _group(selection.step is not None),
        "step": _dropdown(steps, selection.step, selection.forced),
        "place": _dropdown(
            [(each.prompt or "image", prompt_index) for prompt_index, each in enumerate(newest)],
            selection.prompt_index,
            selection.forced,
        ),
        "slider": _slider(view, selection),
        "use": button(usable, f"Use step {selection.step}"),
    }


def _dropdown(choices: list[tuple[str, int]], value: int | None, forced: bool) -> LazyUpdate:
    """A dropdown; its value is sent only if it must be replaced, so that a selection by the user is not overwritten."""
    key = (tuple(choices), value) if forced else tuple(choices)
    return LazyUpdate(key, lambda: gr.Dropdown(choices=choices, value=value) if forced else gr.Dropdown(choices=choices))


def _group(visible: bool) -> LazyUpdate:
    return LazyUpdate(visible, lambda: gr.Column(visible=visible))


def _markdown(value: str) -> LazyUpdate:
    return LazyUpdate(value, lambda: gr.Markdown(value))


def _slider(view: RunView | None, selection: Selection | None) -> LazyUpdate:
    """The images of the base model and of the selected step with the same prompt and seed."""
    if view is None or selection is None or selection.step is None:
        return LazyUpdate(None, lambda: gr.ImageSlider(value=None))
    both = [samples(view.record, step)[selection.prompt_index :][:1] for step in (0, selection.step)]
    if not all(both):
        return LazyUpdate(None, lambda: gr.ImageSlider(value=None))
    paths = [images[0].path for images in both]
    key = (*paths, *(path.stat().st_mtime_ns for path in paths))
    return LazyUpdate(key, lambda: gr.ImageSlider(value=tuple(enlarged(path) for path in paths)))


def build(context: AppContext) -> None:
    """Put the screen into the open tab."""
    outputs = _layout()
    seen = gr.State({})

    @show_errors
    def refresh(
        run_id: str | None, step: int | None, prompt_index: int | None, seen: dict[str, Hashable], request: gr.Request
    ) -> list[Any]:
        view = view_of(context.settings.workspace(request), run_id)
        about = None if view is None else (view.id, verdict.suggested_step(view.record))
        now = parts(view, step, prompt_index, "about" not in seen or seen["about"] != about)
        return [*updates(now, seen, outputs), keys(now) | {"about": about}]

    gr.on(
        [context.refresh_triggers["judge"].change, outputs["step"].change, outputs["place"].change],
        refresh,
        inputs=[context.run, outputs["step"], outputs["place"], seen],
        outputs=[*outputs.values(), seen],
        trigger_mode="always_last",
        show_progress="hidden",
        api_visibility="private",
    )

    @show_errors
    def choose(event: gr.EventData) -> list[Any]:
        # The base model is always on the left.
        step = gr.skip() if event.step == 0 else int(event.step)
        return [step, int(event.place)]

    outputs["table"].click(choose, outputs=[outputs["step"], outputs["place"]], show_progress="hidden", api_visibility="private")

    @show_errors
    def use(run_id: str, step: int, request: gr.Request) -> list[Any]:
        steps = steps_of(context.settings.workspace(request).run(run_id))
        # Use may not have been refreshed since the step was saved, and Gradio refuses a value that is not among the choices.
        return [gr.Tabs(selected="use"), gr.Dropdown(choices=steps.choices, value=step), [run_id, step]]

    to_use = [context.tabs, context.step, context.chosen]
    outputs["use"].click(use, [context.run, outputs["step"]], to_use, api_visibility="private")


def _layout() -> dict[str, Any]:
    """The screen's components by name."""
    components: dict[str, Any] = {"empty": gr.HTML(EMPTY, elem_id="judge-empty")}
    components["suggestion"] = gr.HTML(visible=False, elem_id="judge-suggestion")
    with gr.Column(visible=False, elem_id="judge-compare") as components["frame"]:
        gr.HTML(COMPARE)
        with gr.Row():
            with gr.Column(min_width=280):
                components["step"] = gr.Dropdown(label="Step", elem_id="judge-step", interactive=True)
                components["place"] = gr.Dropdown(label="Prompt", elem_id="judge-prompt", interactive=True)
                components["use"] = gr.Button("Use this step", variant="primary", visible=False, elem_id="judge-use")
            with gr.Column(min_width=280, scale=2):
                components["slider"] = gr.ImageSlider(
                    elem_id="judge-slider", interactive=False, show_label=False, buttons=[], max_height=420
                )
    components["table"] = gr.HTML(visible=False, elem_id="judge-samples", js_on_load=CHOOSING)
    components["curves"] = gr.HTML(visible=False, elem_id="judge-curves")
    components["figures"] = gr.HTML(visible=False, elem_id="judge-figures")
    components["details"] = gr.Accordion("Model card and certificate", open=False, visible=False, elem_id="judge-card")
    with components["details"]:
        components["papers"] = gr.HTML(visible=False)
        components["card"] = gr.Markdown()
    return {name: components[name] for name in NAMES}
