"""The expert panel: every option of a task as a widget, made from the same dataclasses as the flags of its command.

The draft in the browser holds only values that differ from the preset's, or from the default if the preset has none. On blur, a
widget's text goes into the draft's "typed" in the browser, so that a button that is pressed right afterwards uses it.
"""

from __future__ import annotations

import html
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import gradio as gr

from pipelines.errors import InputError
from webui.context import QUIET, AppContext, show_errors
from webui.draft import Options, merged
from webui.presets import Preset, preset_named
from webui.workspace import Workspace

TYPED = "typed"
METHOD_CHANGED = "another method"
TITLES = {
    "model": "Base model",
    "data": "Images and prompts",
    "adapter": "Adapter",
    "target_layers": "Target layers",
    "method": "Methods and adapter sizes",
    "optimisation": "Training",
    "output": "Output",
    "judging": "Validation",
    "validation": "Validation",
}
STORE_TYPED = """(draft, value) => {
  const [group, field] = %s, known = (draft ?? {}).typed ?? {};
  return {...draft, typed: {...known, [group]: {...known[group], [field]: value}}};
}"""
Complete = Callable[[Workspace, dict[str, Any], Options], Options]


@dataclass(frozen=True)
class FieldSource:
    """The task, presets and draft of a panel.

    Args:
        context: what the screens share.
        task: "subject" or "classify".
        presets: the presets; draft["preset"] names the active one.
        draft: stored in the browser: {"preset", "options", ...}.
        draft_changed: a copy of `draft` to listen to.
        complete: returns all options of a run from a workspace, the draft, and the values of preset and user.
    """

    context: AppContext
    task: str
    presets: Sequence[Preset]
    draft: gr.BrowserState
    draft_changed: gr.State
    complete: Complete

    def preset(self, draft: dict[str, Any]) -> Preset:
        """The active preset."""
        return preset_named(self.presets, str(draft.get("preset")))

    def with_pending_input(self, workspace: Workspace, draft: dict[str, Any]) -> dict[str, Any]:
        """The draft with pending input merged into its options, without values equal to the preset's or default.

        Raises: InputError for an invalid value; the draft is unchanged.
        """
        from webui.work import form_schema as work_fields
        from webui.work import options as checked

        typed = draft.get(TYPED) or {}
        if not typed:
            return draft
        fields = {
            (field.group, field.name): field
            for group in work_fields.panel_fields(self.task, workspace.is_local).values()
            for field in group
        }
        preset, chosen = self.preset(draft).options(), {group: dict(values) for group, values in draft.get("options", {}).items()}
        for group, typed_values in typed.items():
            for name in typed_values:
                if (group, name) not in fields:
                    raise InputError(f"The option {name!r} does not exist. Reload the page.")
                _put(chosen, preset, fields[group, name], fields[group, name].read(typed_values[name]))
        checked.build(workspace, self.task, self.complete(workspace, draft, merged(preset, chosen)))
        return {**draft, "options": {group: values for group, values in chosen.items() if values}, TYPED: {}}


def build(source: FieldSource) -> gr.Accordion:
    """Put the panel into the page: an accordion whose widgets are created when it is first opened."""
    context, draft, prefix = source.context, source.draft, f"{source.task}-panel"
    with gr.Accordion("Expert settings", open=False, elem_id=prefix) as panel:
        gr.HTML(
            "<p class='quiet'>All options of the trainer. Options that you do not change keep the value of the preset or the "
            "default. Opening this takes a few seconds the first time.</p>"
        )
        back = gr.Button("Reset to preset", size="sm", elem_id=f"{prefix}-reset", interactive=False)
        rendered, properties = gr.State(None), gr.State(None)

        @gr.render(inputs=[rendered], triggers=[rendered.change], show_progress="hidden")
        @show_errors
        def create(state: dict[str, Any] | None, request: gr.Request) -> None:
            if state is not None:
                _create(source, state["draft"], properties, back, context.settings.workspace(request))

    @show_errors
    def recreate(stored: dict[str, Any], typed: Any) -> tuple[Any, Any, Any]:
        """Recreate the widgets if the preset or the options differ from those on the page."""
        now = _signature(stored)
        if typed is None or typed == now:
            return gr.skip(), gr.skip(), gr.Button(interactive=bool(stored.get("options")))
        return {"draft": stored, "at": time.monotonic_ns()}, now, gr.Button(interactive=bool(stored.get("options")))

    @show_errors
    def open_panel(stored: dict[str, Any], typed: Any) -> tuple[Any, Any, Any]:
        return recreate(stored, typed or "closed")

    @show_errors
    def reset(stored: dict[str, Any]) -> dict[str, Any]:
        return {**stored, "options": {}, TYPED: {}}

    panel.expand(open_panel, [draft, properties], [rendered, properties, back], **{**QUIET, "show_progress": "minimal"})
    source.draft_changed.change(recreate, [draft, properties], [rendered, properties, back], **QUIET)
    back.click(reset, [draft], [draft], **QUIET)
    return panel


def _put(chosen: Options, preset: Options, field: Any, value: Any) -> None:
    """Store the user's value of a field, unless it is the value of the preset or the default."""
    base = preset.get(field.group, {}).get(field.name, field.default)
    if value == base or (value is None and not field.optional):
        chosen.get(field.group, {}).pop(field.name, None)
    else:
        chosen.setdefault(field.group, {})[field.name] = value


def _text(field: Any, value: Any) -> str:
    """A value of a field as one line of text."""
    widget_value = field.show(value)
    return ", ".join(widget_value) if isinstance(widget_value, list) else str(widget_value).replace("\n", ", ")


def _signature(draft: dict[str, Any]) -> str:
    return json.dumps([draft.get("preset"), draft.get("options") or {}], sort_keys=True)


@dataclass(frozen=True)
class _EffectiveValues:
    """The effective values and the source of each."""

    source: FieldSource
    preset: Preset
    chosen: Options
    resolved: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, source: FieldSource, workspace: Workspace, draft: dict[str, Any]) -> _EffectiveValues:
        from webui.work import options as checked

        preset, chosen = source.preset(draft), draft.get("options") or {}
        values = source.complete(workspace, draft, merged(preset.options(), chosen))
        try:
            resolved = checked.build(workspace, source.task, values).to_dict()
        except InputError:
            # The error is shown at the field and at the start; the widgets are needed to correct it.
            resolved = {}
        return cls(source, preset, chosen, resolved)

    def value(self, field: Any) -> Any:
        """The value of the user, the preset or the default; None if the trainer decides."""
        of_preset = self.preset.options().get(field.group, {}).get(field.name, field.default)
        return self.chosen.get(field.group, {}).get(field.name, of_preset)

    def applies(self, field: Any) -> bool:
        """Whether the run has this option; options of other adapter methods do not apply."""
        return not field.methods or bool(self.chosen_methods & set(field.methods))

    @cached_property
    def chosen_methods(self) -> frozenset[str]:
        """The methods that a run would train."""
        from webui.work import options as checked

        kind = checked.kind_of(self.source.task)
        group, field = next(
            (name, fields["method"])
            for name, fields in ((name, checked.fields_of(group)) for name, group in checked.groups_of(kind).items())
            if "method" in fields
        )
        base = self.preset.options().get(group, {}).get("method", checked.default_of(field))
        chosen = self.chosen.get(group, {}).get("method", base)
        return frozenset([chosen] if isinstance(chosen, str) else chosen)

    def placeholder(self, field: Any) -> str:
        """The value that the trainer will choose, as the placeholder of an empty widget."""
        decided = self.resolved.get(field.group, {}).get(field.name)
        if decided is None or self.value(field) is not None:
            return "not set"
        text = f"{decided:.4g}" if isinstance(decided, float) else _text(field, decided)
        return f"{text} by default"

    def info(self, field: Any) -> str:
        """The help of a field and the source of its value, with another asterisk where Gradio would begin italics."""
        return self._words(field).replace("*", "\N{ASTERISK OPERATOR}")

    def _words(self, field: Any) -> str:
        why, words = self.preset.reason(field.group, field.name), field.help_for(self.chosen_methods, self.value(field))
        if field.name in self.chosen.get(field.group, {}):
            base = self.preset.options().get(field.group, {}).get(field.name, field.default)
            base_text = "not set" if base in (None, []) else _text(field, base)
            return f"{words} Changed ({self.preset.name if why else 'default'}: {base_text})."
        return f"{words} Preset {self.preset.name}: {why}" if why else f"{words} Default."

    def properties(self, field: Any) -> dict[str, Any]:
        """The properties of a widget that depend on the effective values."""
        values: dict[str, Any] = {"value": field.show(self.value(field)), "info": self.info(field)}
        if field.kind not in ("bool", "choice", "choices"):
            values["placeholder"] = self.placeholder(field)
        return values


def _create(source: FieldSource, draft: dict[str, Any], properties: gr.State, back: gr.Button, workspace: Workspace) -> None:
    """All widgets, in an accordion for each group."""
    from webui.work import form_schema as work_fields

    effective = _EffectiveValues.of(source, workspace, draft)
    for group, fields in work_fields.panel_fields(source.task, workspace.is_local).items():
        count = len(effective.chosen.get(group, {}))
        title = TITLES.get(group, group) + (f" ({count} changed)" if count else "")
        with gr.Accordion(title, open=bool(count), elem_id=f"{source.task}-panel-{group}"), gr.Row(elem_classes="panel-grid"):
            for field in filter(effective.applies, fields):
                _listen(source, field, _widget(source, field, effective), properties, back)


def _widget(source: FieldSource, field: Any, effective: _EffectiveValues) -> gr.components.Component:
    """The widget of one option, by its type."""
    arguments = {
        "label": field.label,
        "elem_id": f"{source.task}-{field.group}-{field.name}",
        "interactive": True,
        "min_width": 280,
    }
    values = effective.properties(field)
    if field.kind == "bool":
        return gr.Checkbox(**arguments, **values)
    if field.kind == "choice":
        choices = field.titled_choices()
        return gr.Dropdown(
            [("not set", ""), *choices] if field.optional else choices, **arguments, **values | {"value": values["value"] or ""}
        )
    if field.kind == "choices":
        return gr.Dropdown(field.titled_choices(), multiselect=True, **arguments, **values)
    if field.kind == "list":
        return gr.Textbox(lines=2, max_lines=8, **arguments, **values | {"info": f"One per line. {values['info']}"})
    return gr.Textbox(max_lines=1, **arguments, **values)


def _listen(source: FieldSource, field: Any, widget: gr.components.Component, properties: gr.State, back: gr.Button) -> None:
    """Validate and store a widget's change, and update its info."""

    @show_errors
    def store_input(draft: dict[str, Any], request: gr.Request) -> tuple[Any, Any, Any, Any]:
        workspace = source.context.settings.workspace(request)
        try:
            draft = source.with_pending_input(workspace, draft)
        except InputError as error:
            gr.Warning(html.escape(str(error)), title="Not changed")
            draft = {**draft, TYPED: {}}
        effective = _EffectiveValues.of(source, workspace, draft)
        back_to = gr.Button(interactive=bool(draft.get("options")))
        # Another method has other options, so the panel must be recreated.
        displayed = METHOD_CHANGED if field.name == "method" else _signature(draft)
        return draft, type(widget)(**effective.properties(field)), displayed, back_to

    store = STORE_TYPED % json.dumps([field.group, field.name])
    if field.kind == "choices":
        # Stored at once, but the widgets are recreated only when the field is left, so that several choices can be made.
        widget.input(None, [source.draft, widget], [source.draft], js=store, api_visibility="private")
    typed = gr.on(_events(field, widget), None, [source.draft, widget], [source.draft], js=store, api_visibility="private")
    typed.then(
        store_input, [source.draft], [source.draft, widget, properties, back], api_visibility="private", show_progress="hidden"
    )


def _events(field: Any, widget: gr.components.Component) -> list[Any]:
    """The events at which the value of a widget is complete."""
    if field.kind in ("bool", "choice"):
        return [widget.input]
    return [widget.blur] if field.kind == "choices" else [widget.blur, widget.submit]
