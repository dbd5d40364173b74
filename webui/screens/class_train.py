"""Classify, part 2: training settings, the command, and the progress of the run."""

from __future__ import annotations

import html
from typing import Any

import gradio as gr

from pipelines.errors import InputError
from webui import class_presets, class_runs, panel, progress
from webui.class_runs import ClassifyContext, set_of
from webui.context import QUIET, show_errors
from webui.labelled_datasets import LabelledClasses, find_classes, title
from webui.presets import Preset, preset_named
from webui.runs import RunView
from webui.workspace import Workspace

NOTHING = "<p class='empty'>No runs yet. Start one above: the example takes a minute or two.</p>"


def build(context: ClassifyContext) -> None:
    """Put the part into the open tab."""
    parts = _layout(context)
    _wire_settings(context, parts)
    _wire_runs(context, parts)


def _layout(context: ClassifyContext) -> dict[str, Any]:
    parts: dict[str, Any] = {"about": gr.HTML(elem_id="classify-about")}
    choices = [(f"{preset.name}: {preset.duration}", preset.name) for preset in class_presets.CLASSIFY]
    parts["preset"] = gr.Radio(choices, value=class_presets.DEFAULT, label="Preset", elem_id="classify-preset")
    parts["why"] = gr.HTML(elem_id="classify-why")
    panel.build(context.source())
    with gr.Accordion("The command", open=False, elem_id="classify-command-shown"):
        gr.HTML("<p class='quiet'>Train runs exactly this command. You can also run it in a terminal.</p>")
        parts["command"] = gr.Code(
            interactive=False,
            wrap_lines=True,
            lines=1,
            show_label=False,
            show_line_numbers=False,
            elem_id="classify-command",
        )
    parts["start"] = gr.Button("Train", variant="primary", size="lg", elem_id="classify-start")
    gr.HTML("<h3>Selected classifier</h3>")
    parts["head"] = gr.HTML(NOTHING, elem_id="classify-head")
    parts["bar"] = gr.HTML(elem_id="classify-bar")
    with gr.Row(elem_classes="buttons"):
        parts["stop"] = gr.Button("Stop", visible=False, elem_id="classify-stop", scale=0, min_width=140)
        parts["resume"] = gr.Button("Resume", visible=False, variant="primary", elem_id="classify-resume", scale=0, min_width=140)
        parts["result"] = gr.Button(
            "View result", visible=False, variant="primary", elem_id="classify-see-result", scale=0, min_width=220
        )
    parts["curve"] = gr.HTML(elem_id="classify-curve")
    return parts


def _wire_settings(context: ClassifyContext, parts: dict[str, Any]) -> None:
    settings = context.app.settings

    @show_errors
    def describe(active_tab: str, draft: dict[str, Any], request: gr.Request) -> tuple[Any, ...]:
        """The dataset, preset and command of the next run; skipped unless the tab is open, because it loads the option checks."""
        if active_tab != "classify":
            return (gr.skip(),) * 4
        workspace = settings.workspace(request)
        preset = preset_named(class_presets.CLASSIFY, str(draft.get("preset")))
        try:
            classes = find_classes(workspace, set_of(workspace, draft))
            about = _about(workspace, classes)
            words = class_runs.command(context, workspace, draft)
        except InputError as error:
            about, words = f"<p class='warning'>{html.escape(str(error))}</p>", f"# {' '.join(str(error).split())}"
        return about, preset.name, _why(preset), words

    @show_errors
    def choose(name: str, draft: dict[str, Any]) -> dict[str, Any]:
        return {**draft, "preset": name}

    outputs = [parts[name] for name in ("about", "preset", "why", "command")]
    for moved in (context.app.active_tab.change, context.refresh_trigger.change, context.draft_changed.change):
        moved(describe, [context.app.active_tab, context.draft], outputs, **QUIET)
    parts["preset"].input(choose, [parts["preset"], context.draft], [context.draft], **QUIET)


def _wire_runs(context: ClassifyContext, parts: dict[str, Any]) -> None:
    app, settings = context.app, context.app.settings
    outputs = [parts[name] for name in ("head", "bar", "stop", "resume", "result", "curve")]
    seen = gr.State(None)

    @show_errors
    def refresh(run_id: str | None, before: Any, request: gr.Request) -> list[Any]:
        view = class_runs.view_of(settings.workspace(request), run_id)
        values = _run_updates(view)
        if values == before:
            return [gr.skip()] * (len(outputs) + 1)
        head, bar, actions, curve = values
        buttons = [gr.Button(visible=name in actions) for name in ("stop", "resume", "result")]
        return [head, bar, *buttons, curve, values]

    @show_errors
    def start(draft: dict[str, Any], request: gr.Request) -> list[Any]:
        workspace = settings.workspace(request)
        draft, run_id = class_runs.start(context, workspace, draft)
        return [draft, *app.show(workspace, run_id)]

    parts["start"].click(start, [context.draft], [context.draft, *app.outputs], api_visibility="private", concurrency_limit=1)
    _wire_buttons(context, parts)
    parts["result"].click(lambda: gr.Tabs(selected="result"), None, [context.steps], **QUIET)
    triggers = [context.refresh_trigger.change, app.refresh_triggers["classify"].change]
    # Not "always_last": after one answer that got lost, the browser would never ask again, and the run would seem to stand still.
    gr.on(triggers, refresh, [context.run, seen], [*outputs, seen], trigger_mode="multiple", **QUIET)


def _wire_buttons(context: ClassifyContext, parts: dict[str, Any]) -> None:
    """Stop or resume the selected run."""
    app, settings = context.app, context.app.settings

    @show_errors
    def stop(run_id: str, request: gr.Request) -> list[Any]:
        from webui import launching

        workspace = settings.workspace(request)
        launching.stop(workspace, run_id)
        return app.show(workspace, run_id)

    @show_errors
    def resume(run_id: str, request: gr.Request) -> list[Any]:
        from webui import launching

        workspace = settings.workspace(request)
        launching.resume(workspace, run_id)
        return app.show(workspace, run_id)

    parts["stop"].click(stop, [context.run], app.outputs, api_visibility="private")
    parts["resume"].click(resume, [context.run], app.outputs, api_visibility="private")


def _run_updates(view: RunView | None) -> tuple[str, str, tuple[str, ...], str]:
    """The header, progress bar, available actions and loss curve of a run."""
    if view is None:
        return NOTHING, "", (), ""
    actions = (*view.actions, *(("result",) if view.state == "done" else ()))
    curve = progress.losses(view) if view.is_active else ""
    return progress.head(view), progress.bar(view), actions, curve


def _about(workspace: Workspace, classes: LabelledClasses) -> str:
    """The dataset of the next run and its number of test images, as HTML."""
    name = html.escape(title(workspace, classes.id))
    warned = [] if classes.is_ready else classes.warnings()[:1]
    held_out = classes.count - sum(one.learnable for one in classes.classes)
    text = (
        f"<p>Dataset: <b>{name}</b>. {held_out} of its {classes.count} images are test images. They are not used for training "
        "and estimate the accuracy on new images.</p>"
    )
    return text + "".join(f"<p class='warning'>{html.escape(one)}</p>" for one in warned)


def _why(preset: Preset) -> str:
    reasons = "".join(f"<li>{html.escape(value.reason)}</li>" for value in preset.values)
    return f"<p>{html.escape(preset.purpose)}</p><ul>{reasons}</ul>"
