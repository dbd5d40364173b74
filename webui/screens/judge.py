"""The screen Judge: the checkpoints of the selected run side by side, their scores, and the recommended step."""

from __future__ import annotations

import random
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr
from gradio.processing_utils import save_pil_to_cache
from gradio.utils import get_upload_folder
from markupsafe import Markup
from PIL import Image

from pipelines.images import labelled_grid
from training.runs.preferences import Preference, Preferences
from training.runs.run_files import COPY_THRESHOLD, FOLDS, Suggestion
from training.subject.measured import Sample, heldout_curve, sample_scores, sampled_steps, samples, saved_steps, subject_images
from webui.context import QUIET, AppContext
from webui.generation import steps_of
from webui.plots import COLOURS, MARKED, Plot, line_plot
from webui.render import LazyUpdate, component, enlarged, lazy_text, macros, parts, sample_image, text, updates
from webui.runs import RunView, view_of

# By title, the columns of each plot and how to read it. The last two columns of the last one are limits.
PLOTS = {
    "Validation loss": (
        ("Validation loss", "Training loss"),
        "Validation loss is measured on a photo that is not trained on. If it rises while the training loss keeps falling, the "
        "model overfits: it memorises your photos. Lower is better.",
    ),
    "Image similarity (CLIP-I)": (
        ("Image similarity (CLIP-I)",),
        "How similar the images are to your photos. Higher is better. Once it is flat, longer training does not help.",
    ),
    "Prompt similarity (CLIP-T)": (
        ("Prompt similarity (CLIP-T)",),
        "How well the images follow their prompts. Higher is better. It falls when the model overfits to the subject.",
    ),
    "Memorisation": (
        ("Nearest photo", "Nearest outlines", "Limit (photo)", "Limit (outlines)"),
        "How similar an image is to the nearest single photo, by content and by outlines. Above its limit, it nearly copies it.",
    ),
}
SPECIAL_COLOURS = {"Recommended": MARKED, "Limit (photo)": f"{COLOURS[0]}99", "Limit (outlines)": f"{COLOURS[1]}99"}
CLICKS = """element.addEventListener('click', event => {
  const button = event.target.closest('button');
  if (!button) return;
  trigger('click', {...button.dataset});
  if (button.dataset.step) document.getElementById('judge-compare').scrollIntoView({block: 'nearest', behavior: 'smooth'});
});"""
judge = macros("judge.html", sample_image=sample_image)


@dataclass(frozen=True)
class Choices:
    """What a user has chosen to see of a run, and what the user may choose between.

    Args:
        run_id, recommended: the run and its recommended step, for which the rest was chosen.
        step, prompt: the step and the index of the prompt in the comparison.
        pair: two steps in random order and the index of a prompt, for the blind choice; None if there are no two steps.
        result: of the last blind choice, as a sentence.
    """

    run_id: str
    recommended: int | None
    step: int
    prompt: int
    pair: tuple[int, int, int] | None = None
    result: str = ""


def recommended_step(view: RunView) -> int | None:
    """The recommended step; None before training is done."""
    suggestion = view.read_file(Suggestion)
    return None if suggestion is None else suggestion.step


def choices_of(view: RunView, before: Choices | None) -> Choices | None:
    """What was chosen `before` if it is still valid, else the recommended or the newest step; None without samples."""
    steps = sampled_steps(view.record)
    trained = [step for step in steps if step]
    if not trained:
        return None
    recommended, count = recommended_step(view), len(samples(view.record, trained[-1]))
    if before is None or (before.run_id, before.recommended) != (view.id, recommended) or before.step not in trained:
        before = Choices(view.id, recommended, recommended if recommended in trained else trained[-1], min(1, count - 1))
    if before.pair is not None or len(steps) < 2:
        return before
    return replace(before, pair=(*random.sample(steps, 2), random.randrange(count)))


def recommendation(view: RunView) -> Markup:
    """The recommended step with its reasons and warnings, or why there is none."""
    suggestion, error = view.read_file(Suggestion), view.file_error(Suggestion)
    return judge.recommendation(suggestion, error, view.is_active, bool(sampled_steps(view.record)))


def grid(view: RunView, chosen: Choices | None) -> Markup:
    """The samples: a column for each step, the base model first, and a row for each prompt."""
    by_step = {step: samples(view.record, step) for step in sampled_steps(view.record)}
    prompts = [sample.prompt for sample in max(by_step.values(), key=len, default=[])]
    if not prompts:
        return Markup("")
    selected, photos = chosen and (chosen.step, chosen.prompt), subject_images(view.record)
    return judge.grid(by_step, prompts, photos, recommended_step(view), selected)


def columns(view: RunView) -> dict[str, dict[int, float]]:
    """The measurements by name and step; empty if metrics.jsonl cannot be read."""
    if view.metrics_error is not None:
        return {}
    curve, scores = heldout_curve(view.record), sample_scores(view.record)
    return {
        "Validation loss": {point.step: point.heldout for point in curve},
        "Training loss": {point.step: point.seen for point in curve if point.seen is not None},
        "Image similarity (CLIP-I)": {step: each.subject for step, each in scores.items()},
        "Prompt similarity (CLIP-T)": {step: each.prompt for step, each in scores.items()},
        "Nearest photo": {step: each.nearest for step, each in scores.items()},
        "Nearest outlines": {step: each.copy for step, each in scores.items()},
        "Limit (photo)": {step: each.nearest_limit for step, each in scores.items()},
        "Limit (outlines)": dict.fromkeys(scores, COPY_THRESHOLD),
    }


def plots(view: RunView) -> dict[str, Plot]:
    """The plots by title."""
    measured, recommended = columns(view), recommended_step(view)
    last = max([view.status.total or 1, *(step for column in measured.values() for step in column)])
    marked = ("Recommended", None if recommended is None else float(recommended))
    return {
        title: Plot(title, {name: sorted(measured.get(name, {}).items()) for name in names}, (0.0, last), marked)
        for title, (names, _) in PLOTS.items()
    }


def measurements(view: RunView) -> Markup:
    """All measurements: a row for each step with the user's choices, and why a value is missing."""
    if view.metrics_error is not None:
        return parts.warning(view.metrics_error)
    measured = {name: column for name, column in columns(view).items() if column and name not in SPECIAL_COLOURS}
    preferred = (view.read_file(Preferences) or Preferences()).counts()
    has_folds = (view.record.path / FOLDS).is_dir()
    steps = sorted(set().union(*measured.values()))
    return judge.measurements(steps, measured, preferred, recommended_step(view), has_folds) if steps else Markup("")


def record_choice(view: RunView, chosen: Choices, side: str) -> Choices:
    """Store which image of the pair is preferred, and say which steps they were of."""
    *steps, prompt = chosen.pair
    sample = samples(view.record, steps[0])[prompt]
    preferred, other = steps if side == "left" else steps[::-1]
    choice = Preference(sample.prompt, sample.seed, tuple(steps), None if side == "equal" else preferred)
    Preferences.add(view.record.path, choice)
    return replace(chosen, pair=None, result=str(judge.result(preferred, other, side == "equal")).strip())


def blind_choice(view: RunView, chosen: Choices | None) -> Markup:
    """The two images of the pair as buttons."""
    if chosen is None or chosen.pair is None:
        return Markup("")
    *steps, prompt = chosen.pair
    return judge.choice(*(samples(view.record, step)[prompt] for step in steps), chosen.result)


def shared_image(view: RunView, step: int, before: Sample, after: Sample) -> str:
    """A PNG of both images with prompt, seed and subject, in Gradio's cache."""
    images = [Image.open(enlarged(sample.path)).convert("RGB") for sample in (before, after)]
    labels = ["Before: the base model", f"After: step {step}. Prompt: {after.prompt}. Seed {after.seed}."]
    name = f"{view.file_stem(step)}-before-after"
    return save_pil_to_cache(labelled_grid([(view.title, images)], labels), get_upload_folder(), name=name, format="png")


def card(view: RunView) -> str:
    """The model card as Markdown without its YAML header and image; empty before it is written."""
    path = view.record.path / "README.md"
    if not path.is_file():
        return ""
    _, _, body = path.read_text(encoding="utf-8").removeprefix("---").partition("\n---\n")
    return "\n".join(line for line in body.splitlines() if not line.startswith("!["))


def content(view: RunView | None, chosen: Choices | None) -> dict[str, LazyUpdate]:
    """The current content of the screen by the names of its outputs; without a subject run, only why it is empty."""
    if view is None or view.task == "classify":
        return {"empty": text(judge.no_results(view)), "results": component(gr.Column, False)}
    record, words = view.record, card(view)
    changed = tuple((step, record.samples_at(step).stat().st_mtime_ns) for step in sampled_steps(record))
    return {
        "empty": text(""),
        "results": component(gr.Column, True),
        "recommendation": text(recommendation(view)),
        "grid": lazy_text((record.path, changed, chosen and replace(chosen, pair=None, result="")), lambda: grid(view, chosen)),
        "choice": lazy_text((record.path, chosen), lambda: blind_choice(view, chosen)),
        "measurements": text(measurements(view)),
        "details": component(gr.Accordion, bool(words)),
        "card": LazyUpdate(words, lambda: words),
        **_comparison(view, chosen),
        **{name: plot.update() for name, plot in plots(view).items()},
    }


def _comparison(view: RunView, chosen: Choices | None) -> dict[str, LazyUpdate]:
    """The images before and after with the same prompt and seed, and what can be done with them."""
    images = [samples(view.record, step)[chosen.prompt :][:1] for step in (0, chosen.step)] if chosen else [[]]
    if not all(images):
        return {"compare": component(gr.Column, False)}
    (before,), (after,) = images
    step, paths = chosen.step, (before.path, after.path)
    key = (view.title, *paths, *(path.stat().st_mtime_ns for path in paths))
    return {
        "compare": component(gr.Column, True),
        "compared": text(judge.compared(step, after.prompt, after.seed)),
        "slider": LazyUpdate(key, lambda: gr.ImageSlider(value=tuple(map(enlarged, paths)))),
        "use": component(gr.Button, step in saved_steps(view.record), value=f"Use step {step}"),
        "share": LazyUpdate(key, lambda: gr.DownloadButton(value=shared_image(view, step, before, after))),
    }


def build(context: AppContext) -> None:
    """Put the screen into the open tab."""
    components, chosen, seen = _layout(), gr.State(None), gr.State({})
    outputs = [*components.values(), chosen, seen]

    def refresh(run_id: str | None, before: Choices | None, sees: dict[str, Hashable], request: gr.Request) -> dict[Any, Any]:
        view = view_of(context.settings.workspace(request), run_id)
        now = None if view is None or view.task == "classify" else choices_of(view, before)
        return updates(content(view, now), sees, components, seen) | {chosen: now}

    def select(before: Choices, event: gr.EventData) -> Choices:
        # The base model is always on the left.
        return replace(before, step=int(event.step) or before.step, prompt=int(event.prompt))

    def prefer(before: Choices, event: gr.EventData, request: gr.Request) -> Choices:
        return record_choice(RunView(context.settings.workspace(request).run(before.run_id)), before, event.side)

    def use(before: Choices, request: gr.Request) -> list[Any]:
        steps = steps_of(context.settings.workspace(request).run(before.run_id))
        # Use may not have been refreshed since the step was saved, and Gradio refuses a value that is not among the choices.
        step = gr.Dropdown(choices=steps.choices, value=before.step)
        return [gr.Tabs(selected="use"), step, [before.run_id, before.step]]

    refreshing = {"fn": refresh, "inputs": [context.run, chosen, seen], "outputs": outputs, **QUIET}
    context.refreshes["judge"].click(trigger_mode="always_last", **refreshing)
    components["grid"].click(select, chosen, chosen, **QUIET).then(**refreshing)
    components["choice"].click(prefer, chosen, chosen, **QUIET).then(**refreshing)
    components["use"].click(use, chosen, [context.tabs, context.step, context.chosen], api_visibility="private")


def _layout() -> dict[str, Any]:
    """The screen's components by name."""
    components: dict[str, Any] = {"empty": gr.HTML(elem_id="judge-empty")}
    with gr.Column(visible=False) as components["results"]:
        components["recommendation"] = gr.HTML(elem_id="judge-suggestion")
        with gr.Column(visible=False, elem_id="judge-compare") as components["compare"], gr.Row():
            with gr.Column(min_width=280):
                components["compared"] = gr.HTML()
                components["use"] = gr.Button("Use this step", variant="primary", visible=False, elem_id="judge-use")
                components["share"] = gr.DownloadButton("Download before and after", elem_id="judge-share")
            with gr.Column(min_width=280, scale=2):
                components["slider"] = gr.ImageSlider(
                    elem_id="judge-slider", interactive=False, show_label=False, buttons=[], max_height=420
                )
        components["grid"] = gr.HTML(visible=False, elem_id="judge-samples", js_on_load=CLICKS)
        components["choice"] = gr.HTML(visible=False, elem_id="judge-choice", js_on_load=CLICKS)
        with gr.Row(elem_id="judge-plots"):
            for title, (names, hint) in PLOTS.items():
                components[title] = line_plot(title, [*names, "Recommended"], hint, SPECIAL_COLOURS, min_width=420)
        components["measurements"] = gr.HTML(visible=False, elem_id="judge-figures")
        components["details"] = gr.Accordion("Model card", open=False, visible=False, elem_id="judge-card")
        with components["details"]:
            components["card"] = gr.Markdown()
    return components
