"""The screen Check: what the model will see, the words, how to train and at what cost, and the command that Train starts."""

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
from webui.app_context import QUIET, AppContext
from webui.cards import escaped
from webui.draft import SCENES, TRIGGER, Draft
from webui.errors import in_plain_words
from webui.image_dataset import SubjectDataset
from webui.workspace import Workspace

POLL_SECONDS = 2.0
# What is shown with hard edges, since there is nothing between its pixels.
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
# Written into the draft as it is typed, and once more when the box is left, since what is pasted is no typing; without the
# server, so that Train starts with what is in the boxes. What is in force anyway is not written. A draft that was last changed
# by the boxes themselves says so: while an answer to one letter comes back, the next ones are typed.
BY_THE_BOXES = "by_the_boxes"
SAY_TRIGGER = "(draft, said) => said === (draft.trigger ?? 'sks') ? draft : {...draft, trigger: said, by_the_boxes: true}"
SAY_KIND = """(draft, said) => said === (draft.class_word ?? (draft.set ? '' : 'toy')) ? draft
  : {...draft, class_word: said, by_the_boxes: true}"""
SAY_SCENES = """(draft, said) => {
  const scenes = said.split('\\n').map(line => line.trim()).filter(line => line), known = draft.scenes ?? USUAL;
  return JSON.stringify(scenes) === JSON.stringify(known) ? draft : {...draft, scenes, by_the_boxes: true};
}""".replace("USUAL", json.dumps(SCENES))
SAY_PRESET = "(draft, said) => ({...draft, preset: said, by_the_boxes: true})"
# Two boxes stand beside each other where each has so many pixels, else the one below the other.
SIDE_BY_SIDE = 240
ABOUT_THE_RARE_WORD = "A rare word that stands for your subject. A common word would bring its own meaning along."


def build(context: AppContext) -> None:
    """Put the screen into the open tab."""
    gr.HTML("<h2>Training images as the model sees them</h2>")
    crops = gr.HTML(css_template=STYLE, elem_id="check-crops")
    gr.HTML("<h2>The words</h2>")
    with gr.Row():
        trigger, kind = _subject_words()
    prompt = gr.HTML(css_template=STYLE, elem_id="check-prompt")
    scenes = gr.Textbox(
        label="Preview prompts, one per line",
        info="Generated before, during and after training. A line that contains the trigger word is used as it is; any other is "
        "appended to the prompt.",
        lines=4,
        elem_id="check-scenes",
    )
    gr.HTML("<h2>How to train</h2>")
    choices = [(f"{preset.name}: {preset.costs}", preset.name) for preset in presets.SUBJECT]
    preset = gr.Radio(choices, value=presets.BALANCED, label="Preset", elem_id="check-preset")
    reasons = gr.HTML(css_template=STYLE, elem_id="check-reasons")
    panel.build(subject_runs.source(context))
    gr.HTML("<h2>Cost</h2>")
    cost = gr.HTML(costs.UNKNOWN, css_template=STYLE, elem_id="check-cost")
    measure = gr.Button("Measure time and memory", elem_id="check-measure")
    gr.HTML("<h2>The command</h2><p class='quiet'>Train starts exactly this; typed into a terminal it does the same.</p>")
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


def _subject_words() -> tuple[gr.Textbox, gr.Textbox]:
    trigger = gr.Textbox(
        TRIGGER, label="Trigger word", info=ABOUT_THE_RARE_WORD, max_lines=1, min_width=SIDE_BY_SIDE, elem_id="check-trigger"
    )
    kind = gr.Textbox(
        label="Class word",
        info="The kind of thing, in plain words: training starts from what the model knows about it.",
        placeholder="dog, toy, coffee mug",
        max_lines=1,
        min_width=SIDE_BY_SIDE,
        elem_id="check-class",
    )
    return trigger, kind


def _wire(context: AppContext, parts: dict[str, Any], said: dict[str, Any], train: gr.Button) -> None:
    """Have everything listen."""
    does, draft = _Handlers(context), context.draft
    clock = gr.Timer(POLL_SECONDS, active=False)
    words = [said["trigger"], said["kind"], said["scenes"], said["preset"]]

    of_cost = [parts["cost"], parts["measure"], clock]
    for begun, fill in ((context.page.load, does.fill), (context.draft_changed.change, does.follow)):
        begun(fill, [draft, *words], words, **QUIET)
        begun(does.describe, [draft], [parts["prompt"], parts["reasons"]], **QUIET)
    # Not while the page loads: it needs the model's libraries.
    for moved in (context.active_tab.change, context.draft_changed.change):
        moved(does.work_out, [context.active_tab, draft], [parts["command"], parts["crops"], *of_cost], **QUIET)
    for name, script in (("trigger", SAY_TRIGGER), ("kind", SAY_KIND), ("scenes", SAY_SCENES)):
        typed = [said[name].input, said[name].blur, said[name].submit]
        gr.on(typed, None, [draft, said[name]], [draft], js=script, api_visibility="private")
    said["preset"].input(None, [draft, said["preset"]], [draft], js=SAY_PRESET, api_visibility="private")
    parts["measure"].click(does.dry_run, [draft], of_cost, api_visibility="private")
    clock.tick(does.tick, [draft], of_cost, **QUIET)
    train.click(does.start, [draft], [draft, *context.outputs], api_visibility="private")


@dataclass(frozen=True)
class _Handlers:
    """What the screen does when something is pressed or changed."""

    context: AppContext

    @in_plain_words
    def fill(self, stored: dict[str, Any], *typed: str) -> tuple[Any, ...]:
        """Put what the draft says into the boxes, unless it is there."""
        now = Draft.from_browser(stored)
        there = [now.trigger, now.kind, now.scenes_in_lines, presets.preset_named(presets.SUBJECT, now.preset).name]
        is_typed = [typed[0] == there[0], typed[1] == there[1], _lines(typed[2]) == _lines(there[2]), typed[3] == there[3]]
        return tuple(gr.skip() if same else value for same, value in zip(is_typed, there, strict=True))

    @in_plain_words
    def follow(self, stored: dict[str, Any], *typed: str) -> tuple[Any, ...]:
        """Put what another screen has made of the draft into the boxes."""
        return (gr.skip(),) * len(typed) if stored.get(BY_THE_BOXES) else self.fill(stored, *typed)

    @in_plain_words
    def describe(self, stored: dict[str, Any]) -> tuple[str, str]:
        """The prompt and the preset, which need no library."""
        now = Draft.from_browser(stored)
        return _prompt(now), _reasons(presets.preset_named(presets.SUBJECT, now.preset))

    @in_plain_words
    def work_out(self, active_tab: str, stored: dict[str, Any], request: gr.Request) -> tuple[Any, ...]:
        """The command, the crops, and what is known of the cost; where one cannot be told, why. Nothing unless open."""
        if active_tab != "check":
            return (gr.skip(),) * 5
        about = (self.context, self.context.settings.workspace(request), stored)
        command, crops, cost = (_or_why_not(make, *about) for make in (subject_runs.command, _crops, _cost))
        if isinstance(command, InputError):
            command = f"# {' '.join(str(command).split())}"
        if isinstance(cost, InputError):
            cost = (_warning(cost), gr.Button(interactive=False), gr.Timer(active=False))
        return command, _warning(crops) if isinstance(crops, InputError) else crops, *cost

    @in_plain_words
    def dry_run(self, stored: dict[str, Any], request: gr.Request) -> tuple[Any, ...]:
        """Start a dry run, unless one is at work or has measured this already."""
        workspace = self.context.settings.workspace(request)
        subject_runs.start_dry_run(self.context, workspace, stored)
        return _cost(self.context, workspace, stored)

    @in_plain_words
    def tick(self, stored: dict[str, Any], request: gr.Request) -> tuple[Any, ...]:
        return _cost(self.context, self.context.settings.workspace(request), stored)

    @in_plain_words
    def start(self, stored: dict[str, Any], request: gr.Request) -> tuple[Any, ...]:
        workspace = self.context.settings.workspace(request)
        stored, run_id = subject_runs.start(self.context, workspace, stored)
        return stored, *self.context.show(workspace, run_id, "train")


def _or_why_not(make: Callable[[AppContext, Workspace, dict[str, Any]], Any], *about: Any) -> Any:
    """What `make` makes, or the error that says why it cannot be."""
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
        f'{foreign}<p class="prompt">Your photos are said to show <code>{escaped(draft.prompt)}</code></p>'
        f"<details><summary>Prompts of the {len(draft.prompts)} sample images</summary><ol>{listed}</ol></details>"
    )


def _reasons(preset: presets.Preset) -> str:
    listed = "".join(
        f"<li><b>{html.escape(each.field.replace('_', ' '))} {html.escape(_value(each.value))}</b>: {html.escape(each.why)}</li>"
        for each in preset.values
    )
    return f'<div class="preset"><p>{html.escape(preset.gives)}</p><ul>{listed}</ul></div>'


def _value(value: Any) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def _crops(context: AppContext, workspace: Workspace, stored: dict[str, Any]) -> str:
    from webui.work import options as checked
    from webui.work import photos as work_photos

    photos = SubjectDataset.of(workspace, Draft.from_browser(stored).set)
    if not photos.entries():
        return '<div class="empty">No photos yet. Add some under Photos.</div>'
    options = checked.build(workspace, "subject", subject_runs.values_of(context, workspace, stored)[1])
    cut = "".join(f'<p class="warning">{escaped(words)}</p>' for words in work_photos.long_prompts_of(photos, options))
    crops, names = work_photos.crops(photos, options), [entry.name for entry in photos.entries()]
    sizes = {f"{crop.size[1]} x {crop.size[0]}" for crop in crops}
    many = crops[0].variants
    more = f" Of each, {many} crops or mirror images are shown to it; this is the first." if many > 1 else ""
    listed = "".join(
        f'<li><img class="{"pixel" if max(crop.size) <= CRISP_SIDE else ""}" src="{crop.address}" '
        f'alt="{escaped(name)} as the model sees it"></li>'
        for crop, name in zip(crops, names, strict=True)
    )
    words = (
        f"Each photo is brought to {' or '.join(sorted(sizes))} pixels, the size that this model works with, and cropped to it."
    )
    advice = "Your subject should still be plain to see, whole and near the middle."
    return f'{cut}<p>{words}{more} {advice}</p><ul class="crops">{listed}</ul>'


def _cost(context: AppContext, workspace: Workspace, stored: dict[str, Any]) -> tuple[Any, Any, Any]:
    """What is known of the cost, whether it can be measured, and whether to look again."""
    from webui.work import options as checked

    values, record = subject_runs.dry_run_of(context, workspace, stored)
    options = checked.build(workspace, "subject", values)
    photos = SubjectDataset.of(workspace, Draft.from_browser(stored).set).entries()
    plan = costs.Plan(options.optimisation.max_train_steps, len(photos), options.data.heldout_image)
    at_work = costs.is_measuring(record)
    can_measure = bool(photos) and not at_work and not costs.is_measured(record)
    return costs.cost_summary(record, plan), gr.Button(interactive=can_measure), gr.Timer(active=at_work)
