"""The expert form of both tasks, and the line beside each Train button that says what it will do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gradio as gr

from pipelines.errors import InputError
from training.options.values import Values, default_of, groups, merged, without
from webui.context import QUIET, AppContext
from webui.draft import Draft
from webui.form_schema import GROUP_TITLES, METHOD, form_fields, method_summary, typed, validated, written
from webui.render import macros, parts, render
from webui.tasks import Task
from webui.workspace import Workspace

SCRIPT = Path(__file__).with_name("form.js").read_text(encoding="utf-8")
STORE_OPTIONS = "(draft) => withSettings(draft, '{task}', {{options: trainingOptions.{task}}})"
STORE_FIELD = "(draft, value) => withSettings(draft, '{task}', {{{name}: {value}}})"


def build_form(task: Task, draft: gr.BrowserState, is_local: bool) -> gr.HTML:
    """Put the form into the page. A screen updates it by `gr.HTML(state=form_state(...))`."""
    by_group = [(group, GROUP_TITLES[group], fields) for group, fields in form_fields(task.name, is_local).items()]
    form = gr.HTML(
        render("form.html", task=task.name, groups=by_group),
        js_on_load=SCRIPT,
        elem_id=f"{task.name}-form",
        state=None,
    )
    form.input(None, [draft], [draft], js=STORE_OPTIONS.format(task=task.name), api_visibility="private")
    return form


def store(
    task: Task, draft: gr.BrowserState, component: gr.components.Component, name: str, *events: Any, value: str = "value"
) -> None:
    """Store the value of a component as the setting `name` when the user changes it, in the browser alone.

    Args:
        events: by default input.
        value: the setting, in JavaScript.
    """
    js = STORE_FIELD.format(task=task.name, name=name, value=value)
    gr.on(list(events) or [component.input], None, [draft, component], [draft], js=js, api_visibility="private")


def form_key(task: Task, workspace: Workspace, draft: Draft) -> str:
    """Differs whenever the settings on the page belong to another dataset, or were replaced."""
    return f"{task.key(workspace, draft)}/{draft.version}"


def form_state(task: Task, workspace: Workspace, draft: Draft) -> dict[str, Any]:
    """What the form shows beside the user's values, which it shows only if its key has changed."""
    settings, key = task.settings(workspace, draft), task.key(workspace, draft)
    preset, num_images = task.preset(settings), task.num_images(workspace, key)
    of_preset = preset.options(num_images)
    errors, resolved = _errors_and_resolved(task, workspace, draft)
    base = _base(task, workspace, of_preset, without(resolved, settings.options))
    (methods,) = [fields[METHOD] for fields in merged(_defaults(task), of_preset, settings.options).values() if METHOD in fields]
    notes = {f"{each.group}.{each.field}": f"{preset.name}: {each.reason}" for each in preset.of(num_images)}
    if isinstance(methods, str):
        notes[f"adapter.{METHOD}"] = method_summary(methods)
    return {
        "key": form_key(task, workspace, draft),
        "set": key,
        "values": settings.options,
        "base": base,
        "sources": {name: preset.name for name in notes},
        "notes": notes,
        "errors": errors,
        "methods": [methods] if isinstance(methods, str) else methods,
    }


def _base(task: Task, workspace: Workspace, of_preset: Values, resolved: Values) -> dict[str, Any]:
    """What an empty field means: the value of the preset, the default, or what the trainer decides."""
    base = {}
    for group, fields in form_fields(task.name, workspace.is_local).items():
        for name in [field.name for field in fields]:
            value = of_preset.get(group, {}).get(name, default_of(groups(task.name)[group][name]))
            text = _as_text(name, resolved.get(group, {}).get(name) if value is None else value)
            if text:
                base[f"{group}.{name}"] = text
    return base


def _errors_and_resolved(task: Task, workspace: Workspace, draft: Draft) -> tuple[dict[str, str], Values]:
    """The errors by field, "" for those of several fields together; and all options of the run, none if there are errors."""
    errors: dict[str, str] = {}
    for group, fields in task.settings(workspace, draft).options.items():
        for name in fields.keys() & groups(task.name).get(group, {}).keys():
            try:
                typed(groups(task.name)[group][name], fields[name])
            except InputError as error:
                errors[f"{group}.{name}"] = str(error)
    if errors:
        return errors, {}
    try:
        return {}, validated(workspace, task.name, task.values(workspace, draft))[1].to_dict()
    except InputError as error:
        flag = re.match(r"[^.]*\(--(\w+)\)", str(error))
        about = [f"{group}.{flag[1]}" for group, fields in groups(task.name).items() if flag and flag[1] in fields]
        return {(about or [""])[0]: str(error)}, {}


def _defaults(task: Task) -> Values:
    return {group: {name: default_of(option) for name, option in fields.items()} for group, fields in groups(task.name).items()}


def _as_text(name: str, value: Any) -> Any:
    """A value of preset or default as the form shows it: several choices as they are, anything else as text."""
    if name == METHOD and isinstance(value, list):
        return value
    if isinstance(value, float):
        return f"{value:.4g}"
    return written(value)


def build_settings(task: Task, draft: gr.BrowserState, is_local: bool, prefix: str) -> list[gr.components.Component]:
    """Put the preset, its reasons, the form and the command into the page; `settings_updates` updates them."""
    choices = [(f"{preset.name}: {preset.summary}", preset.name) for preset in task.presets]
    preset = gr.Radio(choices, value=task.default_preset, label="Preset", elem_id=f"{prefix}-preset")
    store(task, draft, preset, "preset")
    reasons = gr.HTML(elem_id=f"{prefix}-reasons")
    form = build_form(task, draft, is_local)
    with gr.Accordion("Command", open=False, elem_id=f"{prefix}-command-shown"):
        gr.HTML(parts.note("Train runs exactly this command. You can also run it in a terminal."))
        command = gr.Code(
            interactive=False, wrap_lines=True, lines=1, show_label=False, show_line_numbers=False, elem_id=f"{prefix}-command"
        )
    return [preset, reasons, form, command]


def settings_updates(task: Task, workspace: Workspace, draft: Draft) -> tuple[Any, ...]:
    """The updates of the components of `build_settings`."""
    preset, num_images = task.preset(task.settings(workspace, draft)), task.num_images(workspace, task.key(workspace, draft))
    labels = {field.name: field.label for fields in form_fields(task.name, workspace.is_local).values() for field in fields}
    values = [(f"{labels[each.field]} {written(each.value)}", each.reason) for each in preset.of(num_images)]
    try:
        command = task.command(workspace, draft)
    except InputError as error:
        command = f"# {' '.join(str(error).split())}"
    reasons = macros("check.html").preset(preset.purpose, values)
    return preset.name, reasons, gr.HTML(state=form_state(task, workspace, draft)), command


def build_plan(context: AppContext, task: Task, draft: gr.BrowserState, changed: gr.State, tab: str) -> gr.HTML:
    """Put the line into the screen `tab` that says what Train will do, or why it cannot start."""
    line = gr.HTML(elem_id=f"{tab}-plan")

    def describe(active_tab: str, stored: dict[str, Any], request: gr.Request) -> Any:
        if active_tab != tab:
            return gr.skip()
        try:
            return parts.note(task.describe(context.settings.workspace(request), Draft.from_browser(stored)))
        except InputError as error:
            return parts.note(str(error))

    triggers = [context.page.load, changed.change, context.active_tab.change]
    gr.on(triggers, describe, [context.active_tab, draft], [line], **QUIET)
    return line
