"""The screen Check: crops, prompts, preset, cost, and the command that Train starts."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from pipelines.errors import InputError
from pipelines.prompt_syntax import page_warnings
from webui import costs, panel, presets, subject_runs
from webui.context import QUIET, AppContext, show_errors
from webui.datasets import Dataset
from webui.draft import SCENES, TRIGGER, Draft
from webui.inference_worker import WORKER
from webui.render import escaped
from webui.workspace import Workspace

POLL_SECONDS = 2.0
# Images up to this side are enlarged without smoothing.
CRISP_SIDE = 128
STYLE = """
.crops { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: .75rem; }
.crops li { margin: 0 !important; }
.crops img { width: 128px; height: 128px; object-fit: contain; border-radius: var(--radius-md); background: var(--neutral-200); }
.crops .pixel { image-rendering: pixelated; }
.prompt { font-size: 1.05rem; } .prompt code { padding: .15rem .4rem; overflow-wrap: anywhere; }
.costs { margin: 0; display: grid; gap: .5rem; } .costs div { display: grid; grid-template-columns: 11rem 1fr; gap: .5rem; }
.costs dt { font-weight: 600; } .costs dd { margin: 0; }
.preset p { margin: 0 0 .5rem; } .preset ul { margin: 0; padding-left: 1.2rem; } .preset li { margin: .2rem 0; }
@media (max-width: 480px) { .costs div { grid-template-columns: 1fr; gap: 0; } .crops img { width: 96px; height: 96px; } }
"""
# The browser stores input in the draft while the user types, and again on blur, which covers pasting, so that Train starts with
# the current values. Default values are not stored. A draft that the form changed is marked, so that a late response of the
# server does not overwrite newer input.
CHANGED_BY_FORM = "changed_by_form"
STORE_TRIGGER = "(draft, value) => value === (draft.trigger ?? 'sks') ? draft : {...draft, trigger: value, changed_by_form: true}"
STORE_KIND = """(draft, value) => value === (draft.class_word ?? (draft.set ? '' : 'toy')) ? draft
  : {...draft, class_word: value, changed_by_form: true}"""
STORE_SCENES = """(draft, value) => {
  const scenes = value.split('\\n').map(line => line.trim()).filter(line => line), known = draft.scenes ?? DEFAULT;
  return JSON.stringify(scenes) === JSON.stringify(known) ? draft : {...draft, scenes, changed_by_form: true};
}""".replace("DEFAULT", json.dumps(SCENES))
STORE_PRESET = "(draft, value) => ({...draft, preset: value, changed_by_form: true})"
# Two text boxes are side by side if each has at least this many pixels.
MIN_BOX_WIDTH = 240
TRIGGER_HINT = "A rare word that stands for your subject. A common word already has a meaning for the model."


def build(context: AppContext) -> None:
    """Put the screen into the open tab."""
    gr.HTML("<h2>Training images as the model sees them</h2>")
    crops = gr.HTML(css_template=STYLE, elem_id="check-crops")
    gr.HTML("<h2>Prompts</h2>")
    with gr.Row():
        trigger, kind = _trigger_and_class()
    prompt = gr.HTML(css_template=STYLE, elem_id="check-prompt")
    scenes = gr.Textbox(
        label="Validation prompts",
        info="One per line. Images are generated before, during and after training. A line with the trigger word is used as it "
        "is; any other is appended to the instance prompt.",
        lines=4,
        elem_id="check-scenes",
    )
    gr.HTML("<h2>Training settings</h2>")
    choices = [(f"{preset.name}: {preset.duration}", preset.name) for preset in presets.SUBJECT]
    preset = gr.Radio(choices, value=presets.BALANCED, label="Preset", elem_id="check-preset")
    reasons = gr.HTML(css_template=STYLE, elem_id="check-reasons")
    panel.build(subject_runs.source(context))
    gr.HTML("<h2>Cost</h2>")
    cost = gr.HTML(costs.UNKNOWN, css_template=STYLE, elem_id="check-cost")
    measure = gr.Button("Measure time and memory", elem_id="check-measure")
    gr.HTML("<h2>Command</h2><p class='quiet'>Train runs this command. You can also run it in a terminal.</p>")
    command = gr.Code(
        lines=1,
        interactive=False,
        wrap_lines=True,
        show_label=False,
        show_line_numbers=False,
        elem_id="check-command",
    )
    train = gr.Button("Train", variant="primary", size="lg", elem_id="check-start")
    parts = {"crops": crops, "prompt": prompt, "reasons": reasons, "cost": cost, "command": command, "measure": measure}
    _wire(context, parts, {"trigger": trigger, "kind": kind, "scenes": scenes, "preset": preset}, train)


def _trigger_and_class() -> tuple[gr.Textbox, gr.Textbox]:
    trigger = gr.Textbox(
        TRIGGER, label="Trigger word", info=TRIGGER_HINT, max_lines=1, min_width=MIN_BOX_WIDTH, elem_id="check-trigger"
    )
    kind = gr.Textbox(
        label="Class word",
        info="What the subject is. Training builds on what the model knows about this kind of thing.",
        placeholder="dog, toy, coffee mug",
        max_lines=1,
        min_width=MIN_BOX_WIDTH,
        elem_id="check-class",
    )
    return trigger, kind


def _wire(context: AppContext, parts: dict[str, Any], fields: dict[str, Any], train: gr.Button) -> None:
    """Attach the event listeners."""
    handlers, draft = _Handlers(context), context.draft
    clock = gr.Timer(POLL_SECONDS, active=False)
    values = [fields[name] for name in ("trigger", "kind", "scenes", "preset")]

    of_cost = [parts["cost"], parts["measure"], clock]
    for event, fill in ((context.page.load, handlers.fill), (context.draft_changed.change, handlers.follow)):
        event(fill, [draft, *values], values, **QUIET)
        event(handlers.describe, [draft], [parts["prompt"], parts["reasons"]], **QUIET)
    # Not on page load, because it needs the model libraries.
    for event in (context.active_tab.change, context.draft_changed.change):
        event(handlers.compute, [context.active_tab, draft], [parts["command"], parts["crops"], *of_cost], **QUIET)
    for name, script in (("trigger", STORE_TRIGGER), ("kind", STORE_KIND), ("scenes", STORE_SCENES)):
        typed = [fields[name].input, fields[name].blur, fields[name].submit]
        gr.on(typed, None, [draft, fields[name]], [draft], js=script, api_visibility="private")
    fields["preset"].input(None, [draft, fields["preset"]], [draft], js=STORE_PRESET, api_visibility="private")
    parts["measure"].click(handlers.dry_run, [draft], of_cost, api_visibility="private")
    clock.tick(handlers.tick, [draft], of_cost, **QUIET)
    train.click(handlers.start, [draft], [draft, *context.outputs], api_visibility="private")


@dataclass(frozen=True)
class _Handlers:
    """The event handlers of the screen."""

    context: AppContext

    @show_errors
    def fill(self, stored: dict[str, Any], *typed: str) -> tuple[Any, ...]:
        """Fill the form from the draft, except for fields that have the value already."""
        now = Draft.from_browser(stored)
        values = [now.trigger, now.kind, now.scene_lines, presets.preset_named(presets.SUBJECT, now.preset).name]
        unchanged = [typed[0] == values[0], typed[1] == values[1], _lines(typed[2]) == _lines(values[2]), typed[3] == values[3]]
        return tuple(gr.skip() if same else value for same, value in zip(unchanged, values, strict=True))

    @show_errors
    def follow(self, stored: dict[str, Any], *typed: str) -> tuple[Any, ...]:
        """Fill the form if another screen has changed the draft."""
        return (gr.skip(),) * len(typed) if stored.get(CHANGED_BY_FORM) else self.fill(stored, *typed)

    @show_errors
    def describe(self, stored: dict[str, Any]) -> tuple[str, str]:
        """The prompt and the preset, which need no model library."""
        now = Draft.from_browser(stored)
        return _prompt(now), _reasons(presets.preset_named(presets.SUBJECT, now.preset))

    @show_errors
    def compute(self, active_tab: str, stored: dict[str, Any], request: gr.Request) -> tuple[Any, ...]:
        """The command, the crops and the cost, or an error in place of each. Skipped unless the screen is open."""
        if active_tab != "check":
            return (gr.skip(),) * 5
        about = (self.context, self.context.settings.workspace(request), stored)
        command, crops, cost = (_result_or_error(make, *about) for make in (subject_runs.command, _crops, _cost))
        if isinstance(command, InputError):
            command = f"# {' '.join(str(command).split())}"
        if isinstance(cost, InputError):
            cost = (_warning(cost), gr.Button(interactive=False), gr.Timer(active=False))
        return command, _warning(crops) if isinstance(crops, InputError) else crops, *cost

    @show_errors
    def dry_run(self, stored: dict[str, Any], request: gr.Request) -> tuple[Any, ...]:
        """Start a dry run, unless one is running or finished."""
        workspace = self.context.settings.workspace(request)
        subject_runs.start_dry_run(self.context, workspace, stored)
        return _cost(self.context, workspace, stored)

    @show_errors
    def tick(self, stored: dict[str, Any], request: gr.Request) -> tuple[Any, ...]:
        return _cost(self.context, self.context.settings.workspace(request), stored)

    @show_errors
    def start(self, stored: dict[str, Any], request: gr.Request) -> tuple[Any, ...]:
        workspace = self.context.settings.workspace(request)
        stored, run_id = subject_runs.start(self.context, workspace, stored)
        return stored, *self.context.show(workspace, run_id, "train")


def _result_or_error(make: Callable[[AppContext, Workspace, dict[str, Any]], Any], *about: Any) -> Any:
    """The result of `make`, or its InputError."""
    try:
        return make(*about)
    except InputError as error:
        return error


def _warning(error: InputError) -> str:
    return f'<div class="warning" role="alert">{escaped(str(error))}</div>'


def _lines(text: str) -> list[str]:
    return [" ".join(line.split()) for line in (text or "").splitlines() if line.strip()]


def _prompt(draft: Draft) -> str:
    try:
        draft.check()
    except InputError as error:
        return _warning(error)
    listed = "".join(f"<li><code>{escaped(prompt)}</code></li>" for prompt in draft.prompts)
    foreign = "".join(f'<div class="warning" role="status">{escaped(each)}</div>' for each in page_warnings(draft.prompts))
    return (
        f'{foreign}<p class="prompt">Instance prompt: <code>{escaped(draft.prompt)}</code></p>'
        f"<details><summary>The {len(draft.prompts)} validation prompts</summary><ol>{listed}</ol></details>"
    )


def _reasons(preset: presets.Preset) -> str:
    values = [(f"{each.field.replace('_', ' ')} {_value(each.value)}", each.reason) for each in preset.values]
    listed = "".join(f"<li><b>{html.escape(setting)}</b>: {html.escape(reason)}</li>" for setting, reason in values)
    return f'<div class="preset"><p>{html.escape(preset.purpose)}</p><ul>{listed}</ul></div>'


def _value(value: Any) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def _crops(context: AppContext, workspace: Workspace, stored: dict[str, Any]) -> str:
    from webui.work import options as checked

    photos = Dataset.of(workspace, Draft.from_browser(stored).set)
    if not photos.photos():
        return '<div class="empty">No photos yet. Add some under Photos.</div>'
    options = checked.build(workspace, "subject", subject_runs.values_of(context, workspace, stored)[1])
    truncated = "".join(f'<p class="warning">{escaped(words)}</p>' for words in WORKER.call("long_prompts_of", photos, options))
    crops, names = WORKER.call("crops", photos, options), [entry.name for entry in photos.photos()]
    sizes = {f"{crop.size[1]} x {crop.size[0]}" for crop in crops}
    variants = crops[0].variants
    more = f" Training uses {variants} crops or mirror images of each; the first is shown." if variants > 1 else ""
    listed = "".join(
        f'<li><img class="{"pixel" if max(crop.size) <= CRISP_SIDE else ""}" src="{crop.address}" '
        f'alt="{escaped(name)} as the model sees it"></li>'
        for crop, name in zip(crops, names, strict=True)
    )
    words = f"Each photo is resized and cropped to {' or '.join(sorted(sizes))} pixels, the resolution of this model."
    advice = "Your subject should be fully visible and near the centre."
    return f'{truncated}<p>{words}{more} {advice}</p><ul class="crops">{listed}</ul>'


def _cost(context: AppContext, workspace: Workspace, stored: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The cost, whether it can be measured, and whether to poll."""
    from webui.work import options as checked

    values, record = subject_runs.dry_run_of(context, workspace, stored)
    options = checked.build(workspace, "subject", values)
    photos = Dataset.of(workspace, Draft.from_browser(stored).set).photos()
    plan = costs.Plan(options.optimisation.max_train_steps, len(photos), options.data.heldout_image)
    measuring = costs.is_measuring(record)
    can_measure = bool(photos) and not measuring and not costs.is_measured(record)
    return costs.cost_summary(record, plan), gr.Button(interactive=can_measure), gr.Timer(active=measuring)
