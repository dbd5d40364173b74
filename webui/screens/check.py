"""The screen Check: crops, prompts, preset, cost, and the command that Train starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from pipelines.errors import InputError
from pipelines.prompt_syntax import page_warnings
from training.runs.record import RunRecord
from training.runs.snapshot import RunSnapshot
from webui import panel
from webui.context import QUIET, AppContext
from webui.draft import TRIGGER
from webui.inference_worker import WORKER
from webui.render import macros, parts
from webui.runs import phase_title
from webui.tasks import SubjectPlan, measured

POLL_SECONDS = 2.0
# Two text boxes are side by side if each has at least this many pixels.
MIN_BOX_WIDTH = 240
LINES = "value.split('\\n').map((line) => line.trim()).filter((line) => line)"
check = macros("check.html")


def build(context: AppContext) -> None:
    """Put the screen into the open tab."""
    _Check(context)


def start_on_click(context: AppContext, button: gr.Button) -> None:
    """Start the run when `button` is clicked, or open the screen to enter the class word if it is missing."""

    def start(stored: dict[str, Any], request: gr.Request) -> list[Any]:
        plan = SubjectPlan.of(context.settings.workspace(request), stored)
        if not plan.settings.kind and plan.num_images:
            words = "Enter the class word: what the photos show, such as dog or toy. Then press Train."
            gr.Info(words, title="Class word missing")
            return context.show(plan.workspace, tab="check")
        return context.show(plan.workspace, plan.start(), "train")

    button.click(start, [context.draft], context.outputs, api_visibility="private")


class _Check:
    """The components of the screen and the handlers of their events."""

    def __init__(self, context: AppContext) -> None:
        self.context = context
        gr.HTML("<h2>Training images as the model sees them</h2>")
        self.crops = gr.HTML(elem_id="check-crops")
        gr.HTML("<h2>Prompts</h2>")
        word = {"max_lines": 1, "min_width": MIN_BOX_WIDTH}
        with gr.Row():
            info = "A rare word that stands for your subject. A common word already has a meaning for the model."
            self.trigger = gr.Textbox(TRIGGER, label="Trigger word", info=info, elem_id="check-trigger", **word)
            info, examples = "What the subject is. Training builds on what the model knows of its kind.", "dog, toy, coffee mug"
            self.class_word = gr.Textbox(label="Class word", info=info, placeholder=examples, elem_id="check-class", **word)
        self.prompt = gr.HTML(elem_id="check-prompt")
        info = (
            "One per line. Images are generated before, during and after training. A line with the trigger word is used as it "
            "is; any other is appended to the instance prompt."
        )
        self.scenes = gr.Textbox(label="Preview prompts", info=info, lines=4, elem_id="check-scenes")
        gr.HTML("<h2>Training settings</h2>")
        self.settings = panel.build_settings(SubjectPlan, context.draft, context.settings.is_local, "check")
        gr.HTML("<h2>Cost</h2>")
        self.cost = gr.HTML(elem_id="check-cost")
        self.measure = gr.Button("Measure time and memory", elem_id="check-measure")
        panel.build_plan(context, SubjectPlan, context.draft, context.draft_changed, "check")
        start_on_click(context, gr.Button("Train", variant="primary", size="lg", elem_id="check-start"))
        self.clock, self.filled = gr.Timer(POLL_SECONDS, active=False), gr.State(None)
        self._wire()

    def _wire(self) -> None:
        """Attach the event listeners."""
        context, draft, of_cost = self.context, self.context.draft, [self.cost, self.measure, self.clock]
        for event in (context.page.load, context.draft_changed.change):
            event(self.fill, [draft, self.filled], [self.trigger, self.class_word, self.scenes, self.filled], **QUIET)
        context.show_while_open(
            "check", self.show, draft, [*self.settings, self.prompt, self.crops, *of_cost], context.draft_changed
        )
        # Stored at every input, and on blur, which covers pasting, so that Train starts with the current values.
        for box, name, value in (
            (self.trigger, "trigger", "value"), (self.class_word, "class_word", "value"), (self.scenes, "scenes", LINES),
        ):  # fmt: skip
            panel.store(SubjectPlan.task, draft, box, name, box.input, box.blur, box.submit, value=value)
        self.measure.click(self.dry_run, [draft], of_cost, api_visibility="private")
        self.clock.tick(self.tick, [draft], of_cost, **QUIET)

    def fill(self, stored: dict[str, Any], filled: str | None, request: gr.Request) -> Any:
        """Fill the fields if other photos were chosen or the settings were replaced; never what the user is typing."""
        plan = self._plan(stored, request)
        key, settings = panel.form_key(plan), plan.settings
        return gr.skip() if key == filled else [settings.trigger, settings.class_word or "", settings.scene_lines, key]

    def show(self, stored: dict[str, Any], request: gr.Request) -> list[Any]:
        """Everything that follows from the draft, or an error in place of each."""
        plan = self._plan(stored, request)
        return [*panel.settings_updates(plan), _or_warning(_prompts, plan), _or_warning(_crops, plan), *_cost(plan)]

    def dry_run(self, stored: dict[str, Any], request: gr.Request) -> list[Any]:
        """Start a dry run, unless one is running or finished."""
        plan = self._plan(stored, request)
        plan.start_dry_run()
        return _cost(plan)

    def tick(self, stored: dict[str, Any], request: gr.Request) -> list[Any]:
        """The cost while it is measured."""
        return _cost(self._plan(stored, request))

    def _plan(self, stored: dict[str, Any], request: gr.Request) -> SubjectPlan:
        return SubjectPlan.of(self.context.settings.workspace(request), stored)


def _or_warning(make: Callable[[SubjectPlan], str], plan: SubjectPlan) -> str:
    """The result of `make`, or its InputError as a warning."""
    try:
        return make(plan)
    except InputError as error:
        return parts.warning(str(error))


def _prompts(plan: SubjectPlan) -> str:
    plan.settings.check_words()
    return check.prompts(plan.settings, page_warnings(plan.settings.prompts))


def _crops(plan: SubjectPlan) -> str:
    if not plan.num_images:
        return parts.empty("No photos yet", "Add some under Photos.")
    photos, (_, options) = plan.photos, plan.checked
    return check.crops(WORKER.call("crops", photos, options), WORKER.call("long_prompts_of", photos, options))


def _cost(plan: SubjectPlan) -> list[Any]:
    """The cost, whether it can be measured, and whether to poll."""
    try:
        record = plan.dry_run
    except InputError:
        # The page names the invalid option elsewhere.
        return [check.unknown_cost(), gr.Button(interactive=False), gr.Timer(active=False)]
    measuring, is_known = RunSnapshot(record).is_active, measured(record) is not None
    can_measure = bool(plan.num_images) and not measuring and not is_known
    return [cost_summary(record), gr.Button(interactive=can_measure), gr.Timer(active=measuring)]


def cost_summary(record: RunRecord) -> str:
    """What a dry run has measured, or its state."""
    status, is_measuring = record.status(), RunSnapshot(record).is_active
    phase = phase_title(status) if is_measuring and status.state != "queued" else ""
    return check.cost(measured(record), status, is_measuring, phase)
