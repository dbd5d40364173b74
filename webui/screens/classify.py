"""The screen Classify: train and inspect few-shot image classifiers, in four parts."""

from __future__ import annotations

import time
from typing import Any

import gradio as gr

from webui import class_runs
from webui.class_runs import ClassifyContext
from webui.context import QUIET, AppContext, followed, show_errors
from webui.runs import RunView
from webui.screens import class_images, class_new, class_result, class_train

PARTS = {
    "pictures": ("1 Images", class_images),
    "train": ("2 Train", class_train),
    "result": ("3 Result", class_result),
    "new": ("4 Use", class_new),
}


def build(app: AppContext) -> None:
    """Put the screen into the open tab."""
    intro = gr.HTML("<p>Train an image classifier for your own classes from a few images of each.</p>")
    run = gr.Dropdown(
        label="Classifier",
        info="Train, Result and Use show this classifier.",
        visible=False,
        interactive=True,
        elem_id="classify-run",
    )
    # Outside of the tabs, which count every component inside them.
    known_runs, refresh_trigger, draft_changed = gr.State([]), gr.State(0.0), followed(app.class_draft)
    with gr.Tabs(elem_id="classify-steps") as steps:
        context = ClassifyContext(app, intro.parent, steps, run, app.class_draft, draft_changed, known_runs, refresh_trigger)
        for name, (title, part) in PARTS.items():
            with gr.Tab(title, id=name, elem_id=f"classify-part-{name}"):
                part.build(context)
    _wire(context)


def _wire(context: ClassifyContext) -> None:
    """Keep the list of classifiers up to date, and follow the run that is selected on other screens."""
    app, settings = context.app, context.app.settings

    @show_errors
    def keep(before: list[str], request: gr.Request) -> Any:
        now = [view.title for view in class_runs.classifiers(settings.workspace(request))]
        return gr.skip() if now == before else now

    @show_errors
    def renew(chosen: str | None, request: gr.Request) -> gr.Dropdown:
        return _listed(class_runs.classifiers(settings.workspace(request)), chosen)

    @show_errors
    def follow(elsewhere: str | None, chosen: str | None, request: gr.Request) -> gr.Dropdown:
        runs = class_runs.classifiers(settings.workspace(request))
        return _listed(runs, elsewhere if elsewhere in [view.id for view in runs] else chosen)

    for begun in (app.page.load, app.picked.change):
        begun(follow, [app.run, context.run], [context.run], **QUIET)
    # The dropdown is not an output of the timer event, because Gradio counts every output as a change.
    app.refresh_triggers["classify"].change(keep, [context.classifiers], [context.classifiers], **QUIET)
    context.classifiers.change(renew, [context.run], [context.run], **QUIET)
    opened = [context.tab.select, context.steps.select, context.run.change, context.classifiers.change]
    gr.on(opened, time.time, None, context.refresh_trigger, trigger_mode="always_last", **QUIET)


def _listed(runs: list[RunView], chosen: str | None) -> gr.Dropdown:
    """The dropdown of classifiers, with `chosen` selected if it is one of them, else the newest."""
    ids = [view.id for view in runs]
    value = chosen if chosen in ids else next(iter(ids), None)
    return gr.Dropdown([(view.title, view.id) for view in runs], value=value, visible=bool(ids))
