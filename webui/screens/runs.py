"""The screen Runs: all runs of the user, the actions on them, and a comparison."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from webui import launching, run_cards
from webui.context import QUIET, AppContext, LazyUpdate, button, keys, show_errors, text, updates
from webui.draft import Draft
from webui.runs import Action, RunView, views
from webui.screens import compare
from webui.tasks import CLASSIFY, TASKS, Task
from webui.workspace import Workspace

LABELS: dict[str, str] = {
    "open": "Open",
    "resume": "Resume",
    "stop": "Stop",
    "duplicate": "Duplicate as new",
    "delete": "Delete",
}
INTRODUCTION = """<p>All runs, started here, in another browser or in a terminal. Select one to see its actions. One run trains
at a time; the others wait in the queue.</p>"""
ELSEWHERE = "The photos of this run are in another folder. Add them again; all other settings were copied."


def build(context: AppContext) -> None:
    """Put the screen into the open tab."""
    components = _layout()
    # The run that the confirmation is about, even if another one is selected meanwhile.
    asked = gr.State(None)
    seen = gr.State({})

    @show_errors
    def refresh(run_id: str | None, seen: dict[str, Any], request: gr.Request) -> list[Any]:
        now = parts(context.settings.workspace(request), run_id)
        return [*updates(now, seen, [name for name in components if name in now]), keys(now)]

    widgets = [components[name] for name in ("list", "chosen", *LABELS)]
    refreshing = {"fn": refresh, "inputs": [context.run, seen], "outputs": [*widgets, seen], **QUIET}
    context.refresh_triggers["runs"].change(trigger_mode="always_last", **refreshing)

    @show_errors
    def reload_runs(run_id: str | None, request: gr.Request) -> list[Any]:
        return context.show(context.settings.workspace(request), run_id)

    components["refresh"].click(reload_runs, context.run, context.outputs, api_visibility="private").then(**refreshing)

    @show_errors
    def choose(event: gr.EventData, request: gr.Request) -> list[Any]:
        workspace = context.settings.workspace(request)
        run_id = event._data.get("run")
        workspace.run(run_id)
        return context.show(workspace, run_id)

    components["list"].select(choose, None, context.outputs, **QUIET).then(**refreshing)
    for action, handler in _handlers(context).items():
        outputs = [*context.outputs, context.draft, context.class_draft]
        inputs = [context.run, *outputs[-2:]] if action == "duplicate" else context.run
        components[action].click(handler, inputs, outputs, api_visibility="private").then(**refreshing)
    _wire_deleting(context, components, asked, refreshing)
    compare.build(context)


def _layout() -> dict[str, Any]:
    """The screen's components by name."""
    gr.HTML(INTRODUCTION)
    with gr.Row(elem_classes="buttons"):
        components: dict[str, Any] = {"refresh": gr.Button("Refresh", size="sm", elem_id="runs-refresh", scale=0, min_width=140)}
    components["list"] = gr.HTML(js_on_load=run_cards.SCRIPT, elem_id="runs-list")
    components["chosen"] = gr.HTML(visible=False, elem_id="runs-chosen")
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


def parts(workspace: Workspace, run_id: str | None) -> dict[str, LazyUpdate]:
    """The list of runs, and the buttons of the selected one."""
    runs = views(workspace)
    view = next((each for each in runs if each.id == run_id), None)
    allowed: tuple[Action | str, ...] = () if view is None else ("open", *view.actions)
    outputs = {"list": text(run_cards.cards(runs, run_id)), "chosen": text("" if view is None else run_cards.heading(view))}
    return outputs | {name: button(name in allowed) for name in LABELS}


def _handlers(context: AppContext) -> dict[str, Callable[..., list[Any]]]:
    """The handlers of all buttons but Delete; each returns updates of the context's outputs and of both drafts."""
    drafts = [gr.skip(), gr.skip()]

    @show_errors
    def open_it(run_id: str, request: gr.Request) -> list[Any]:
        workspace = context.settings.workspace(request)
        view = RunView(workspace.run(run_id))
        subject = "judge" if view.state == "done" else "train"
        return [*context.show(workspace, run_id, "classify" if view.task == "classify" else subject), *drafts]

    @show_errors
    def resume(run_id: str, request: gr.Request) -> list[Any]:
        workspace = context.settings.workspace(request)
        launching.resume(workspace, run_id)
        return [*context.show(workspace, run_id), *drafts]

    @show_errors
    def stop(run_id: str, request: gr.Request) -> list[Any]:
        workspace = context.settings.workspace(request)
        launching.stop(workspace, run_id)
        gr.Info("The run stops after the current step and saves a checkpoint.")
        return [*context.show(workspace, run_id), *drafts]

    @show_errors
    def duplicate(run_id: str, draft: object, class_draft: object, request: gr.Request) -> list[Any]:
        workspace = context.settings.workspace(request)
        task, options = TASKS[RunView(workspace.run(run_id)).task], launching.duplicate(workspace, run_id)
        if task is CLASSIFY:
            return [*context.show(workspace, run_id, "classify"), gr.skip(), draft_like(workspace, task, class_draft, options)]
        return [*context.show(workspace, run_id, "check"), draft_like(workspace, task, draft, options), gr.skip()]

    return {"open": open_it, "resume": resume, "stop": stop, "duplicate": duplicate}


def draft_like(workspace: Workspace, task: Task, stored: object, options: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The draft of another run with a run's options."""
    folder = options.get("data", {}).get(task.image_folder)
    set_id = task.set_of_folder(workspace, folder)
    if folder is not None and set_id is None:
        gr.Warning(ELSEWHERE)
    return task.like(workspace, Draft.from_browser(stored), options, set_id).to_browser()


def _wire_deleting(context: AppContext, components: dict[str, Any], asked: gr.State, refreshing: dict[str, Any]) -> None:
    confirm, question = components["confirm"], components["question"]

    @show_errors
    def ask_first(run_id: str, request: gr.Request) -> tuple[Any, ...]:
        view = RunView(context.settings.workspace(request).run(run_id))
        return view.id, gr.Group(visible=True), run_cards.question(view)

    @show_errors
    def delete(run_id: str | None, request: gr.Request) -> tuple[Any, ...]:
        workspace = context.settings.workspace(request)
        launching.delete(workspace, run_id)
        return (None, gr.Group(visible=False), *context.show(workspace))

    components["delete"].click(ask_first, context.run, [asked, confirm, question], api_visibility="private")
    components["yes"].click(delete, asked, [asked, confirm, *context.outputs], api_visibility="private").then(**refreshing)
    components["no"].click(lambda: (None, gr.Group(visible=False)), None, [asked, confirm], **QUIET)
    context.picked.change(_only_about, [asked, context.run], [asked, confirm], **QUIET)


def _only_about(asked: str | None, run_id: str | None) -> tuple[Any, Any]:
    """Hide the confirmation when another run is selected."""
    return (gr.skip(), gr.skip()) if asked in (None, run_id) else (None, gr.Group(visible=False))
