"""The lower part of the screen Use: download the adapter's files, and merge several adapters into one."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_file_to_cache
from gradio.utils import get_upload_folder

from pipelines.subject.generation_request import GenerationRequest
from webui.context import AppContext, show_errors
from webui.generation import LAYOUTS, Layout, layouts_of, size_text
from webui.inference_worker import WORKER
from webui.runs import RunView

# With a delay, until the button has its new file.
SAVE = "() => { setTimeout(() => document.querySelector('#use-file').click(), 200); }"


@dataclass(frozen=True)
class Files:
    """The buttons that download files, and the size of each."""

    rows: dict[Layout, gr.Row]
    sizes: dict[Layout, gr.HTML]
    buttons: dict[Layout, gr.Button]
    layout: gr.Radio
    merge: gr.Button
    file: gr.DownloadButton


def build() -> Files:
    """Put the lower part of the screen Use into the open column."""
    gr.Markdown("### Download\nThe adapter at the selected step.", elem_id="use-download")
    rows, buttons, sizes = {}, {}, {}
    for layout, (name, _) in LAYOUTS.items():
        with gr.Row(elem_classes=["use-file"]) as rows[layout]:
            buttons[layout] = gr.Button(name, size="sm", scale=0, min_width=220, elem_id=f"use-download-{layout}")
            sizes[layout] = gr.HTML(elem_id=f"use-size-{layout}")
    gr.Markdown("### Merge\nAll adapters selected above, each at its weight, merged into one LoRA file.")
    with gr.Row():
        layout = gr.Radio(
            [("For ComfyUI and A1111", "kohya"), ("For diffusers", "diffusers")],
            value="kohya",
            show_label=False,
            container=False,
            elem_id="use-merge-layout",
        )
        merge = gr.Button("Merge into one file", size="sm", scale=0, min_width=220, elem_id="use-merge")
    file = gr.DownloadButton("Download", elem_id="use-file", elem_classes=["unseen"])
    return Files(rows, sizes, buttons, layout, merge, file)


def outputs(files: Files) -> list[Any]:
    """The outputs of `updates`."""
    return [*files.rows.values(), *files.sizes.values()]


def updates(files: Files, view: RunView) -> list[Any]:
    """Which layouts the run's adapters have, and the size and use of each."""
    layouts = layouts_of(view.record)
    rows = [gr.Row(visible=layout in layouts) for layout in files.rows]
    return [*rows, *(gr.HTML(_of_layout(layout, layouts.get(layout), view)) for layout in files.sizes)]


def _of_layout(layout: Layout, size: int | None, view: RunView) -> str:
    """The size and the use of a layout, and how much of the weight change a LoRA file of the run was expected to leave out."""
    share = view.status.expected_left_out if layout in ("diffusers", "kohya") else None
    approximate = f" It is an approximation: about {share:.0%} of the weight change was expected to be left out." if share else ""
    return f"<p><b>{size_text(size)}</b> <span class='quiet'>{LAYOUTS[layout][1]}{approximate}</span></p>"


def wire(context: AppContext, files: Files, inputs: list[Any], request_of: Callable[..., GenerationRequest]) -> None:
    """Create a file when its button is pressed, and let the browser download it.

    Args:
        inputs: the values that `request_of` makes a request of.
    """

    @show_errors
    def merge(request: gr.Request, layout: str, *values: Any) -> gr.DownloadButton:
        wanted = request_of(context.settings.workspace(request), values)
        with tempfile.TemporaryDirectory() as folder:
            path = WORKER.call("merge", wanted, layout, Path(folder))
            return gr.DownloadButton(value=save_file_to_cache(path, get_upload_folder()))

    on_device = {"concurrency_limit": 1, "concurrency_id": "device", "api_visibility": "private"}
    for layout, button in files.buttons.items():
        created = button.click(
            _download(context, layout),
            inputs=[context.run, context.step],
            outputs=[files.file],
            show_progress_on=[button],
            **on_device,
        )
        created.success(None, js=SAVE, api_visibility="private")
    created = files.merge.click(
        merge, inputs=[files.layout, *inputs], outputs=[files.file], show_progress_on=[files.merge], **on_device
    )
    created.success(None, js=SAVE, api_visibility="private")


def _download(context: AppContext, layout: Layout) -> Callable[..., gr.DownloadButton]:
    @show_errors
    def download(run_id: str, step: int, request: gr.Request) -> gr.DownloadButton:
        with tempfile.TemporaryDirectory() as folder:
            path = WORKER.call("adapter_file", context.settings.workspace(request), run_id, step, layout, Path(folder))
            return gr.DownloadButton(value=save_file_to_cache(path, get_upload_folder()))

    return download
