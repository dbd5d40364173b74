"""The screen Classify, in four parts: images, training, result and use. Trainings are followed on the screen Train."""

from __future__ import annotations

import time
from typing import Any

import gradio as gr

from webui import panel
from webui.classifiers import classifier_views
from webui.context import QUIET, AppContext, followed
from webui.draft import Draft
from webui.labelled_datasets import find_classes, title
from webui.render import parts
from webui.runs import RunView
from webui.screens import classify_images
from webui.screens.classify_images import classes_html, set_of
from webui.screens.classify_result import ClassifierParts
from webui.tasks import CLASSIFY

INTRO = "Train an image classifier for your own classes from a few images of each."


def build(app: AppContext) -> None:
    """Put the screen into the open tab."""
    gr.HTML(parts.note(INTRO))
    with gr.Row():
        chosen = {"visible": False, "interactive": True}
        run = gr.Dropdown(label="Classifier", info="Result and Use show this classifier.", elem_id="classify-run", **chosen)
        method = gr.Dropdown(label="Method", info="Result and Use show this method.", elem_id="classify-method", **chosen)
    # Outside of the tabs, which count every component inside them.
    opened, draft_changed = gr.State(0.0), followed(app.class_draft)
    classifier = ClassifierParts(app, run, method, opened)
    with gr.Tabs(elem_id="classify-steps") as steps:
        with gr.Tab("1 Images", id="pictures", elem_id="classify-part-pictures"):
            classify_images.build(app, steps.parent, steps)
        with gr.Tab("2 Train", id="train", elem_id="classify-part-train"):
            _build_train(app, steps, draft_changed, opened)
        with gr.Tab("3 Result", id="result", elem_id="classify-part-result"):
            classifier.build_result()
        with gr.Tab("4 Use", id="new", elem_id="classify-part-new"):
            classifier.build_use()
    classifier.connect()
    _follow(app, steps, run, opened)


def _follow(app: AppContext, steps: gr.Tabs, run: gr.Dropdown, opened: gr.State) -> None:
    """Keep the list of classifiers up to date, and show the classifier that is selected on other screens."""
    last_elsewhere, refreshed = gr.State(None), app.refreshes["classify"]

    def renew(elsewhere: str | None, chosen: str | None, before: str | None, request: gr.Request) -> list[Any]:
        runs = classifier_views(app.settings.workspace(request))
        states = {view.id: view.state for view in runs}
        is_new = elsewhere != before and elsewhere in states
        part = gr.Tabs(selected="result") if is_new and states[elsewhere] == "done" else gr.skip()
        return [_listed(runs, elsewhere if is_new else chosen), part, elsewhere]

    given, outputs = [app.class_run, run, last_elsewhere], [run, steps, last_elsewhere]
    gr.on([app.page.load, refreshed.click], renew, given, outputs, **QUIET)
    gr.on([refreshed.click, steps.select, run.change], time.time, None, opened, trigger_mode="always_last", **QUIET)


def _listed(runs: list[RunView], chosen: str | None) -> gr.Dropdown:
    """The dropdown of classifiers, with `chosen` selected if it is one of them, else the newest."""
    ids = [view.id for view in runs]
    value = chosen if chosen in ids else next(iter(ids), None)
    return gr.Dropdown([(view.label, view.id) for view in runs], value=value, visible=bool(ids))


def _build_train(app: AppContext, steps: gr.Tabs, draft_changed: gr.State, opened: gr.State) -> None:
    """Put the part with the training settings into the open tab."""
    draft, settings = app.class_draft, app.settings
    about = gr.HTML(elem_id="classify-about")
    widgets = panel.build_settings(CLASSIFY, draft, settings.is_local, "classify")
    panel.build_plan(app, CLASSIFY, draft, draft_changed, "classify")
    start = gr.Button("Train", variant="primary", size="lg", elem_id="classify-start")

    def describe(active_tab: str, stored: dict[str, Any], request: gr.Request) -> tuple[Any, ...]:
        """The dataset and the settings of the next run; skipped unless the tab is open."""
        if active_tab != "classify":
            return (gr.skip(),) * (1 + len(widgets))
        workspace = settings.workspace(request)
        dataset = find_classes(workspace, set_of(workspace, stored))
        words = classes_html.about(title(workspace, dataset.id), dataset)
        return words, *panel.settings_updates(CLASSIFY, workspace, Draft.from_browser(stored))

    def begin(stored: dict[str, Any], request: gr.Request) -> list[Any]:
        workspace = settings.workspace(request)
        run_id = CLASSIFY.start(workspace, Draft.from_browser(stored))
        return [gr.Tabs(selected="result"), *app.show(workspace, run_id, "train")]

    for moved in (app.active_tab.change, opened.change, draft_changed.change):
        moved(describe, [app.active_tab, draft], [about, *widgets], **QUIET)
    start.click(begin, [draft], [steps, *app.outputs], api_visibility="private", concurrency_limit=1)
