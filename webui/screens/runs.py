"""The screen Runs: all runs of the user, their titles, the actions on them, and a comparison."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from training.runs.naming import LONGEST_TITLE, set_title
from webui import launching
from webui.context import CHOOSING, QUIET, RELIST, AppContext, face
from webui.draft import Draft
from webui.render import LazyUpdate, component, render, text, updates
from webui.runs import KINDS, RunView, views
from webui.screens import compare
from webui.tasks import PLANS, Plan
from webui.workspace import Workspace

LABELS = {"open": "Open", "resume": "Resume", "stop": "Stop", "duplicate": "Duplicate as new", "delete": "Delete"}
INTRODUCTION = """<p>All runs, started here, in another browser or in a terminal. Select one to see its actions. One run trains
at a time; the others wait in the queue.</p>"""
ELSEWHERE = "The photos of this run are in another folder. Add them again; all other settings were copied."


def build(context: AppContext) -> None:
    """Put the screen into the open tab."""
    components = _layout()
    selected, seen = gr.State(None), gr.State({})
    # The run that the confirmation is about, even if another one is selected meanwhile.
    asked = gr.State(None)

    def refresh(run_id: str | None, seen: dict[str, Any], request: gr.Request) -> list[Any]:
        now = contents(context.settings.workspace(request), run_id)
        return updates(now, seen, now)

    outputs = [*(components[name] for name in ("list", "title", *LABELS)), seen]
    refreshing = {"fn": refresh, "inputs": [selected, seen], "outputs": outputs, **QUIET}
    context.refreshes["runs"].click(trigger_mode="always_last", **refreshing)

    def choose(event: gr.EventData, request: gr.Request) -> list[Any]:
        run_id = event._data.get("run")
        return [run_id, None, gr.Group(visible=False), *context.show(context.settings.workspace(request), run_id)]

    chosen = components["list"].select(choose, None, [selected, asked, components["confirm"], *context.outputs], **QUIET)
    chosen.then(**refreshing)

    def rename(run_id: str | None, title: str, request: gr.Request) -> list[Any]:
        workspace = context.settings.workspace(request)
        if run_id is not None:
            set_title(workspace.run(run_id).path, title)
        return context.show(workspace, run_id)

    typed = [components["title"].submit, components["title"].blur]
    renamed = gr.on(typed, rename, [selected, components["title"]], context.outputs, **QUIET)
    renamed.then(**refreshing).then(None, js=RELIST, **QUIET)
    drafts = [context.draft, context.class_draft]
    for action in ("open", "resume", "stop", "duplicate"):
        given, changed = [selected, *drafts], [*context.outputs, *drafts]
        components[action].click(_acting(context, action), given, changed, api_visibility="private").then(**refreshing)
    _wire_deleting(context, components, selected, asked, refreshing)
    compare.build(context)


def _layout() -> dict[str, Any]:
    """The screen's components by name."""
    gr.HTML(INTRODUCTION)
    components: dict[str, Any] = {"list": gr.HTML(js_on_load=CHOOSING, elem_id="runs-list")}
    components["title"] = gr.Textbox(
        label="Title", info="It names the run and its files. Empty it to restore the default.", max_length=LONGEST_TITLE,
        max_lines=1, visible=False, elem_id="runs-title",
    )  # fmt: skip
    with gr.Row(elem_classes="buttons"):
        for name, label in LABELS.items():
            width = 200 if name == "duplicate" else 140
            variant = {"open": "primary", "delete": "stop"}.get(name, "secondary")
            components[name] = gr.Button(label, variant=variant, visible=False, elem_id=f"runs-{name}", scale=0, min_width=width)
    with gr.Group(visible=False, elem_id="runs-confirm") as components["confirm"]:
        components["question"] = gr.HTML(padding=True)
        with gr.Row(elem_classes="buttons"):
            components["yes"] = gr.Button("Delete permanently", variant="stop", elem_id="runs-delete-yes", scale=0, min_width=160)
            components["no"] = gr.Button("Cancel", elem_id="runs-delete-no", scale=0, min_width=140)
    return components


def contents(workspace: Workspace, run_id: str | None) -> dict[str, LazyUpdate]:
    """The list of runs, and the title and the buttons of the selected one."""
    runs = views(workspace)
    view = next((each for each in runs if each.id == run_id), None)
    allowed = () if view is None else ("open", *view.actions)
    # With the id, because the text of another run with the same title may have been edited.
    title = (None, "") if view is None else (view.id, view.title)
    return {
        "list": text(cards(runs, run_id)),
        "title": LazyUpdate(title, lambda: gr.Textbox(value=title[1], visible=view is not None)),
        **{name: component(gr.Button, name in allowed) for name in LABELS},
    }


def cards(runs: list[RunView], run_id: str | None) -> str:
    """The list of runs, with the selected one marked."""
    return render("runs.html", runs=runs, chosen=run_id, face=face, kinds=KINDS)


def _acting(context: AppContext, action: str) -> Callable[..., list[Any]]:
    """The handler of a button but Delete; it returns updates of the context's outputs and of both drafts."""

    def act(run_id: str | None, subject: object, classes: object, request: gr.Request) -> list[Any]:
        workspace = context.settings.workspace(request)
        view, drafts, tab = RunView(workspace.run(run_id)), [gr.skip(), gr.skip()], None
        if action == "open":
            tab = "classify" if view.task == "classify" else "judge" if view.state == "done" else "train"
        elif action == "duplicate":
            options, is_classifier = launching.duplicate(workspace, view.id), view.task == "classify"
            draft = draft_like(workspace, PLANS[view.task], classes if is_classifier else subject, options)
            tab, drafts = ("classify", [gr.skip(), draft]) if is_classifier else ("check", [draft, gr.skip()])
        elif action == "resume":
            launching.resume(workspace, view.id)
        else:
            launching.stop(workspace, view.id)
            gr.Info("The run stops after the current step and saves a checkpoint.")
        return [*context.show(workspace, view.id, tab), *drafts]

    return act


def draft_like(workspace: Workspace, plan: type[Plan], stored: object, options: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The draft of another run with a run's options."""
    draft = plan.like(workspace, Draft.from_browser(stored), options)
    if draft.set is None and options.get("data", {}).get(plan.image_folder) is not None:
        gr.Warning(ELSEWHERE)
    return draft.to_browser()


def _wire_deleting(
    context: AppContext, components: dict[str, Any], selected: gr.State, asked: gr.State, refreshing: dict[str, Any]
) -> None:
    confirm, question = components["confirm"], components["question"]

    def ask_first(run_id: str | None, request: gr.Request) -> tuple[Any, ...]:
        view = RunView(context.settings.workspace(request).run(run_id))
        return view.id, gr.Group(visible=True), render("runs_question.html", run=view)

    def delete(run_id: str | None, request: gr.Request) -> tuple[Any, ...]:
        workspace = context.settings.workspace(request)
        launching.delete(workspace, run_id)
        return (None, None, gr.Group(visible=False), *context.show(workspace))

    components["delete"].click(ask_first, selected, [asked, confirm, question], api_visibility="private")
    outputs = [selected, asked, confirm, *context.outputs]
    components["yes"].click(delete, asked, outputs, api_visibility="private").then(**refreshing)
    components["no"].click(lambda: (None, gr.Group(visible=False)), None, [asked, confirm], **QUIET)
