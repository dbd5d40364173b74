"""The lower part of the screen Runs: runs side by side, and one prompt for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import gradio as gr

from webui.compare import MAX_RUNS, Compared, letter, side_by_side
from webui.context import QUIET, AppContext, show_errors
from webui.generation import reference_of, request_for, steps_of
from webui.inference_worker import WORKER
from webui.render import parts, thumbnail
from webui.runs import RunView, views
from webui.workspace import Workspace

NO_ADAPTER = "no saved adapter yet"


def build(context: AppContext) -> None:
    """Put this part into the open tab."""
    settings, components = context.settings, _layout()
    chosen, seen = components["chosen"], gr.State(None)

    @show_errors
    def choices(before: Any, request: gr.Request) -> list[Any]:
        now = [(view.title, view.id) for view in views(settings.workspace(request))]
        return [gr.skip() if now == before else gr.Dropdown(choices=now), now]

    context.refresh_triggers["runs"].change(choices, seen, [chosen, seen], trigger_mode="always_last", **QUIET)

    @show_errors
    def compare(ids: list[str] | None, request: gr.Request) -> list[Any]:
        compared = Compared.of(settings.workspace(request), ids or [])
        is_subject = compared.task == "subject"
        first = str(compared.views[0].chosen("data", "instance_prompt") or "") if is_subject else ""
        comparison = gr.HTML(value=compared.in_html(), visible=True)
        return [comparison, gr.Accordion(visible=is_subject), gr.Textbox(value=first), gr.HTML(value="", visible=False)]

    outputs = [components[name] for name in ("comparison", "form", "prompt", "images")]
    components["show"].click(compare, chosen, outputs, api_visibility="private")

    @show_errors
    def generate_all(ids: list[str] | None, prompt: str, seed: float | None, request: gr.Request) -> Iterator[Any]:
        workspace = settings.workspace(request)
        for words in generated_with_all(workspace, Compared.of(workspace, ids or []), prompt, int(seed or 0)):
            yield gr.HTML(value=words, visible=True)

    device = {"concurrency_id": "device", "concurrency_limit": 1, "api_visibility": "private"}
    started = components["draw"].click(
        generate_all, [chosen, components["prompt"], components["seed"]], components["images"], **device
    )
    components["cancel"].click(None, cancels=[started], api_visibility="private")


def _layout() -> dict[str, Any]:
    """The components by name."""
    gr.HTML("<h2>Side by side</h2>")
    components: dict[str, Any] = {}
    components["chosen"] = gr.Dropdown(
        label="Runs to compare",
        info=f"Two to {MAX_RUNS} of the same kind: images, losses, scores and the options that differ.",
        multiselect=True,
        max_choices=MAX_RUNS,
        elem_id="runs-compare",
    )
    with gr.Row(elem_classes="buttons"):
        components["show"] = gr.Button("Compare", variant="primary", elem_id="runs-compare-show", scale=0, min_width=140)
    components["comparison"] = gr.HTML(visible=False, elem_id="runs-compared")
    components["form"] = gr.Accordion(
        "Generate one prompt with all of them", open=False, visible=False, elem_id="runs-compare-form"
    )
    with components["form"]:
        with gr.Row(equal_height=True):
            components["prompt"] = gr.Textbox(label="Prompt", elem_id="runs-compare-prompt", scale=4)
            components["seed"] = gr.Number(
                label="Seed", value=0, precision=0, minimum=0, elem_id="runs-compare-seed", scale=1, min_width=100
            )
        with gr.Row(elem_classes="buttons"):
            components["draw"] = gr.Button("Generate", variant="primary", elem_id="runs-compare-generate", scale=0, min_width=140)
            components["cancel"] = gr.Button("Cancel", elem_id="runs-compare-cancel", scale=0, min_width=140)
        components["images"] = gr.HTML(visible=False, elem_id="runs-compare-images")
    return components


def generated_with_all(workspace: Workspace, compared: Compared, prompt: str, seed: int) -> Iterator[str]:
    """Generate `prompt` with the adapter of each run from the same seed; yields the table so far as HTML.

    Raises: InputError if an adapter or the prompt cannot be used.
    """
    steps = [steps_of(view.record).chosen for view in compared.views]
    cells = ["" if step is not None else NO_ADAPTER for step in steps]
    for index, (view, step) in enumerate(zip(compared.views, steps, strict=True)):
        if step is None:
            continue
        request = request_for(workspace, [(reference_of(view.id, step), 1.0, None)], prompt=prompt, seed=seed)
        with closing(WORKER.stream("generate", workspace, request)) as events:
            for event in events:
                if isinstance(event, Path):
                    cells[index] = parts.image(thumbnail(event), prompt, "pixel")
                yield _table(compared.views, steps, cells, prompt, seed)


def _table(runs: tuple[RunView, ...], steps: list[int | None], cells: list[str], prompt: str, seed: int) -> str:
    heads = [f"{letter(index)}{'' if step is None else f', step {step}'}" for index, step in enumerate(steps)]
    waiting = [cell or '<span class="quiet" role="status">generating</span>' for cell in cells]
    return side_by_side(heads, {f"{prompt} (seed {seed})": waiting})
