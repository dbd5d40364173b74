"""The expert form of both tasks, and the line beside each Train button that says what it will do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from pipelines.errors import InputError
from pipelines.methods import equation_of, method_names, title_of
from training.options.values import Values, defaults, groups, merged, without
from webui.context import QUIET, AppContext
from webui.draft import Draft
from webui.form_schema import GROUP_TITLES, METHOD, OptionError, form_fields, typed, validated, written
from webui.render import macros, parts, render
from webui.tasks import Task
from webui.workspace import Workspace

SCRIPT = Path(__file__).with_name("form.js").read_text(encoding="utf-8")
STORE_OPTIONS = "(draft) => withSettings(draft, '{task}', {{options: trainingOptions.{task}}})"
STORE_FIELD = "(draft, value) => withSettings(draft, '{task}', {{{name}: {value}}})"


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
    settings, num_images = task.settings(workspace, draft), task.num_images(workspace, draft)
    preset = task.preset(settings)
    before = merged(defaults(task.name), preset.options(num_images))
    errors, resolved = _errors_and_resolved(task, workspace, draft)
    (methods,) = [fields[METHOD] for fields in merged(before, settings.options).values() if METHOD in fields]
    notes = {each.option: f"{preset.name}: {each.reason}" for each in preset.of(num_images)}
    if methods in method_names():
        notes[f"adapter.{METHOD}"] = f"{title_of(methods)}: {equation_of(methods)}"
    return {
        "key": form_key(task, workspace, draft),
        "set": task.key(workspace, draft),
        "values": settings.options,
        "base": _base(task, workspace, before, without(resolved, settings.options)),
        "sources": {each.option: preset.name for each in preset.of(num_images)},
        "notes": notes,
        "errors": errors,
        "methods": [methods] if isinstance(methods, str) else methods,
    }


def _base(task: Task, workspace: Workspace, before: Values, resolved: Values) -> dict[str, Any]:
    """What an empty field means: the value of the preset, the default, or what the trainer decides; choices as they are."""
    base = {}
    for group, fields in form_fields(task.name, workspace.is_local).items():
        for field in fields:
            value = before[group][field.name]
            value = resolved.get(group, {}).get(field.name) if value is None else value
            base[f"{group}.{field.name}"] = value if field.kind == "choices" else written(value)
    return {option: value for option, value in base.items() if value}


def _errors_and_resolved(task: Task, workspace: Workspace, draft: Draft) -> tuple[dict[str, str], Values]:
    """The errors by option, "" for those of several options together; and all options of the run, none if there are errors."""
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
    except OptionError as error:
        return {error.option: str(error)}, {}
    except InputError as error:
        return {"": str(error)}, {}


def build_settings(task: Task, draft: gr.BrowserState, is_local: bool, prefix: str) -> list[gr.components.Component]:
    """Put the preset, its reasons, the form and the command into the page; `settings_updates` updates them."""
    choices = [(f"{preset.name}: {preset.summary}", preset.name) for preset in task.presets]
    preset = gr.Radio(choices, value=task.default_preset, label="Preset", elem_id=f"{prefix}-preset")
    store(task, draft, preset, "preset")
    reasons = gr.HTML(elem_id=f"{prefix}-reasons")
    by_group = [(group, GROUP_TITLES[group], fields) for group, fields in form_fields(task.name, is_local).items()]
    form = gr.HTML(
        render("form.html", task=task.name, groups=by_group), js_on_load=SCRIPT, elem_id=f"{task.name}-form", state=None
    )
    form.input(None, [draft], [draft], js=STORE_OPTIONS.format(task=task.name), api_visibility="private")
    with gr.Accordion("Command", open=False, elem_id=f"{prefix}-command-shown"):
        gr.HTML(parts.note("Train runs exactly this command. You can also run it in a terminal."))
        command = gr.Code(
            interactive=False, wrap_lines=True, lines=1, show_label=False, show_line_numbers=False, elem_id=f"{prefix}-command"
        )
    return [preset, reasons, form, command]


def settings_updates(task: Task, workspace: Workspace, draft: Draft) -> tuple[Any, ...]:
    """The updates of the components of `build_settings`."""
    preset = task.preset(task.settings(workspace, draft))
    by_group = form_fields(task.name, workspace.is_local)
    labels = {f"{group}.{field.name}": field.label for group, fields in by_group.items() for field in fields}
    values = preset.of(task.num_images(workspace, draft))
    rows = [(f"{labels[each.option]} {written(each.value)}", each.reason) for each in values]
    try:
        command = task.command(workspace, draft)
    except InputError as error:
        command = f"# {' '.join(str(error).split())}"
    reasons = macros("check.html").preset(preset.purpose, rows)
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
