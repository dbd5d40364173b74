"""Classify, parts 3 and 4: the result of a classifier, its predictions for other images, and training again with corrections."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import Markup

from pipelines.built_in import BUILT_IN_CLIP_NAME
from pipelines.errors import InputError
from pipelines.fewshot.layouts import counted
from pipelines.fewshot.sources import ImageFile
from pipelines.image_formats import UPLOAD_SUFFIXES
from training.runs import naming
from webui import classifiers
from webui.classifiers import DOWNLOADS, Result, result_of, share
from webui.context import QUIET, AppContext
from webui.inference_worker import WORKER
from webui.plots import Plot, line_plot
from webui.render import macros, parts, tile
from webui.runs import view_of
from webui.workspace import Workspace

MOST_FILES, LIVE_TOP = 100, 5
HIDDEN = gr.update(visible=False)
# Sends the clicks on the buttons of a template, for this screen's HTML: see there.
SCRIPT = Path(__file__).parents[1].joinpath("classify.js").read_text(encoding="utf-8")
# Classification does not wait for the generation of images.
CLASSIFIER = {"concurrency_id": "classifier", "concurrency_limit": 1, "api_visibility": "private"}
# The series of the reliability diagram.
RELIABILITY = ("perfect calibration", "as trained", "after temperature scaling")
ASK = parts.note("Drop, paste or photograph something: the answer appears here.")
INTRO = parts.note("An image that belongs to none of the classes is still assigned to one of them.")
result_html = macros(
    "classify_result.html", classifiers=classifiers, naming=naming, counted=counted, tile=tile, built_in=BUILT_IN_CLIP_NAME
)


class ClassifierParts:
    """The components and event handlers of both parts.

    Args:
        run: the dropdown of classifiers.
        method: the dropdown of the classifier's methods.
        opened: changes when a part is opened, or another classifier is selected.
    """

    def __init__(self, app: AppContext, run: gr.Dropdown, method: gr.Dropdown, opened: gr.State) -> None:
        self.app, self.run, self.method, self.opened = app, run, method, opened

    def build_result(self) -> None:
        """Put the result into the open tab."""
        self.no_result = gr.HTML(result_html.pending(None), elem_id="classify-no-result")
        with gr.Column(visible=False, elem_id="classify-result") as self.result:
            self.words = gr.HTML(elem_id="classify-words")
            self.confusion = gr.HTML(js_on_load=SCRIPT, apply_default_css=False, elem_id="classify-confusion")
            self.cell = gr.HTML(elem_id="classify-cell")
            self.details = gr.HTML(apply_default_css=False, elem_id="classify-details")
            hint, title = "A line below the diagonal means overconfidence.", "Accuracy by confidence"
            self.reliability = line_plot(title, RELIABILITY, hint, x_title="confidence", elem_id="classify-reliability")
            gr.HTML("<h3>Downloads</h3>")
            with gr.Row(elem_classes="buttons"):
                named = {"size": "sm", "min_width": 180}
                self.files_of_run = [
                    gr.DownloadButton(title, elem_id=f"classify-download-{name}", **named) for name, title in DOWNLOADS.items()
                ]

    def build_use(self) -> None:
        """Put the use on other images into the open tab."""
        self.no_use = gr.HTML(result_html.pending(None), elem_id="classify-new-empty")
        with gr.Column(visible=False) as self.use:
            gr.HTML(INTRO)
            with gr.Row(equal_height=False):
                named = {"label": "One image", "type": "filepath", "height": 300, "min_width": 280, "elem_id": "classify-live"}
                self.live = gr.Image(sources=["upload", "webcam", "clipboard"], **named)
                with gr.Column(min_width=280):
                    self.answer = gr.HTML(ASK, elem_id="classify-answer")
            named = {"file_types": list(UPLOAD_SUFFIXES), "height": 140, "elem_id": "classify-new-files"}
            self.files = gr.File(label="Many images", file_count="multiple", **named)
            self.predictions = gr.HTML(js_on_load=SCRIPT, apply_default_css=False, elem_id="classify-predictions")
            self.table = gr.DownloadButton("Table of predictions (CSV)", visible=False, elem_id="classify-new-table")

    def connect(self) -> None:
        """Connect the events of both parts."""
        self.seen, self.rows, chosen = gr.State(None), gr.State([]), [self.run, self.method]
        self.figures = [self.method, self.words, self.confusion, self.cell, self.details, self.reliability, *self.files_of_run]
        predicted, always = [self.rows, self.predictions, self.table], {"trigger_mode": "always_last"}
        outputs = [self.no_result, self.result, self.no_use, self.use, *self.figures, self.live, self.answer, *predicted]
        # Loading the images starts the worker, so nothing is loaded before a part is opened.
        opened = [self.opened.change, self.method.input]
        gr.on(opened, self.refresh, [*chosen, self.seen], [self.seen, *outputs], **always, **QUIET)
        self.confusion.click(self.open_cell, chosen, [self.cell], **QUIET)
        events, many = [self.live.input, self.live.clear, self.method.input], {"trigger_mode": "multiple", **CLASSIFIER}
        gr.on(events, self.classify_one, [*chosen, self.live], [self.answer], **many)
        events = [self.files.upload, self.files.clear, self.files.delete, self.method.input]
        gr.on(events, self.classify, [*chosen, self.files], predicted, show_progress="minimal", **CLASSIFIER)
        draft = self.app.class_draft
        again = {"api_visibility": "private", "concurrency_limit": 1}
        self.predictions.select(self.train_again, [self.run, draft, self.rows], [draft, *self.app.outputs], **again)

    def refresh(self, run_id: str | None, trial: str | None, before: Any, request: gr.Request) -> dict[Any, Any]:
        """Show the classifier: its best method, unless another one was chosen; without the predictions of another classifier."""
        view = view_of(self._workspace(request), run_id)
        is_same = before is not None and before[0] == run_id
        result = result_of(view.record, trial if is_same else None) if view else None
        now = (run_id, view and view.state, result and result.trial.folder)
        if now == before:
            return {self.seen: gr.skip()}
        changed = {self.seen: now}
        for empty, part in ((self.no_result, self.result), (self.no_use, self.use)):
            changed |= {empty: gr.HTML(result_html.pending(view), visible=result is None), part: gr.Column(visible=bool(result))}
        changed |= zip(self.figures, result_updates(result) if result else [gr.Dropdown(visible=False)], strict=False)
        if not is_same:
            changed |= {self.live: None, self.answer: ASK, self.rows: [], self.predictions: "", self.table: HIDDEN}
        return changed

    def open_cell(self, run_id: str, trial: str | None, event: gr.EventData, request: gr.Request) -> Markup:
        """The images of the cell that was clicked in the confusion matrix."""
        result = result_of(self._workspace(request).run(run_id), trial)
        labels = {str(label): label for label in range(len(result.classes) if result is not None else 0)}
        true, predicted = (labels.get(str(event._data.get(name))) for name in ("true", "predicted"))
        if true is None or predicted is None:
            raise InputError("This number belongs to another classifier. Reload the page.")
        return result_html.cell(result, true, predicted)

    def classify_one(self, run_id: str, trial: str | None, file: str | None, request: gr.Request) -> Markup:
        """The likeliest classes of the one image."""
        if file is None:
            return ASK
        (row,) = WORKER.call("classify", self._workspace(request).run(run_id), [file], trial, LIVE_TOP)
        return result_html.prediction(row, "large")

    def classify(self, run_id: str, trial: str | None, files: list[str] | None, request: gr.Request) -> tuple[Any, ...]:
        """The predictions for many images, and a table of them."""
        if len(files or []) > MOST_FILES:
            raise InputError(f"At most {MOST_FILES} images can be classified at once, got {len(files)}. Choose fewer.")
        if not files:
            return [], "", HIDDEN
        record = self._workspace(request).run(run_id)
        rows = WORKER.call("classify", record, files, trial)
        images, table = [ImageFile(Path(file).name, Path(file).parent) for file in files], classifiers.predicted_table(rows)
        download = gr.DownloadButton(value=table, visible=table is not None)
        predicted = [{**row, "file": file} for row, file in zip(rows, files, strict=True)]
        return predicted, result_html.predictions(rows, images, result_of(record).classes), download

    def train_again(
        self, run_id: str, stored: dict[str, Any], rows: list[dict[str, Any]], event: gr.EventData, request: gr.Request
    ) -> list[Any]:
        """Start a run with the images whose true class was given, and show its progress."""
        corrected: dict[str, list[Path]] = {}
        for index, name in event.fields.items():
            if name:
                corrected.setdefault(name, []).append(Path(rows[int(index)]["file"]))
        workspace = self._workspace(request)
        set_id, new = classifiers.train_again(workspace, workspace.run(run_id), corrected)
        return [{**stored, "set": set_id}, *self.app.show(workspace, new, "train")]

    def _workspace(self, request: gr.Request) -> Workspace:
        return self.app.settings.workspace(request)


def result_updates(result: Result) -> list[Any]:
    """Updates of the methods and of everything that describes the chosen one."""
    details = (result_html.per_class, result_html.worst, result_html.methods, result_html.calibration)
    files = classifiers.downloads(result)
    return [
        method_choices(result),
        result_html.headline(result) + result_html.findings(result),
        result_html.confusion(result),
        "",
        Markup("").join(part(result) for part in details),
        reliability(result).update().make(),
        *(gr.DownloadButton(value=files.get(name), visible=name in files) for name in DOWNLOADS),
    ]


def method_choices(result: Result) -> gr.Dropdown:
    """The dropdown of methods, the most accurate first."""
    several = len({one.split_key for one in result.report.trials}) > 1
    choices = []
    for one in sorted(result.report.trials, key=lambda one: -one.test.top1.value):
        split = f", {one.shots} images per class, seed {one.seed}" if several else ""
        choices.append((f"{naming.method_name(one.method)} ({share(one.test.top1.value)}{split})", one.folder))
    return gr.Dropdown(choices, value=result.trial.folder, visible=True)


def reliability(result: Result) -> Plot:
    """The reliability diagram: accuracy against confidence."""
    series = {RELIABILITY[0]: [(0.0, 0.0), (1.0, 1.0)]}
    for name, metrics in zip(RELIABILITY[1:], (result.trial.test, result.trial.calibrated), strict=True):
        bins = zip(metrics.reliability.confidence, metrics.reliability.accuracy, metrics.reliability.counts, strict=True)
        series[name] = [(confidence, accuracy) for confidence, accuracy, count in bins if count]
    return Plot("Accuracy by confidence", series, (0.0, 1.0))
