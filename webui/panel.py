"""The expert panel: every option of a task as a widget, made from the same dataclasses as the flags of its command.

The draft that the browser keeps holds a value only where the user's differs from the preset's, or from the default where the
preset says nothing. While a widget is being left, its text goes into the draft's "typed" at once, without the server, so that a
button pressed right afterwards starts with it too.
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
from webui.app_context import QUIET, AppContext
from webui.draft import Options, merged
from webui.errors import in_plain_words
from webui.presets import Preset, preset_named
from webui.workspace import Workspace

TYPED = "typed"
METHOD_CHANGED = "another method"
TITLES = {
    "model": "Base model",
    "data": "Images and words",
    "adapter": "The adapter",
    "target_layers": "Where the adapter sits",
    "method": "Methods and adapter sizes",
    "optimisation": "Training",
    "output": "What is written",
    "validation": "Judging the result",
}
TYPE_AT_ONCE = """(draft, shown) => {
  const [group, field] = %s, known = (draft ?? {}).typed ?? {};
  return {...draft, typed: {...known, [group]: {...known[group], [field]: shown}}};
}"""
Complete = Callable[[Workspace, dict[str, Any], Options], Options]


@dataclass(frozen=True)
class FieldSource:
    """What the panel is about.

    Args:
        context: the frame.
        task: "subject" or "classify".
        presets: to choose from; draft["preset"] names the one in force.
        draft: what the browser keeps: {"preset", "options", ...}.
        draft_changed: the same, to listen to.
        complete: makes from a workspace, the draft and the preset's and user's values all that a run is started with.
    """

    context: AppContext
    task: str
    presets: Sequence[Preset]
    draft: gr.BrowserState
    draft_changed: gr.State
    complete: Complete

    def preset(self, draft: dict[str, Any]) -> Preset:
        """The preset in force."""
        return preset_named(self.presets, str(draft.get("preset")))

    def settled(self, workspace: Workspace, draft: dict[str, Any]) -> dict[str, Any]:
        """The draft with what was typed last among its options, and nothing in them that is in force anyway.

        Raises: InputError for what cannot be used; the draft's options are as they were.
        """
        return settled(self, workspace, draft)


def build(source: FieldSource) -> gr.Accordion:
    """Put the panel into the page: an accordion that draws its widgets when it is first opened."""
    context, draft, prefix = source.context, source.draft, f"{source.task}-panel"
    with gr.Accordion("Expert settings", open=False, elem_id=prefix) as panel:
        gr.HTML(
            "<p class='quiet'>Every option of the trainer. What you leave alone stays as the preset, or the trainer itself, has "
            "it. The first time this takes a few seconds to open.</p>"
        )
        back = gr.Button("Back to the preset", size="sm", elem_id=f"{prefix}-reset", interactive=False)
        rendered, properties = gr.State(None), gr.State(None)

        @gr.render(inputs=[rendered], triggers=[rendered.change], show_progress="hidden")
        @in_plain_words
        def draw(state: dict[str, Any] | None, request: gr.Request) -> None:
            if state is not None:
                _draw(source, state["draft"], properties, back, context.settings.workspace(request))

    @in_plain_words
    def redraw(stored: dict[str, Any], typed: Any) -> tuple[Any, Any, Any]:
        """Draw anew where another preset or other options than those in view are in force."""
        now = _signature(stored)
        if typed is None or typed == now:
            return gr.skip(), gr.skip(), gr.Button(interactive=bool(stored.get("options")))
        return {"draft": stored, "at": time.monotonic_ns()}, now, gr.Button(interactive=bool(stored.get("options")))

    @in_plain_words
    def open_panel(stored: dict[str, Any], typed: Any) -> tuple[Any, Any, Any]:
        return redraw(stored, typed or "closed")

    @in_plain_words
    def reset(stored: dict[str, Any]) -> dict[str, Any]:
        return {**stored, "options": {}, TYPED: {}}

    panel.expand(open_panel, [draft, properties], [rendered, properties, back], **{**QUIET, "show_progress": "minimal"})
    source.draft_changed.change(redraw, [draft, properties], [rendered, properties, back], **QUIET)
    back.click(reset, [draft], [draft], **QUIET)
    return panel


def settled(source: FieldSource, workspace: Workspace, draft: dict[str, Any]) -> dict[str, Any]:
    """See `FieldSource.settled`."""
    from webui.work import form_schema as work_fields
    from webui.work import options as checked

    typed = draft.get(TYPED) or {}
    if not typed:
        return draft
    fields = {
        (field.group, field.name): field
        for group in work_fields.panel_fields(source.task, workspace.is_local).values()
        for field in group
    }
    preset, chosen = source.preset(draft).options(), {group: dict(values) for group, values in draft.get("options", {}).items()}
    for group, typed_values in typed.items():
        for name in typed_values:
            if (group, name) not in fields:
                raise InputError(f"There is no option {name!r} to change here. Reload the page.")
            _put(chosen, preset, fields[group, name], fields[group, name].read(typed_values[name]))
    checked.build(workspace, source.task, source.complete(workspace, draft, merged(preset, chosen)))
    return {**draft, "options": {group: values for group, values in chosen.items() if values}, TYPED: {}}


def _put(chosen: Options, preset: Options, field: Any, value: Any) -> None:
    """Keep the user's value of a field, unless it is in force without that."""
    base = preset.get(field.group, {}).get(field.name, field.default)
    if value == base or (value is None and not field.optional):
        chosen.get(field.group, {}).pop(field.name, None)
    else:
        chosen.setdefault(field.group, {})[field.name] = value


def _signature(draft: dict[str, Any]) -> str:
    return json.dumps([draft.get("preset"), draft.get("options") or {}], sort_keys=True)


@dataclass(frozen=True)
class _InForce:
    """Which values are in force, and from where each comes."""

    source: FieldSource
    preset: Preset
    chosen: Options
    resolved: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, source: FieldSource, workspace: Workspace, draft: dict[str, Any]) -> _InForce:
        from webui.work import options as checked

        preset, chosen = source.preset(draft), draft.get("options") or {}
        values = source.complete(workspace, draft, merged(preset.options(), chosen))
        try:
            resolved = checked.build(workspace, source.task, values).to_dict()
        except InputError:
            # What is wrong is said where it is typed and where it is started; the widgets are needed to mend it.
            resolved = {}
        return cls(source, preset, chosen, resolved)

    def value(self, field: Any) -> Any:
        """What was said of a field; None where nothing was and the trainer decides."""
        of_preset = self.preset.options().get(field.group, {}).get(field.name, field.default)
        return self.chosen.get(field.group, {}).get(field.name, of_preset)

    def is_shown(self, field: Any) -> bool:
        """Whether a run has this option: not if it is one of adapter methods that the run does not train."""
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

    def unless_said(self, field: Any) -> str:
        """What the trainer decides where nothing is said, for the empty widget."""
        decided = self.resolved.get(field.group, {}).get(field.name)
        if decided is None or self.value(field) is not None:
            return "not set"
        text = f"{decided:.4g}" if isinstance(decided, float) else field.show(decided).replace("\n", ", ")
        return f"{text} unless said"

    def info(self, field: Any) -> str:
        """What a field does, and from where its value comes; plain text."""
        why = self.preset.reason(field.group, field.name)
        if field.name in self.chosen.get(field.group, {}):
            base = self.preset.options().get(field.group, {}).get(field.name, field.default)
            had = "nothing set" if base in (None, []) else field.show(base)
            return f"{field.help} YOURS; {self.preset.name if why else 'the default'} has {had}."
        return f"{field.help} FROM {self.preset.name.upper()}: {why}" if why else f"{field.help} Default."

    def properties(self, field: Any) -> dict[str, Any]:
        """What of a widget changes with what is in force."""
        values: dict[str, Any] = {"value": field.show(self.value(field)), "info": self.info(field)}
        if field.kind not in ("bool", "choice"):
            values["placeholder"] = self.unless_said(field)
        return values


def _draw(source: FieldSource, draft: dict[str, Any], properties: gr.State, back: gr.Button, workspace: Workspace) -> None:
    """All widgets, a closed accordion a group."""
    from webui.work import form_schema as work_fields

    in_force = _InForce.of(source, workspace, draft)
    for group, fields in work_fields.panel_fields(source.task, workspace.is_local).items():
        count = len(in_force.chosen.get(group, {}))
        title = TITLES.get(group, group) + (f" ({count} of your own)" if count else "")
        with gr.Accordion(title, open=bool(count), elem_id=f"{source.task}-panel-{group}"), gr.Row(elem_classes="panel-grid"):
            for field in filter(in_force.is_shown, fields):
                _listen(source, field, _widget(source, field, in_force), properties, back)


def _widget(source: FieldSource, field: Any, in_force: _InForce) -> gr.components.Component:
    """The widget of one option, by its type."""
    arguments = {
        "label": field.label,
        "elem_id": f"{source.task}-{field.group}-{field.name}",
        "interactive": True,
        "min_width": 280,
    }
    values = in_force.properties(field)
    if field.kind == "bool":
        return gr.Checkbox(**arguments, **values)
    if field.kind == "choice":
        choices = [str(choice) for choice in field.choices]
        return gr.Dropdown(
            [("not set", ""), *choices] if field.optional else choices, **arguments, **values | {"value": values["value"] or ""}
        )
    if field.kind == "list":
        return gr.Textbox(lines=2, max_lines=8, **arguments, **values | {"info": f"One a line. {values['info']}"})
    return gr.Textbox(max_lines=1, **arguments, **values)


def _listen(source: FieldSource, field: Any, widget: gr.components.Component, properties: gr.State, back: gr.Button) -> None:
    """Have a widget's change checked, kept, and shown with its origin."""

    @in_plain_words
    def settle(draft: dict[str, Any], request: gr.Request) -> tuple[Any, Any, Any, Any]:
        workspace = source.context.settings.workspace(request)
        try:
            draft = settled(source, workspace, draft)
        except InputError as error:
            gr.Warning(html.escape(str(error)), title="Not changed")
            draft = {**draft, TYPED: {}}
        in_force = _InForce.of(source, workspace, draft)
        back_to = gr.Button(interactive=bool(draft.get("options")))
        # Another method has other options: the panel is drawn anew, as it is then not what is in view.
        in_view = METHOD_CHANGED if field.name == "method" else _signature(draft)
        return draft, type(widget)(**in_force.properties(field)), in_view, back_to

    at_once = TYPE_AT_ONCE % json.dumps([field.group, field.name])
    events = [widget.input] if field.kind in ("bool", "choice") else [widget.blur, widget.submit]
    typed = gr.on(events, None, [source.draft, widget], [source.draft], js=at_once, api_visibility="private")
    typed.then(settle, [source.draft], [source.draft, widget, properties, back], api_visibility="private", show_progress="hidden")
