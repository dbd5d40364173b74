"""Classify, part 4: classify new images, correct wrong predictions and train again."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from pipelines.errors import InputError
from pipelines.fewshot.sources import ImageFile
from pipelines.image_formats import UPLOAD_SUFFIXES
from webui import class_files, class_html, class_runs
from webui.class_results import Result, result_of
from webui.class_runs import ClassifyContext
from webui.context import QUIET, show_errors
from webui.inference_worker import WORKER
from webui.render import tile

MOST = 100
RIGHT = ""
INTRO = (
    "<p>Drop new images to classify them. Each card shows the three most likely classes. An image that belongs to none of the "
    "classes is still assigned to one of them.</p>"
)
AGAIN = (
    "<p class='quiet'>Where a prediction is wrong, choose the true class below the image. The corrected images become training "
    "images. The new classifier is tested on the same images as this one, so the two accuracies can be compared.</p>"
)


def build(context: ClassifyContext) -> None:
    """Put the part into the open tab."""
    empty = gr.HTML("<p class='empty'>No classifier yet. Train one first.</p>", elem_id="classify-new-empty")
    with gr.Column(visible=False) as column:
        gr.HTML(INTRO)
        method = gr.Dropdown(label="Method", filterable=False, interactive=True, elem_id="classify-new-method")
        files = gr.File(
            label="New images",
            file_count="multiple",
            file_types=list(UPLOAD_SUFFIXES),
            height=160,
            elem_id="classify-new-files",
        )
        predictions = gr.State([])
        _cards(context, predictions)
        table = gr.DownloadButton("Table of predictions (CSV)", visible=False, elem_id="classify-new-table")
    _wire(
        context, {"empty": empty, "content": column, "method": method, "files": files, "predictions": predictions, "table": table}
    )


def _wire(context: ClassifyContext, parts: dict[str, Any]) -> None:
    settings = context.app.settings
    seen = gr.State(None)

    @show_errors
    def refresh(run_id: str | None, before: Any, request: gr.Request) -> list[Any]:
        view = class_runs.view_of(settings.workspace(request), run_id)
        result = None if view is None else result_of(view.record)
        now, hidden = None if result is None else view.id, gr.DownloadButton(visible=False)
        if now == before and now is not None:
            return [gr.skip()] * 6
        if result is None:
            return [gr.HTML(visible=True), gr.Column(visible=False), gr.skip(), [], hidden, now]
        return [gr.HTML(visible=False), gr.Column(visible=True), _methods(result), [], hidden, now]

    @show_errors
    def classify(run_id: str, trial: str | None, files: list[str] | None, request: gr.Request) -> tuple[Any, ...]:
        if not files:
            return [], gr.DownloadButton(visible=False)
        _check_count(files)
        rows = WORKER.call("classify", settings.workspace(request).run(run_id), files, trial)
        predictions = [{**row, "file": file} for row, file in zip(rows, files, strict=True)]
        return predictions, gr.DownloadButton(
            value=class_files.new_table(_table(rows)), visible=any("class" in row for row in rows)
        )

    outputs = [parts[name] for name in ("empty", "content", "method", "predictions", "table")]
    context.refresh_trigger.change(refresh, [context.run, seen], [*outputs, seen], **QUIET)
    gr.on(
        [parts["files"].upload, parts["files"].clear, parts["files"].delete, parts["method"].input],
        classify,
        [context.run, parts["method"], parts["files"]],
        [parts["predictions"], parts["table"]],
        api_visibility="private",
        show_progress="minimal",
        concurrency_id="device",
        concurrency_limit=1,
    )


def _check_count(files: list[str]) -> None:
    if len(files) > MOST:
        raise InputError(f"At most {MOST} images can be classified at once, got {len(files)}. Choose fewer.")


def _cards(context: ClassifyContext, predictions: gr.State) -> None:
    """A card for each image with its predictions and a field for the true class; rendered again when they change."""

    @gr.render(inputs=[predictions, context.run], triggers=[predictions.change], show_progress="hidden")
    def render_cards(rows: list[dict[str, Any]], run_id: str | None, request: gr.Request) -> None:
        if not rows:
            return
        classes = result_of(context.app.settings.workspace(request).run(run_id)).classes
        answers: list[gr.Dropdown] = []
        with gr.Row(equal_height=False, elem_id="classify-predictions"):
            for row in rows:
                with gr.Column(min_width=240, elem_classes="found-card"):
                    gr.HTML(_card(row))
                    if "class" in row:
                        answers.append(_true_class(row["class"], classes, f"classify-correct-{len(answers)}"))
        if answers:
            gr.HTML(AGAIN)
            _train_again_button(context, predictions, answers)


def _true_class(predicted: str, classes: Sequence[str], elem_id: str) -> gr.Dropdown:
    """A field for the true class of an image; by default the prediction is correct."""
    choices = [(f"correct: {predicted}", RIGHT), *((name, name) for name in classes if name != predicted)]
    return gr.Dropdown(choices, value=RIGHT, label="True class", interactive=True, elem_id=elem_id)


def _train_again_button(context: ClassifyContext, predictions: gr.State, answers: list[gr.Dropdown]) -> None:
    """A button that adds the corrected images to the training images and starts a run.

    Args:
        answers: the fields for the true classes of the images that were classified.
    """
    app = context.app
    again = gr.Button("Add the corrected images and train again", variant="primary", elem_id="classify-again")

    @show_errors
    def train_again(
        run_id: str, draft: dict[str, Any], rows: list[dict[str, Any]], request: gr.Request, *answered: str
    ) -> list[Any]:
        workspace = app.settings.workspace(request)
        corrected: dict[str, list[Path]] = {}
        for row, name in zip((row for row in rows if "class" in row), answered, strict=True):
            if name != RIGHT:
                corrected.setdefault(name, []).append(Path(row["file"]))
        set_id, new = class_runs.train_again(workspace, workspace.run(run_id), corrected)
        return [{**draft, "set": set_id}, gr.Tabs(selected="train"), *app.show(workspace, new)]

    inputs, outputs = [context.run, context.draft, predictions, *answers], [context.draft, context.steps, *app.outputs]
    again.click(train_again, inputs, outputs, api_visibility="private", concurrency_limit=1)


def _card(row: dict[str, Any]) -> str:
    """An image and its most likely classes, as HTML."""
    name = html.escape(row["image"])
    if "error" in row:
        return f"<p class='warning'>{html.escape(row['error'])}</p>"
    image = tile(ImageFile(Path(row["file"]).name, Path(row["file"]).parent), row["image"])
    notes = "".join(f"<p class='quiet'>{html.escape(note)}</p>" for note in row.get("notes", ()))
    bars = class_html.bars([(label, value) for label, value in row["top"]], first_only=True)
    return f"<div class='thumbs'><figure>{image}</figure></div><p class='quiet name'>{name}</p>{notes}{bars}"


def _methods(result: Result) -> gr.Dropdown:
    """The methods of the split whose trial was chosen as the classifier."""
    choices = [(class_html.method_title(one.method), one.folder) for one in result.same_split()]
    return gr.Dropdown(choices, value=result.trial.folder)


def _table(rows: list[dict[str, Any]]) -> list[list[str]]:
    classified = [row for row in rows if "class" in row]
    count = len(classified[0]["top"]) if classified else 0
    head = [word for rank in range(1, count + 1) for word in (f"class {rank}", f"probability {rank}")]
    return [
        ["image", *head],
        *([row["image"], *(word for name, value in row["top"] for word in (name, f"{value:.6g}"))] for row in classified),
    ]
