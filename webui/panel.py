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
    "judging": "Judging the result",
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
        shell: the frame.
        task: "subject" or "classify".
        presets: to choose from; draft["preset"] names the one in force.
        draft: what the browser keeps: {"preset", "options", ...}.
        drafted: the same, to listen to.
        complete: makes from a workspace, the draft and the preset's and user's values all that a run is started with.
    """

    shell: AppContext
    task: str
    presets: Sequence[Preset]
    draft: gr.BrowserState
    drafted: gr.State
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
    shell, draft, prefix = source.shell, source.draft, f"{source.task}-panel"
    with gr.Accordion("Expert settings", open=False, elem_id=prefix) as panel:
        gr.HTML(
            "<p class='quiet'>Every option of the trainer. What you leave alone stays as the preset, or the trainer itself, has "
            "it. The first time this takes a few seconds to open.</p>"
        )
        back = gr.Button("Back to the preset", size="sm", elem_id=f"{prefix}-reset", interactive=False)
        drawn, known = gr.State(None), gr.State(None)

        @gr.render(inputs=[drawn], triggers=[drawn.change], show_progress="hidden")
        @in_plain_words
        def draw(state: dict[str, Any] | None, request: gr.Request) -> None:
            if state is not None:
                _draw(source, state["draft"], known, back, shell.settings.workspace(request))

    @in_plain_words
    def redraw(kept: dict[str, Any], shown: Any) -> tuple[Any, Any, Any]:
        """Draw anew where another preset or other options than those in view are in force."""
        now = _signature(kept)
        if shown is None or shown == now:
            return gr.skip(), gr.skip(), gr.Button(interactive=bool(kept.get("options")))
        return {"draft": kept, "at": time.monotonic_ns()}, now, gr.Button(interactive=bool(kept.get("options")))

    @in_plain_words
    def open_panel(kept: dict[str, Any], shown: Any) -> tuple[Any, Any, Any]:
        return redraw(kept, shown or "closed")

    @in_plain_words
    def reset(kept: dict[str, Any]) -> dict[str, Any]:
        return {**kept, "options": {}, TYPED: {}}

    panel.expand(open_panel, [draft, known], [drawn, known, back], **{**QUIET, "show_progress": "minimal"})
    source.drafted.change(redraw, [draft, known], [drawn, known, back], **QUIET)
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
    preset, own = source.preset(draft).options(), {group: dict(values) for group, values in draft.get("options", {}).items()}
    for group, shown in typed.items():
        for name in shown:
            if (group, name) not in fields:
                raise InputError(f"There is no option {name!r} to change here. Reload the page.")
            _put(own, preset, fields[group, name], fields[group, name].read(shown[name]))
    checked.build(workspace, source.task, source.complete(workspace, draft, merged(preset, own)))
    return {**draft, "options": {group: values for group, values in own.items() if values}, TYPED: {}}


def _put(own: Options, preset: Options, field: Any, value: Any) -> None:
    """Keep the user's value of a field, unless it is in force without that."""
    base = preset.get(field.group, {}).get(field.name, field.default)
    if value == base or (value is None and not field.optional):
        own.get(field.group, {}).pop(field.name, None)
    else:
        own.setdefault(field.group, {})[field.name] = value


def _signature(draft: dict[str, Any]) -> str:
    return json.dumps([draft.get("preset"), draft.get("options") or {}], sort_keys=True)


@dataclass(frozen=True)
class _InForce:
    """Which values are in force, and from where each comes."""

    source: FieldSource
    preset: Preset
    own: Options
    resolved: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, source: FieldSource, workspace: Workspace, draft: dict[str, Any]) -> _InForce:
        from webui.work import options as checked

        preset, own = source.preset(draft), draft.get("options") or {}
        values = source.complete(workspace, draft, merged(preset.options(), own))
        try:
            resolved = checked.build(workspace, source.task, values).to_dict()
        except InputError:
            # What is wrong is said where it is typed and where it is started; the widgets are needed to mend it.
            resolved = {}
        return cls(source, preset, own, resolved)

    def value(self, field: Any) -> Any:
        """What was said of a field; None where nothing was and the trainer decides."""
        of_preset = self.preset.options().get(field.group, {}).get(field.name, field.default)
        return self.own.get(field.group, {}).get(field.name, of_preset)

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
        chosen = self.own.get(group, {}).get("method", base)
        return frozenset([chosen] if isinstance(chosen, str) else chosen)

    def unless_said(self, field: Any) -> str:
        """What the trainer decides where nothing is said, for the empty widget."""
        decided = self.resolved.get(field.group, {}).get(field.name)
        if decided is None or self.value(field) is not None:
            return "not set"
        shown = f"{decided:.4g}" if isinstance(decided, float) else field.show(decided).replace("\n", ", ")
        return f"{shown} unless said"

    def info(self, field: Any) -> str:
        """What a field does, and from where its value comes; plain text."""
        why = self.preset.reason(field.group, field.name)
        if field.name in self.own.get(field.group, {}):
            base = self.preset.options().get(field.group, {}).get(field.name, field.default)
            had = "nothing set" if base in (None, []) else field.show(base)
            return f"{field.help} YOURS; {self.preset.name if why else 'the default'} has {had}."
        return f"{field.help} FROM {self.preset.name.upper()}: {why}" if why else f"{field.help} Default."

    def properties(self, field: Any) -> dict[str, Any]:
        """What of a widget changes with what is in force."""
        shown: dict[str, Any] = {"value": field.show(self.value(field)), "info": self.info(field)}
        if field.kind not in ("bool", "choice"):
            shown["placeholder"] = self.unless_said(field)
        return shown


def _draw(source: FieldSource, draft: dict[str, Any], known: gr.State, back: gr.Button, workspace: Workspace) -> None:
    """All widgets, a closed accordion a group."""
    from webui.work import form_schema as work_fields

    in_force = _InForce.of(source, workspace, draft)
    for group, fields in work_fields.panel_fields(source.task, workspace.is_local).items():
        own = len(in_force.own.get(group, {}))
        title = TITLES.get(group, group) + (f" ({own} of your own)" if own else "")
        with gr.Accordion(title, open=bool(own), elem_id=f"{source.task}-panel-{group}"), gr.Row(elem_classes="panel-grid"):
            for field in filter(in_force.is_shown, fields):
                _listen(source, field, _widget(source, field, in_force), known, back)


def _widget(source: FieldSource, field: Any, in_force: _InForce) -> gr.components.Component:
    """The widget of one option, by its type."""
    known = {"label": field.label, "elem_id": f"{source.task}-{field.group}-{field.name}", "interactive": True, "min_width": 280}
    shown = in_force.properties(field)
    if field.kind == "bool":
        return gr.Checkbox(**known, **shown)
    if field.kind == "choice":
        choices = [str(choice) for choice in field.choices]
        return gr.Dropdown(
            [("not set", ""), *choices] if field.optional else choices, **known, **shown | {"value": shown["value"] or ""}
        )
    if field.kind == "list":
        return gr.Textbox(lines=2, max_lines=8, **known, **shown | {"info": f"One a line. {shown['info']}"})
    return gr.Textbox(max_lines=1, **known, **shown)


def _listen(source: FieldSource, field: Any, widget: gr.components.Component, known: gr.State, back: gr.Button) -> None:
    """Have a widget's change checked, kept, and shown with its origin."""

    @in_plain_words
    def settle(draft: dict[str, Any], request: gr.Request) -> tuple[Any, Any, Any, Any]:
        workspace = source.shell.settings.workspace(request)
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
    typed.then(settle, [source.draft], [source.draft, widget, known, back], api_visibility="private", show_progress="hidden")
