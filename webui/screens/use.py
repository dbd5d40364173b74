"""The screen Use: generate images with the run's adapter, alone or combined with others, and download its files."""

from __future__ import annotations

import html
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from pipelines.errors import InputError
from pipelines.prompt_syntax import page_warnings
from pipelines.subject.generation_request import GenerationRequest
from webui import uploads
from webui.cancellation import CANCELLATIONS
from webui.context import QUIET, AppContext, show_errors
from webui.gallery import bar_of, details_of, gallery_of
from webui.generation import FILE, GeneratedImages, others, reference_of, reference_of_file, request_for, settings_of, steps_of
from webui.inference_worker import WORKER
from webui.render import escaped
from webui.runs import RunView
from webui.screens import use_files
from webui.screens.train import view_of
from webui.workspace import Workspace

SECONDS_BETWEEN = 0.1
# The number of further adapters that the page has fields for.
MIXED = 3
CANCELLED = "<p class='quiet'>Cancelled. Finished images are kept.</p>"
NO_RUN = """<div class="empty"><p><b>There is no adapter yet.</b></p><p>Add a few photos under Photos and train on them. You can
generate images here as soon as the first checkpoint is saved.</p></div>"""
NO_STEP = """<div class="empty"><p><b>This run has no adapter yet.</b></p><p>The first checkpoint is saved after some steps of
training. This page then updates by itself.</p></div>"""
CLASSIFIER = """<div class="empty"><p><b>This run is a classifier.</b></p><p>It cannot generate images. Use it under Classify, or
choose a subject run above.</p></div>"""


@dataclass(frozen=True)
class Controls:
    """The fields of a generation request, in the order of `request_of`."""

    scale: gr.Slider
    prompt: gr.Textbox
    negative: gr.Textbox
    count: gr.Slider
    seed: gr.Number
    with_base: gr.Checkbox
    steps: gr.Slider
    guidance_scale: gr.Slider
    mixed: list[gr.Dropdown]
    scales: list[gr.Slider]

    def inputs(self, context: AppContext) -> list[Any]:
        """The inputs of `request_of`."""
        controls = [
            self.scale,
            self.prompt,
            self.negative,
            self.count,
            self.seed,
            self.with_base,
            self.steps,
            self.guidance_scale,
        ]
        return [context.run, context.step, *controls, *self.mixed, *self.scales]


def request_of(workspace: Workspace, values: Sequence[Any]) -> GenerationRequest:
    """The request that the values of the page's fields make, in the order of `Controls.inputs`.

    Raises: InputError if an adapter is missing or a value is out of range.
    """
    run_id, step, scale, prompt, negative, count, seed, with_base, steps, guidance_scale, *rows = values
    adapters = [] if run_id is None or step is None else [(reference_of(run_id, step), scale, None)]
    adapters += [(each, weight, None) for each, weight in zip(rows[:MIXED], rows[MIXED:], strict=True) if each]
    given = {"prompt": prompt, "negative_prompt": negative, "count": count, "seed": seed, "with_base": with_base}
    return request_for(workspace, adapters, **given, steps=steps, guidance_scale=guidance_scale)


def adapter_fields(settings: dict[str, Any]) -> tuple[str | None, int | None, float, list[tuple[str, float]]]:
    """The run, step and scale, and the further adapters, from an image's settings."""
    used = [(str(each["reference"]), float(each["scale"])) for each in settings.get("adapters", [])]
    run_id, step, scale = None, None, 0.0
    if used and not used[0][0].startswith(f"{FILE}@"):
        (reference, scale), *used = used
        run_id, _, step_text = reference.partition("@")
        step = int(step_text)
    return run_id, step, scale, used


def build(context: AppContext) -> None:
    """Put the screen into the open tab."""
    empty = gr.HTML(NO_RUN, elem_id="use-empty")
    with gr.Column(visible=False, elem_id="use-form") as form:
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                prompt = gr.Textbox(label="Prompt", info="Describe the image.", lines=2, max_lines=4, elem_id="use-prompt")
                suggestions = gr.Dataset(
                    components=[prompt],
                    samples=[],
                    label="Validation prompts",
                    elem_id="use-suggestions",
                    type="values",
                )
                with gr.Row():
                    generate = gr.Button("Generate", variant="primary", elem_id="use-generate")
                    cancel = gr.Button("Cancel", variant="stop", elem_id="use-cancel", visible=False)
                bar = gr.HTML(elem_id="use-progress")
                controls, upload, dice = _controls(context, prompt)
            with gr.Column(scale=6, min_width=320):
                outputs = _images()
        files = use_files.build()
    seen = gr.State(None)
    display = _RunDisplay(context, controls, suggestions, seen, empty, form, files)
    display.wire()
    _wire_generation(context, controls, (generate, cancel, bar), outputs)
    _wire_again(display, outputs)
    use_files.wire(context, files, controls.inputs(context), request_of)
    _wire_small(context, controls, suggestions, upload, dice)


def _controls(context: AppContext, prompt: gr.Textbox) -> tuple[Controls, gr.UploadButton, gr.Button]:
    context.step.render()
    scale = gr.Slider(0, 1.5, 1, step=0.05, label="Adapter weight", info="0 is the base model.", elem_id="use-weight")
    with gr.Row():
        count = gr.Slider(1, 8, 1, step=1, label="Images", elem_id="use-count", min_width=150)
        seed = gr.Number(0, precision=0, minimum=0, label="Seed", elem_id="use-seed", min_width=110)
        dice = gr.Button("New seed", size="sm", elem_id="use-dice", min_width=90)
    with_base = gr.Checkbox(label="Also generate each image with the base model", elem_id="use-base")
    with gr.Accordion("Combine with other adapters", open=False, elem_id="use-combine"):
        gr.Markdown("Their weight changes are added. All must be for the same base model.")
        mixed, scales = [], []
        for index in range(MIXED):
            with gr.Row():
                mixed.append(gr.Dropdown([("none", "")], value="", label="Adapter", elem_id=f"use-mixed-{index}"))
                scales.append(gr.Slider(0, 1.5, 1, step=0.05, label="Adapter weight", elem_id=f"use-mixed-weight-{index}"))
        upload = gr.UploadButton("Add a LoRA file", file_types=[".safetensors"], size="sm", elem_id="use-upload")
    with gr.Accordion("Sampling settings", open=False, elem_id="use-more"):
        negative = gr.Textbox(label="Negative prompt", info="What the image should not show.", elem_id="use-negative")
        steps = gr.Slider(1, 100, 25, step=1, label="Steps", info="More steps add detail and take longer.", elem_id="use-steps")
        hint = "How closely the image follows the prompt."
        guidance_scale = gr.Slider(0, 15, 4, step=0.5, label="Guidance scale", info=hint, elem_id="use-guidance")
    controls = Controls(scale, prompt, negative, count, seed, with_base, steps, guidance_scale, mixed, scales)
    return controls, upload, dice


@dataclass(frozen=True)
class ImageOutputs:
    """The generated images and the selected one."""

    gallery: gr.Gallery
    details: gr.HTML
    again: gr.Button
    chosen: gr.State


def _images() -> ImageOutputs:
    gr.Markdown("### Your images")
    gallery = gr.Gallery(
        show_label=False,
        columns=3,
        object_fit="contain",
        height="auto",
        elem_id="use-gallery",
        format="png",
        buttons=["download", "fullscreen"],
    )
    details = gr.HTML(elem_id="use-details")
    again = gr.Button("Reuse these settings", size="sm", visible=False, elem_id="use-again")
    return ImageOutputs(gallery, details, again, gr.State(None))


@dataclass(frozen=True)
class _RunDisplay:
    """What the screen shows of the selected run; updated only when the run or its adapters have changed."""

    context: AppContext
    controls: Controls
    suggestions: gr.Dataset
    seen: gr.State
    empty: gr.HTML
    form: gr.Column
    files: use_files.Files

    @property
    def outputs(self) -> list[Any]:
        """The outputs of `updates`."""
        of_run = [self.seen, self.empty, self.form, self.context.step, self.controls.prompt, self.suggestions]
        return [*of_run, *self.controls.mixed, *use_files.outputs(self.files)]

    def wire(self) -> None:
        """Refresh when the page loads, when another run is chosen, and while a run is active."""
        context = self.context

        @show_errors
        def refresh(run_id: str | None, seen: list[Any] | None, chosen: list[Any] | None, request: gr.Request) -> list[Any]:
            return self.updates(context.settings.workspace(request), run_id, seen, chosen)

        # Judge selects a step for this screen before it is opened.
        for begun in (context.page.load, context.picked.change, context.refresh_triggers["use"].change):
            begun(refresh, [context.run, self.seen, context.chosen], self.outputs, **QUIET)
        context.step.input(lambda run_id, step: [run_id, step], [context.run, context.step], context.chosen, **QUIET)

    def updates(self, workspace: Workspace, run_id: str | None, seen: list[Any] | None, chosen: list[Any] | None) -> list[Any]:
        """Updates of `outputs`.

        Args:
            seen: the key of what the page shows, the first value that this returned last time.
            chosen: the run and the step that the user selected; used while the run has that step.
        """
        view = view_of(workspace, run_id)
        steps = steps_of(view.record) if view is not None and view.task == "subject" else None
        key = [run_id, None if view is None else view.task, None if steps is None else [steps.choices, steps.chosen]]
        if key == seen:
            return [gr.skip()] * len(self.outputs)
        if steps is None or not steps.choices:
            hidden = [gr.skip()] * (len(self.outputs) - 3)
            return [key, gr.HTML(_no_adapter_text(view), visible=True), gr.Column(visible=False), *hidden]
        by_hand = [step for _, step in steps.choices if [run_id, step] == chosen]
        of_step = gr.Dropdown(choices=steps.choices, value=next(iter(by_hand), steps.chosen))
        of_run = [gr.skip()] * (2 + MIXED) if _showed(seen, run_id) else self._of_run(workspace, view)
        files = use_files.updates(self.files, view)
        return [key, gr.HTML(visible=False), gr.Column(visible=True), of_step, *of_run, *files]

    def _of_run(self, workspace: Workspace, view: RunView) -> list[Any]:
        """The prompt, the example prompts and the further adapters, for a newly selected run."""
        prompts, choices = prompts_of(view), [("none", ""), *others(workspace, view.id)]
        words = [_example_prompt(view, prompts), gr.Dataset(samples=[[each] for each in prompts])]
        return [*words, *(gr.Dropdown(choices=choices, value="") for _ in self.controls.mixed)]


def _no_adapter_text(view: RunView | None) -> str:
    if view is None:
        return NO_RUN
    return CLASSIFIER if view.task == "classify" else NO_STEP


def _showed(seen: list[Any] | None, run_id: str | None) -> bool:
    """Whether the page shows this run with its adapters already."""
    return seen is not None and seen[0] == run_id and seen[2] is not None and bool(seen[2][0])


def prompts_of(view: RunView) -> list[str]:
    """The prompts of the run's validation images."""
    prompts = view.options.get("output", {}).get("validation_prompt")
    return [str(each) for each in prompts] if isinstance(prompts, list) else []


def _example_prompt(view: RunView, prompts: list[str]) -> str:
    prompt = view.chosen("data", "instance_prompt")
    return f"{prompt} in the snow" if prompt else next(iter(prompts), "")


def _wire_generation(
    context: AppContext, controls: Controls, buttons: tuple[gr.Button, gr.Button, gr.HTML], outputs: ImageOutputs
) -> None:
    """Attach the buttons Generate and Cancel, and show earlier images when the page loads."""
    generate, cancel, bar = buttons
    token = gr.State(0)

    @show_errors
    def generate_images(request: gr.Request, token: int, *values: Any) -> Iterator[list[Any]]:
        workspace = context.settings.workspace(request)
        yield from _generate(workspace, request_of(workspace, values), str(request.session_hash), token)

    @show_errors
    def show_gallery(request: gr.Request) -> list[Any]:
        return gallery_of(context.settings.workspace(request))

    at_once = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    started = generate.click(_begin, outputs=[token, generate, cancel, bar], **at_once)
    generating = started.then(
        generate_images,
        inputs=[token, *controls.inputs(context)],
        outputs=[bar, outputs.gallery, outputs.details],
        show_progress="minimal",
        show_progress_on=[bar],
        concurrency_limit=1,
        concurrency_id="device",
        api_visibility="private",
    )
    generating.success(_end, inputs=[token], outputs=[generate, cancel, bar], **at_once)
    generating.failure(lambda: [*_idle(), ""], outputs=[generate, cancel, bar], **at_once)
    cancel.click(_cancel, outputs=[bar], **at_once)
    context.page.load(show_gallery, outputs=[outputs.gallery, outputs.details], show_progress="hidden", api_visibility="private")


@show_errors
def _begin(request: gr.Request) -> list[Any]:
    token = CANCELLATIONS.begin(str(request.session_hash))
    return [token, gr.Button(interactive=False), gr.Button(visible=True), bar_of("Waiting for the device", 0, 1)]


@show_errors
def _end(token: int, request: gr.Request) -> list[Any]:
    cancelled = CANCELLATIONS.is_cancelled(str(request.session_hash), token)
    return [*_idle(), CANCELLED if cancelled else gr.skip()]


@show_errors
def _cancel(request: gr.Request) -> str:
    CANCELLATIONS.cancel(str(request.session_hash))
    return CANCELLED


def _generate(workspace: Workspace, generation_request: GenerationRequest, session: str, token: int) -> Iterator[list[Any]]:
    """Generate images; yields updates of the bar, the gallery and its details until the token is cancelled."""
    began = updated = time.monotonic()
    notice = _of_syntax(generation_request)
    with closing(WORKER.stream("generate", workspace, generation_request)) as events:
        for event in events:
            if CANCELLATIONS.is_cancelled(session, token):
                return
            if isinstance(event, Path):
                yield [gr.skip(), *gallery_of(workspace)]
            elif event.done in (0, event.total) or time.monotonic() - updated > SECONDS_BETWEEN:
                updated = time.monotonic()
                yield [notice + bar_of(event.words, event.done, event.total), gr.skip(), gr.skip()]
    yield [f"{notice}<p class='quiet'>Done in {time.monotonic() - began:.1f} s.</p>", gr.skip(), gr.skip()]


def _of_syntax(generation_request: GenerationRequest) -> str:
    """Warnings about A1111 prompt syntax, which is read as plain text, and what to use instead."""
    remedy = "choose it above as the step or under Combine with other adapters, with its weight"
    warnings = page_warnings([generation_request.prompt, generation_request.negative_prompt], remedy)
    return "".join(f'<div class="warning" role="status">{escaped(each)}</div>' for each in warnings)


def _idle() -> list[Any]:
    return [gr.Button(interactive=True), gr.Button(visible=False)]


def _wire_again(display: _RunDisplay, image_outputs: ImageOutputs) -> None:
    context, controls = display.context, display.controls
    private = {"show_progress": "hidden", "api_visibility": "private"}

    @show_errors
    def choose(event: gr.SelectData, request: gr.Request) -> list[Any]:
        path = GeneratedImages.of(context.settings.workspace(request)).find(Path(str(event.value["image"]["path"])).name)
        return [path.name, details_of(settings_of(path)[0]), gr.Button(visible=True)]

    image_outputs.gallery.select(choose, outputs=[image_outputs.chosen, image_outputs.details, image_outputs.again], **private)
    fields = [controls.scale, controls.negative, controls.count, controls.seed, controls.with_base, controls.steps]
    fields += [controls.guidance_scale, *controls.scales]

    @show_errors
    def again(name: str, run_id: str | None, request: gr.Request) -> list[Any]:
        workspace = context.settings.workspace(request)
        settings, _ = settings_of(GeneratedImages.of(workspace).find(name))
        adapter, step, scale, mixed = adapter_fields(settings)
        run_id = adapter or run_id
        updates = display.updates(workspace, run_id, None, None)
        positions = {id(each): at for at, each in enumerate(display.outputs)}
        updates[positions[id(context.step)]] = _with_step(workspace, run_id, step)
        updates[positions[id(controls.prompt)]] = settings["prompt"]
        mixed = [*mixed, *[("", 1.0)] * MIXED][:MIXED]
        choices = [("none", ""), *others(workspace, run_id)]
        for dropdown, (reference, _) in zip(controls.mixed, mixed, strict=True):
            updates[positions[id(dropdown)]] = _with_reference(choices, reference)
        sampling = [settings["num_inference_steps"], settings["guidance_scale"]]
        values = [scale, settings["negative_prompt"], 1, settings["seed"], False, *sampling, *(weight for _, weight in mixed)]
        return [run_id, None if step is None else [run_id, step], *updates, *values]

    outputs = [context.run, context.chosen, *display.outputs, *fields]
    image_outputs.again.click(again, inputs=[image_outputs.chosen, context.run], outputs=outputs, **private)


def _with_reference(choices: list[tuple[str, str]], reference: str) -> gr.Dropdown:
    """A dropdown of adapters with one selected, which may have been deleted."""
    missing = [] if reference in [value for _, value in choices] else [(reference, reference)]
    return gr.Dropdown(choices=[*choices, *missing], value=reference)


def _with_step(workspace: Workspace, run_id: str | None, step: int | None) -> Any:
    view = view_of(workspace, run_id)
    if view is None:
        raise InputError("The run of this image was deleted. Choose another run.")
    steps = steps_of(view.record)
    if step is not None and step not in [value for _, value in steps.choices]:
        raise InputError(f"Step {step} of this image's run is no longer saved. Choose another step.")
    return gr.Dropdown(choices=steps.choices, value=steps.chosen if step is None else step)


def _wire_small(
    context: AppContext, controls: Controls, suggestions: gr.Dataset, upload: gr.UploadButton, dice: gr.Button
) -> None:
    suggestions.click(lambda sample: sample[0], inputs=[suggestions], outputs=[controls.prompt], api_visibility="private")
    dice.click(lambda: secrets.randbelow(2**31), outputs=[controls.seed], show_progress="hidden", api_visibility="private")

    @show_errors
    def add(request: gr.Request, file: str, run_id: str | None, *values: Any) -> list[Any]:
        workspace = context.settings.workspace(request)
        added = uploads.add_adapter(workspace, file)
        for sentence in uploads.left_out(file):
            gr.Warning(html.escape(sentence), title="Partly added")
        choices, free = [("none", ""), *others(workspace, run_id)], next((p for p, each in enumerate(values) if not each), 0)
        chosen = [reference_of_file(added) if index == free else each for index, each in enumerate(values)]
        return [gr.Dropdown(choices=choices, value=each) for each in chosen]

    upload.upload(add, inputs=[upload, context.run, *controls.mixed], outputs=controls.mixed, api_visibility="private")
