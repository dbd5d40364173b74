"""The screen Use: generate images with the run's adapter, alone or combined with others, and download its files."""

from __future__ import annotations

import html
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import gradio as gr

from pipelines.built_in import is_built_in
from pipelines.errors import InputError
from pipelines.prompt_syntax import page_warnings
from pipelines.subject.generation_request import SAMPLERS, BlockScales, GenerationRequest, ScaledAdapter
from training.runs.naming import default_title
from webui import generation, uploads
from webui.context import QUIET, AppContext
from webui.render import data_url, macros, parts
from webui.runs import RunView, view_of
from webui.screens.use_results import ALL, Files, Gallery
from webui.workspace import Workspace

# The run's adapter and three further ones.
SLOTS = 4
RANDOM, SAME = "Random seed", "Same seed"
DEFAULT = "Default"
SIZES = ("1024 x 1024", "896 x 1152", "832 x 1216", "1152 x 896", "1216 x 832", "768 x 768", "512 x 512")
SMALL_SIZES = ("64 x 64", "64 x 96", "96 x 64", "96 x 96")
SIZE = re.compile(r"\s*(\d{1,5})\s*x\s*(\d{1,5})\s*")
VARIATIONS = 4
SECONDS_BETWEEN = 0.1
CANCELLED = parts.note("Cancelled. Finished images are kept.")
use = macros("use.html")


def request_of(workspace: Workspace, fields: Mapping[str, Any], slots: Iterable[Sequence[Any]]) -> GenerationRequest:
    """The request that the values of the page's fields make.

    Args:
        fields: by name.
        slots: of each adapter: its reference, its weight, and its weights in the down, mid and up blocks.
    Raises: InputError if an adapter is missing or a value is out of range.
    """
    given = {**fields}
    if given.pop("seeding") == RANDOM:
        given["seed"] = secrets.randbelow(2**31)
    given |= {"size": size_from(given["size"]), "sampler": None if given["sampler"] == DEFAULT else given["sampler"]}
    adapters = [
        (reference, scale, BlockScales(**dict(zip(BlockScales.model_fields, blocks, strict=True))))
        for reference, scale, *blocks in slots
        if reference
    ]
    return generation.request_for(workspace, adapters, **given)


def size_from(text: str | None) -> tuple[int, int] | None:
    """The width and height that the page's field holds; None for the default.

    Raises: InputError if it holds anything else.
    """
    if text in (None, "", DEFAULT):
        return None
    if (sides := SIZE.fullmatch(str(text))) is None:
        raise InputError(f"Image size must be a width and a height such as 1024 x 768, got {str(text)[:40]!r}. Enter them.")
    return int(sides[1]), int(sides[2])


def build(context: AppContext) -> None:
    """Put the screen into the open tab."""
    _Use(context)


class _Use:
    """The components of the screen and the handlers of their events."""

    def __init__(self, context: AppContext) -> None:
        self.context, self.seen = context, gr.State(None)
        self.fields: dict[str, Any] = {}
        self.empty = gr.HTML(use.no_adapter(None), elem_id="use-empty")
        with gr.Column(visible=False, elem_id="use-form") as self.form:
            with gr.Row(equal_height=False):
                # The images follow the prompt, also where a narrow page puts the second column below the first.
                with gr.Column(scale=6, min_width=320):
                    self._prompt()
                    self.images = Gallery(context)
                with gr.Column(scale=4, min_width=300):
                    self._settings()
            self.files = Files(context)
        # As a set, so that a handler gets their values by component.
        self.inputs = {context.run, context.step, *self.fields.values(), *chain(*self.slots)}
        self.files.wire(self.inputs, self.wanted)
        self._wire_run()
        self._wire_generation()

    def _prompt(self) -> None:
        # With one line, which grows, Enter and Ctrl+Enter submit.
        hint = "Describe the image. Enter generates."
        self.fields["prompt"] = gr.Textbox(label="Prompt", info=hint, lines=1, max_lines=4, elem_id="use-prompt")
        with gr.Row(elem_classes="buttons"):
            self.generate = gr.Button("Generate", variant="primary", elem_id="use-generate", elem_classes="ctrl-enter")
            self.cancel = gr.Button("Cancel", variant="stop", elem_id="use-cancel", visible=False)
        self.bar = gr.HTML(elem_id="use-progress")

    def _settings(self) -> None:
        fields = self.fields
        self.suggestions = gr.Dataset(
            components=[fields["prompt"]], samples=[], label="Preview prompts", elem_id="use-suggestions", type="values"
        )
        self.context.step.render()
        self.slots = [self._slot(0)]
        with gr.Row():
            fields["count"] = gr.Slider(1, 8, 1, step=1, label="Images", elem_id="use-count", min_width=140)
            fields["seed"] = gr.Number(0, precision=0, minimum=0, label="Seed", elem_id="use-seed", min_width=110)
        seeding = {"value": RANDOM, "show_label": False, "container": False, "elem_id": "use-seeding"}
        fields["seeding"] = gr.Radio([RANDOM, SAME], **seeding)
        with gr.Row():
            fields["size"] = gr.Dropdown(
                [DEFAULT], value=DEFAULT, allow_custom_value=True, label="Image size", info="Width x height", elem_id="use-size"
            )
            samplers = [DEFAULT, *SAMPLERS]
            fields["sampler"] = gr.Dropdown(samplers, value=DEFAULT, label="Sampler", info="A scheduler", elem_id="use-sampler")
        hint = "More steps add detail and take longer."
        fields["steps"] = gr.Slider(1, 100, 25, step=1, label="Steps", info=hint, elem_id="use-steps")
        hint = "How closely the image follows the prompt."
        fields["guidance_scale"] = gr.Slider(0, 15, 4, step=0.5, label="Guidance scale", info=hint, elem_id="use-guidance")
        hint = "What the image should not show."
        fields["negative_prompt"] = gr.Textbox(label="Negative prompt", info=hint, elem_id="use-negative")
        fields["with_base"] = gr.Checkbox(label="Also generate each image with the base model", elem_id="use-base")
        with gr.Accordion("Combine with other adapters", open=False, elem_id="use-combine"):
            gr.Markdown("Their weight changes are added. All must be for the same base model.")
            self.slots += [self._slot(index) for index in range(1, SLOTS)]
            self.upload = gr.UploadButton("Add a LoRA file", file_types=[".safetensors"], size="sm", elem_id="use-upload")

    def _slot(self, index: int) -> list[Any]:
        """The fields of an adapter: of the run's at index 0, else of a further one."""
        name, weight = (f"use-mixed-{index - 1}", f"use-mixed-weight-{index - 1}") if index else ("", "use-weight")
        with gr.Group():
            reference = gr.Dropdown([("none", "")], value="", label="Adapter", elem_id=name) if index else gr.State("")
            hint = None if index else "0 is the base model, 1 the adapter as trained."
            scale = gr.Slider(0, 1.5, 1, step=0.05, label="Adapter weight", info=hint, elem_id=weight)
            with gr.Accordion("Weight per block of the UNet", open=False, elem_id=f"use-blocks-{index}"), gr.Row():
                blocks = [
                    gr.Slider(0, 2, 1, step=0.05, label=block.capitalize(), min_width=80, elem_id=f"use-{block}-{index}")
                    for block in BlockScales.model_fields
                ]
        return [reference, scale, *blocks]

    def wanted(self, workspace: Workspace, given: Mapping[Any, Any], prompt: str = "") -> GenerationRequest:
        """The request that the values `given` of `inputs` make, with `prompt` if theirs is empty."""
        fields = {name: given[field] for name, field in self.fields.items()}
        fields["prompt"] = (fields["prompt"] or "").strip() or prompt
        slots, step = [[given[field] for field in slot] for slot in self.slots], given[self.context.step]
        slots[0][0] = "" if step is None else generation.reference_of(given[self.context.run], step)
        return request_of(workspace, fields, slots)

    # The selected run

    def _wire_run(self) -> None:
        context, outputs = self.context, self._run_outputs()
        # Judge selects a step for this screen before it is opened.
        for event in (context.page.load, context.run.change, context.refreshes["use"].click):
            event(self.refresh, [context.run, self.seen, context.chosen], outputs, **QUIET)
        context.step.input(lambda run_id, step: [run_id, step], [context.run, context.step], context.chosen, **QUIET)
        self.suggestions.click(lambda sample: sample[0], self.suggestions, self.fields["prompt"], **QUIET)
        references = [slot[0] for slot in self.slots[1:]]
        self.upload.upload(self.add_file, [self.upload, context.run, *references], references, api_visibility="private")

    def _run_outputs(self) -> list[Any]:
        fields = [self.context.step, self.fields["prompt"], self.suggestions, self.fields["size"]]
        return [self.seen, self.empty, self.form, *fields, *(slot[0] for slot in self.slots[1:]), *self.files.outputs]

    def refresh(self, run_id: str | None, seen: Any, chosen: Any, request: gr.Request) -> dict[Any, Any]:
        return self.updates(self.context.settings.workspace(request), run_id, seen, chosen)

    def updates(self, workspace: Workspace, run_id: str | None, seen: Any, chosen: Any) -> dict[Any, Any]:
        """What the screen shows of a run, sent only if the run, its state or its adapters have changed.

        Args:
            seen: the key of what the page shows.
            chosen: the run and the step that the user selected; used while the run has that step.
        """
        view = view_of(workspace, run_id)
        steps = generation.Steps([], None) if view is None or view.task != "subject" else generation.steps_of(view.record)
        key = [run_id, getattr(view, "state", None), steps.choices, steps.chosen]
        if key == seen:
            return {self.seen: seen}
        if not steps.choices:
            return {self.seen: key, self.empty: gr.HTML(use.no_adapter(view), visible=True), self.form: gr.Column(visible=False)}
        had_steps = bool(seen) and seen[0] == run_id and bool(seen[2])
        step = chosen[1] if chosen in [[run_id, step] for _, step in steps.choices] else steps.chosen
        return {
            self.seen: key,
            self.empty: gr.HTML(visible=False),
            self.form: gr.Column(visible=True),
            self.context.step: gr.Dropdown(choices=steps.choices, value=step),
            **({} if had_steps else self._of_run(workspace, view)),
            **self.files.updates(view),
        }

    def _of_run(self, workspace: Workspace, view: RunView) -> dict[Any, Any]:
        """The prompts, sizes and further adapters of a newly selected run."""
        prompts = [str(each) for each in view.options.get("output", {}).get("validation_prompt") or []]
        sizes = SMALL_SIZES if is_built_in(str(view.chosen("model", "pretrained_model_name_or_path"))) else SIZES
        choices = [("none", ""), *generation.others(workspace, view.id)]
        hint = f"Describe the image; your subject is called {default_title(view.options, view.task)}. Enter generates."
        return {
            self.fields["prompt"]: gr.Textbox(value=f"{view.prompt} in the snow", info=hint),
            self.suggestions: gr.Dataset(samples=[[each] for each in prompts]),
            self.fields["size"]: gr.Dropdown(choices=[DEFAULT, *sizes], value=DEFAULT),
            **{slot[0]: gr.Dropdown(choices=choices, value="") for slot in self.slots[1:]},
        }

    def add_file(self, request: gr.Request, file: str, run_id: str | None, *references: Any) -> list[Any]:
        workspace = self.context.settings.workspace(request)
        copy, notes = uploads.add_adapter(workspace, file)
        added = generation.reference_of_file(copy)
        for sentence in notes:
            gr.Warning(html.escape(sentence), title="Partly added")
        choices = [("none", ""), *generation.others(workspace, run_id)]
        free = next((at for at, each in enumerate(references) if not each), 0)
        return [gr.Dropdown(choices=choices, value=added if at == free else each) for at, each in enumerate(references)]

    # Generating

    def _wire_generation(self) -> None:
        buttons, seed, seeding = [self.generate, self.cancel, self.bar], self.fields["seed"], self.fields["seeding"]
        triggers = [self.generate.click, self.fields["prompt"].submit, self.images.vary.click]
        inputs, outputs = {self.images.selected, *self.inputs}, [*buttons, seed, *self.images.outputs, self.images.filter]
        # The bar is on the page itself; Gradio would fade it until the first step.
        running = gr.on(triggers, self.generate_images, inputs, outputs, **{**QUIET, **generation.AT_ONCE})
        running.failure(lambda: self._idle(""), None, buttons, **QUIET)
        # After the cancelled event, whose failure empties the bar.
        cancelled = self.cancel.click(None, cancels=[running], **QUIET)
        cancelled.then(lambda: self._idle(CANCELLED), None, buttons, **QUIET)
        seed.input(lambda: SAME, None, seeding, **QUIET)
        changed = {self.context.chosen, *self._run_outputs(), *self.inputs}
        self.images.again.click(self.reuse, [self.images.selected, self.context.run], changed, **QUIET)

    def _idle(self, bar: str) -> dict[Any, Any]:
        """Updates at the end of a generation."""
        return {self.generate: gr.Button(interactive=True), self.cancel: gr.Button(visible=False), self.bar: bar}

    def generate_images(self, given: dict[Any, Any], event: gr.EventData, request: gr.Request) -> Iterator[dict[Any, Any]]:
        """Generate what the page's fields describe, or variations of the selected image."""
        workspace, seed = self.context.settings.workspace(request), {}
        if event.target._id == self.images.vary._id:
            path = generation.GeneratedImages.of(workspace).find(given[self.images.selected])
            settings, _ = generation.settings_of(path)
            wanted = generation.request_again(workspace, settings, seed=settings["seed"] + 1, count=VARIATIONS)
        else:
            wanted = self.wanted(workspace, given)
            seed = {self.fields["seed"]: wanted.seed}
        waiting = use.progress([], None, "Waiting for the device")
        yield {self.generate: gr.Button(interactive=False), self.cancel: gr.Button(visible=True), self.bar: waiting, **seed}
        began = updated = time.monotonic()
        warnings, preview = prompt_warnings(wanted), None
        for update in generation.generated(workspace, wanted):
            if isinstance(update, Path):
                yield {**self.images.newest(workspace, False), self.images.filter: ALL}
                continue
            if update is None:
                yield {self.bar: gr.skip()}
                continue
            warnings += update.warnings
            preview = preview if update.preview is None else data_url(update.preview)
            if update.done in (0, update.total) or time.monotonic() - updated > SECONDS_BETWEEN:
                updated = time.monotonic()
                text = f"{update.words}, step {update.done} of {update.total}"
                yield {self.bar: use.progress(warnings, update.done / update.total, text, preview)}
        yield self._idle(use.done(warnings, time.monotonic() - began, wanted.seed))

    def reuse(self, name: str, run_id: str | None, request: gr.Request) -> dict[Any, Any]:
        """Set all fields to the settings of an image, and select its run."""
        workspace = self.context.settings.workspace(request)
        settings, _ = generation.settings_of(generation.GeneratedImages.of(workspace).find(name))
        made = generation.request_again(workspace, settings)
        # The first fields are those of the selected run's adapter, at 0 for an image of the base model or of files alone.
        adapters, chosen = [None, *made.adapters], None
        if made.adapters and not made.adapters[0].reference.startswith(f"{generation.FILE}@"):
            adapters, (run_id, _, step) = list(made.adapters), made.adapters[0].reference.partition("@")
            chosen = [run_id, int(step)]
        size = DEFAULT if made.size is None else " x ".join(map(str, made.size))
        values = made.model_dump(include=set(self.fields)) | {"size": size, "sampler": made.sampler or DEFAULT, "seeding": SAME}
        return {
            **self.updates(workspace, run_id, None, chosen),
            self.context.run: run_id,
            self.context.chosen: chosen,
            **{self.fields[field]: value for field, value in values.items()},
            **self._with_adapters(adapters, [("none", ""), *generation.others(workspace, run_id)]),
        }

    def _with_adapters(self, adapters: list[ScaledAdapter | None], choices: list[tuple[str, str]]) -> dict[Any, Any]:
        """The fields of all adapters with these in the first of them."""
        updates: dict[Any, Any] = {}
        for index, (adapter, (reference, *scales)) in enumerate(zip([*adapters, *[None] * SLOTS], self.slots, strict=False)):
            if index:
                updates[reference] = gr.Dropdown(choices=choices, value="" if adapter is None else adapter.reference)
            weights = [min(index, 1), 1, 1, 1] if adapter is None else [adapter.scale, *dict(adapter.blocks).values()]
            updates |= dict(zip(scales, weights, strict=True))
        return updates


def prompt_warnings(wanted: GenerationRequest) -> list[str]:
    """Warnings about A1111 syntax in the prompts, which is read as plain text, and what to use instead."""
    remedy = "choose it as the step or under Combine with other adapters, with its weight"
    return page_warnings([wanted.prompt, wanted.negative_prompt], remedy)
