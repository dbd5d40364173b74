"""The screen Check: crops, prompts, preset, cost, and the command that Train starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from pipelines.errors import InputError
from pipelines.prompt_syntax import page_warnings
from training.runs.record import RunRecord
from training.runs.run_files import GB
from training.runs.snapshot import RunSnapshot
from webui import panel
from webui.context import QUIET, AppContext
from webui.datasets import Dataset
from webui.draft import TRIGGER, Draft
from webui.form_schema import validated
from webui.inference_worker import WORKER
from webui.render import TEMPLATES, parts
from webui.runs import phase_title
from webui.tasks import SUBJECT, measured
from webui.workspace import Workspace

POLL_SECONDS = 2.0
UNKNOWN = "Not measured yet. A dry run of three training steps takes about half a minute."
# Two text boxes are side by side if each has at least this many pixels.
MIN_BOX_WIDTH = 240
LINES = "value.split('\\n').map((line) => line.trim()).filter((line) => line)"
template: Any = TEMPLATES.get_template("check.html").module


def build(context: AppContext) -> None:
    """Put the screen into the open tab."""
    gr.HTML("<h2>Training images as the model sees them</h2>")
    widgets = {"crops": gr.HTML(elem_id="check-crops")}
    gr.HTML("<h2>Prompts</h2>")
    with gr.Row():
        widgets |= {"trigger": _trigger(), "class_word": _class_word()}
    widgets["prompt"] = gr.HTML(elem_id="check-prompt")
    widgets["scenes"] = gr.Textbox(
        label="Preview prompts",
        info="One per line. Images are generated before, during and after training. A line with the trigger word is used as it "
        "is; any other is appended to the instance prompt.",
        lines=4,
        elem_id="check-scenes",
    )
    gr.HTML("<h2>Training settings</h2>")
    settings = panel.build_settings(SUBJECT, context.draft, context.settings.is_local, "check")
    gr.HTML("<h2>Cost</h2>")
    widgets["cost"] = gr.HTML(elem_id="check-cost")
    widgets["measure"] = gr.Button("Measure time and memory", elem_id="check-measure")
    panel.build_plan(context, SUBJECT, context.draft, context.draft_changed, "check")
    widgets["train"] = gr.Button("Train", variant="primary", size="lg", elem_id="check-start")
    _wire(context, widgets, settings)


def _trigger() -> gr.Textbox:
    info = "A rare word that stands for your subject. A common word already has a meaning for the model."
    return gr.Textbox(TRIGGER, label="Trigger word", info=info, max_lines=1, min_width=MIN_BOX_WIDTH, elem_id="check-trigger")


def _class_word() -> gr.Textbox:
    return gr.Textbox(
        label="Class word",
        info="What the subject is. Training builds on what the model knows about this kind of thing.",
        placeholder="dog, toy, coffee mug",
        max_lines=1,
        min_width=MIN_BOX_WIDTH,
        elem_id="check-class",
    )


def _wire(context: AppContext, widgets: dict[str, Any], settings: list[gr.components.Component]) -> None:
    """Attach the event listeners."""
    handlers, draft, clock, filled = _Handlers(context), context.draft, gr.Timer(POLL_SECONDS, active=False), gr.State(None)
    fields = [widgets[name] for name in ("trigger", "class_word", "scenes")]
    of_cost = [widgets["cost"], widgets["measure"], clock]
    outputs = [*settings, widgets["prompt"], widgets["crops"], *of_cost]
    for event in (context.page.load, context.draft_changed.change):
        event(handlers.fill, [draft, filled], [*fields, filled], **QUIET)
    for event in (context.active_tab.change, context.draft_changed.change):
        event(handlers.show, [context.active_tab, draft], outputs, **QUIET)
    for name in ("trigger", "class_word"):
        # Stored at every input, and on blur, which covers pasting, so that Train starts with the current values.
        panel.store(SUBJECT, draft, widgets[name], name, widgets[name].input, widgets[name].blur, widgets[name].submit)
    panel.store(SUBJECT, draft, widgets["scenes"], "scenes", widgets["scenes"].input, widgets["scenes"].blur, value=LINES)
    widgets["measure"].click(handlers.dry_run, [draft], of_cost, api_visibility="private")
    clock.tick(handlers.tick, [draft], of_cost, **QUIET)
    widgets["train"].click(handlers.start, [draft], context.outputs, api_visibility="private")


@dataclass(frozen=True)
class _Handlers:
    """The event handlers of the screen."""

    context: AppContext

    def fill(self, stored: dict[str, Any], filled: str | None, request: gr.Request) -> tuple[Any, ...]:
        """Fill the fields if other photos were chosen or the settings were replaced; never what the user is typing."""
        workspace, draft = self._now(stored, request)
        key = panel.form_key(SUBJECT, workspace, draft)
        if key == filled:
            return (gr.skip(),) * 4
        settings = SUBJECT.settings(workspace, draft)
        return settings.trigger, settings.class_word or "", settings.scene_lines, key

    def show(self, active_tab: str, stored: dict[str, Any], request: gr.Request) -> tuple[Any, ...]:
        """Everything that follows from the draft, or an error in place of each; skipped unless the screen is open."""
        if active_tab != "check":
            return (gr.skip(),) * 9
        workspace, draft = self._now(stored, request)
        cost = _result_or_error(_cost, workspace, draft)
        if isinstance(cost, InputError):
            cost = (parts.note(UNKNOWN), gr.Button(interactive=False), gr.Timer(active=False))
        return (
            *panel.settings_updates(SUBJECT, workspace, draft),
            _or_warning(_result_or_error(_prompts, workspace, draft)),
            _or_warning(_result_or_error(_crops, workspace, draft)),
            *cost,
        )

    def dry_run(self, stored: dict[str, Any], request: gr.Request) -> tuple[Any, ...]:
        """Start a dry run, unless one is running or finished."""
        SUBJECT.start_dry_run(*self._now(stored, request))
        return _cost(*self._now(stored, request))

    def tick(self, stored: dict[str, Any], request: gr.Request) -> tuple[Any, ...]:
        """The cost while it is measured."""
        return _cost(*self._now(stored, request))

    def start(self, stored: dict[str, Any], request: gr.Request) -> list[Any]:
        """Start the run and show it."""
        workspace, draft = self._now(stored, request)
        return self.context.show(workspace, SUBJECT.start(workspace, draft), "train")

    def _now(self, stored: dict[str, Any], request: gr.Request) -> tuple[Workspace, Draft]:
        return self.context.settings.workspace(request), Draft.from_browser(stored)


def _result_or_error(make: Callable[[Workspace, Draft], Any], workspace: Workspace, draft: Draft) -> Any:
    """The result of `make`, or its InputError."""
    try:
        return make(workspace, draft)
    except InputError as error:
        return error


def _or_warning(result: Any) -> Any:
    return parts.warning(str(result)) if isinstance(result, InputError) else result


def _prompts(workspace: Workspace, draft: Draft) -> str:
    settings = SUBJECT.settings(workspace, draft)
    settings.check_words()
    return template.prompts(settings, page_warnings(settings.prompts))


def _crops(workspace: Workspace, draft: Draft) -> str:
    photos = Dataset.of(workspace, draft.set)
    if not photos.photos():
        return parts.empty("No photos yet", "Add some under Photos.")
    _, options = validated(workspace, "subject", SUBJECT.values(workspace, draft))
    crops = WORKER.call("crops", photos, options)
    sizes = sorted({f"{crop.size[1]} x {crop.size[0]}" for crop in crops})
    named = list(zip(crops, [photo.name for photo in photos.photos()], strict=True))
    return template.crops(named, sizes, crops[0].variants, WORKER.call("long_prompts_of", photos, options))


def _cost(workspace: Workspace, draft: Draft) -> tuple[Any, Any, Any]:
    """The cost, whether it can be measured, and whether to poll."""
    record = SUBJECT.dry_run(workspace, draft)
    measuring, is_known = RunSnapshot(record).is_active, measured(record) is not None
    can_measure = bool(Dataset.of(workspace, draft.set).photos()) and not measuring and not is_known
    return cost_summary(record), gr.Button(interactive=can_measure), gr.Timer(active=measuring)


def cost_summary(record: RunRecord) -> str:
    """What a dry run has measured, or its state."""
    report, status = measured(record), record.status()
    if RunSnapshot(record).is_active:
        queued = "Another run is active. The dry run starts when it is done."
        return f"{parts.chip('running', 'measuring')} {queued if status.state == 'queued' else phase_title(status)}"
    if report is not None:
        return parts.facts(
            [
                ("Training", f"{report.seconds_per_step:.2g} seconds per step"),
                ("Memory", f"{report.peak_memory / GB:.1f} GB at most"),
                ("Disk", f"up to {_size(report.disk)} for checkpoints; {_size(report.disk_free)} are free"),
                ("Adapter", f"{report.num_trainable_parameters:,} trainable parameters"),
            ]
        )
    if status.state is None or status.state == "done":
        return parts.note(UNKNOWN)
    failure = f"The dry run failed: {status.error}" if status.error else "The dry run was interrupted. Measure again."
    return parts.warning(failure)


def _size(count: int) -> str:
    return f"{count / GB:.1f} GB" if count >= GB / 10 else f"{count / 1e6:.1f} MB"
