"""The expert form of both tasks, and the line beside each Train button that says what it will do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from pipelines.errors import InputError
from pipelines.methods import equation_of, method_names, title_of
from training.options.values import Values, defaults, groups, merged, without
from webui.context import AppContext
from webui.form_schema import GROUP_TITLES, METHOD, OptionError, form_fields, typed, written
from webui.render import macros, parts, render
from webui.tasks import Plan

SCRIPT = Path(__file__).with_name("form.js").read_text(encoding="utf-8")
STORE_OPTIONS = "(draft) => withSettings(draft, '{task}', {{options: trainingOptions.{task}}})"
STORE_FIELD = "(draft, value) => withSettings(draft, '{task}', {{{name}: {value}}})"


def store(
    task: str, draft: gr.BrowserState, component: gr.components.Component, name: str, *events: Any, value: str = "value"
) -> None:
    """Store the value of a component as the setting `name` when the user changes it, in the browser alone.

    Args:
        events: by default input.
        value: the setting, in JavaScript.
    """
    js = STORE_FIELD.format(task=task, name=name, value=value)
    gr.on(list(events) or [component.input], None, [draft, component], [draft], js=js, api_visibility="private")


def form_key(plan: Plan) -> str:
    """Differs whenever the settings on the page belong to another dataset, or were replaced."""
    return f"{plan.key}/{plan.draft.version}"


def form_state(plan: Plan) -> dict[str, Any]:
    """What the form shows beside the user's values, which it shows only if its key has changed."""
    preset, options = plan.preset, plan.settings.options
    before = merged(defaults(plan.task), plan.preset_options)
    errors, resolved = _errors_and_resolved(plan)
    (methods,) = [fields[METHOD] for fields in merged(before, options).values() if METHOD in fields]
    notes = {each.option: f"{preset.name}: {each.reason}" for each in plan.preset_values}
    if methods in method_names():
        notes[f"adapter.{METHOD}"] = f"{title_of(methods)}: {equation_of(methods)}"
    return {
        "key": form_key(plan),
        "set": plan.key,
        "values": options,
        "base": _base(plan, before, without(resolved, options)),
        "sources": {each.option: preset.name for each in plan.preset_values},
        "notes": notes,
        "errors": errors,
        "methods": [methods] if isinstance(methods, str) else methods,
    }


def _base(plan: Plan, before: Values, resolved: Values) -> dict[str, Any]:
    """What an empty field means: the value of the preset, the default, or what the trainer decides; choices as they are."""
    base = {}
    for group, fields in form_fields(plan.task, plan.workspace.is_local).items():
        for field in fields:
            value = before[group][field.name]
            value = resolved.get(group, {}).get(field.name) if value is None else value
            base[f"{group}.{field.name}"] = value if field.kind == "choices" else written(value)
    return {option: value for option, value in base.items() if value}


def _errors_and_resolved(plan: Plan) -> tuple[dict[str, str], Values]:
    """The errors by option, "" for those of several options together; and all options of the run, none if there are errors."""
    errors: dict[str, str] = {}
    for group, fields in plan.settings.options.items():
        for name in fields.keys() & groups(plan.task).get(group, {}).keys():
            try:
                typed(groups(plan.task)[group][name], fields[name])
            except InputError as error:
                errors[f"{group}.{name}"] = str(error)
    if errors:
        return errors, {}
    try:
        return {}, plan.checked[1].to_dict()
    except OptionError as error:
        return {error.option: str(error)}, {}
    except InputError as error:
        return {"": str(error)}, {}


def build_settings(plan: type[Plan], draft: gr.BrowserState, is_local: bool, prefix: str) -> list[gr.components.Component]:
    """Put the preset, its reasons, the form and the command into the page; `settings_updates` updates them."""
    choices = [(f"{preset.name}: {preset.summary}", preset.name) for preset in plan.presets]
    preset = gr.Radio(choices, value=plan.default_preset, label="Preset", elem_id=f"{prefix}-preset")
    store(plan.task, draft, preset, "preset")
    reasons = gr.HTML(elem_id=f"{prefix}-reasons")
    by_group = [(group, GROUP_TITLES[group], fields) for group, fields in form_fields(plan.task, is_local).items()]
    form = gr.HTML(
        render("form.html", task=plan.task, groups=by_group), js_on_load=SCRIPT, elem_id=f"{plan.task}-form", state=None
    )
    form.input(None, [draft], [draft], js=STORE_OPTIONS.format(task=plan.task), api_visibility="private")
    with gr.Accordion("Command", open=False, elem_id=f"{prefix}-command-shown"):
        gr.HTML(parts.note("Train runs exactly this command. You can also run it in a terminal."))
        command = gr.Code(
            interactive=False, wrap_lines=True, lines=1, show_label=False, show_line_numbers=False, elem_id=f"{prefix}-command"
        )
    return [preset, reasons, form, command]


def settings_updates(plan: Plan) -> tuple[Any, ...]:
    """The updates of the components of `build_settings`."""
    by_group = form_fields(plan.task, plan.workspace.is_local)
    labels = {f"{group}.{field.name}": field.label for group, fields in by_group.items() for field in fields}
    rows = [(f"{labels[each.option]} {written(each.value)}", each.reason) for each in plan.preset_values]
    try:
        command = plan.command
    except InputError as error:
        command = f"# {' '.join(str(error).split())}"
    reasons = macros("check.html").preset(plan.preset.purpose, rows)
    return plan.preset.name, reasons, gr.HTML(state=form_state(plan)), command


def build_plan(context: AppContext, plan: type[Plan], draft: gr.BrowserState, changed: gr.State, tab: str) -> None:
    """Put the line into the screen `tab` that says what Train will do, or why it cannot start."""
    line = gr.HTML(elem_id=f"{tab}-plan")

    def describe(stored: dict[str, Any], request: gr.Request) -> str:
        try:
            return parts.note(plan.of(context.settings.workspace(request), stored).describe())
        except InputError as error:
            return parts.note(str(error))

    context.show_while_open(tab, describe, draft, [line], changed)
