"""Classify, part 3: a classifier's accuracy, confusion matrix, mistakes, calibration, comparison of methods and files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr
from markupsafe import Markup

from pipelines.errors import InputError
from training.runs.fewshot_files import ImagePrediction
from webui import classifiers
from webui.classifiers import DOWNLOADS, Result, method_name, result_of, share, source_of, view_of
from webui.context import QUIET, AppContext
from webui.plots import Plot, line_plot
from webui.render import TEMPLATES, parts, tile
from webui.runs import RunView

MOST_IN_MATRIX, MOST_IN_CELL, WORST = 25, 48, 12
# Expected calibration error up to which the probabilities count as calibrated.
CALIBRATED = 0.05
NONE = ("No classifier yet", "Train one first: the example takes about a minute.")
PENDING = {
    "failed": "Training failed, so there is no result. Train shows the reason.",
    "stopped": "Training was stopped before the result. Resume it under Train.",
    "interrupted": "Training was interrupted before the result. Resume it under Train.",
}
# The series of the reliability diagram.
RELIABILITY = ("perfect calibration", "as trained", "after temperature scaling")
WORST_NOTE = (
    "These are test images. Training on them would raise the next accuracy without improving the classifier, so they cannot be "
    "added to the training images. If one has the wrong label, move it to its class under Images. To fix a kind of mistake, add "
    "other images like it under Use."
)
# Handles clicks, and Enter on a focused cell, because cells are buttons.
MATRIX_JS = """element.addEventListener('click', (event) => {
  const cell = event.target.closest('button[data-true]');
  if (cell) trigger('select', {true: Number(cell.dataset.true), predicted: Number(cell.dataset.predicted)});
});"""
macros: Any = TEMPLATES.get_template("classify.html").module


def pending(view: RunView | None) -> Markup:
    """What the page says in place of a result that does not exist."""
    if view is None:
        return parts.empty(*NONE)
    return parts.empty(
        "No result yet", PENDING.get(view.state, f"This run is {view.state}. Its result appears here; Train shows its progress.")
    )


def build(app: AppContext, run: gr.Dropdown, opened: gr.State) -> None:
    """Put the part into the open tab.

    Args:
        run: the classifiers.
        opened: changes when the part is opened, or another classifier is selected.
    """
    outputs, settings, seen = _layout(), app.settings, gr.State(None)

    def refresh(run_id: str | None, trial: str | None, before: Any, request: gr.Request) -> list[Any]:
        view = view_of(settings.workspace(request), run_id)
        result = None if view is None else result_of(view.record, trial)
        now = None if view is None else (view.id, view.state, result and result.trial.folder)
        if now == before and now is not None:
            return [gr.skip()] * (len(outputs) + 1)
        if result is None:
            return [gr.HTML(pending(view), visible=True), gr.Column(visible=False), *[gr.skip()] * (len(outputs) - 2), now]
        return [gr.HTML(visible=False), gr.Column(visible=True), *_updates(result), now]

    def open_cell(run_id: str, trial: str | None, event: gr.EventData, request: gr.Request) -> Markup:
        return _clicked_cell(result_of(settings.workspace(request).run(run_id), trial), event)

    # Loading the images starts the worker, so nothing is loaded before the part is opened.
    given = [run, outputs["method"]]
    events = [opened.change, outputs["method"].input]
    gr.on(events, refresh, [*given, seen], [*outputs.values(), seen], trigger_mode="always_last", **QUIET)
    outputs["confusion"].select(open_cell, given, [outputs["cell"]], **QUIET)


def _clicked_cell(result: Result | None, event: gr.EventData) -> Markup:
    """The images of the cell that was clicked in the confusion matrix."""
    labels = range(len(result.classes)) if result is not None else range(0)
    true, predicted = (getattr(event, name, None) for name in ("true", "predicted"))
    if not all(isinstance(label, int) and label in labels for label in (true, predicted)):
        raise InputError("This number belongs to another classifier. Reload the page.")
    return cell_images(result, true, predicted)


def _layout() -> dict[str, Any]:
    """The components by name, in the order of `_updates`."""
    made: dict[str, Any] = {"empty": gr.HTML(parts.empty(*NONE), elem_id="classify-no-result")}
    with gr.Column(visible=False, elem_id="classify-result") as made["all"]:
        info = "The figures below describe this method."
        made["method"] = gr.Dropdown(label="Method", info=info, filterable=False, interactive=True, elem_id="classify-method")
        made["words"] = gr.HTML(elem_id="classify-words")
        gr.HTML("<h3>Confusion matrix</h3>")
        made["confusion"] = gr.HTML(js_on_load=MATRIX_JS, apply_default_css=False, elem_id="classify-confusion")
        made["cell"] = gr.HTML(elem_id="classify-cell")
        gr.HTML("<h3>Accuracy per class</h3>")
        made["classes"] = gr.HTML(elem_id="classify-per-class")
        gr.HTML("<h3>Most confident mistakes</h3>")
        made["worst"] = gr.HTML(elem_id="classify-worst")
        gr.HTML("<h3>Comparison of methods</h3>")
        made["methods"] = gr.HTML(apply_default_css=False, elem_id="classify-methods")
        gr.HTML("<h3>Calibration</h3>")
        made["calibration"] = gr.HTML(elem_id="classify-calibration")
        hint = "A line below the diagonal means overconfidence."
        made["reliability"] = line_plot(
            "Accuracy by confidence", RELIABILITY, hint, x_title="confidence", elem_id="classify-reliability"
        )
        gr.HTML("<h3>Downloads</h3>")
        with gr.Row(elem_classes="buttons"):
            for name, title in DOWNLOADS.items():
                made[name] = gr.DownloadButton(title, size="sm", min_width=180, elem_id=f"classify-download-{name}")
    return made


def _updates(result: Result) -> list[Any]:
    """Updates of the method and of everything below it."""
    files = classifiers.downloads(result)
    splits = len(result.report.seeds)
    note = f"Means over {splits} splits." if splits > 1 else "From one split."
    return [
        method_choices(result, result.report.trials),
        macros.summary(*classifiers.headline(result), classifiers.findings(result)),
        confusion(result),
        "",
        per_class(result),
        worst_mistakes(result),
        macros.methods(classifiers.method_rows(result), note),
        parts.note(_calibration(result)),
        _reliability(result).update().make(),
        *(gr.DownloadButton(value=files.get(name), visible=name in files) for name in DOWNLOADS),
    ]


def method_choices(result: Result, trials: Sequence[Any]) -> gr.Dropdown:
    """A dropdown of the methods of `trials`, the most accurate first."""
    several = len({one.split_key for one in trials}) > 1
    choices = []
    for one in sorted(trials, key=lambda one: -one.test.top1.value):
        split = f", {one.shots} images per class, seed {one.seed}" if several else ""
        choices.append((f"{method_name(one.method)} ({share(one.test.top1.value)}{split})", one.folder))
    return gr.Dropdown(choices, value=result.trial.folder)


def confusion(result: Result) -> Markup:
    """The confusion matrix; of more than `MOST_IN_MATRIX` classes, those with the most mistakes."""
    counts, names = result.trial.test.confusion, result.classes
    mistakes = [sum(row) + sum(other[label] for other in counts) - 2 * row[label] for label, row in enumerate(counts)]
    labels = sorted(sorted(range(len(counts)), key=lambda label: -mistakes[label])[:MOST_IN_MATRIX])
    left_out = len(names) - len(labels)
    note = f" The {left_out} classes with the fewest mistakes are not shown." if left_out else ""
    rows = [(names[true], [_cell(result, true, predicted) for predicted in labels]) for true in labels]
    return macros.confusion([names[label] for label in labels], rows, note)


def _cell(result: Result, true: int, predicted: int) -> dict[str, Any] | None:
    row = result.trial.test.confusion[true]
    if not row[predicted]:
        return None
    return {
        "count": row[predicted],
        "css": "right" if true == predicted else "wrong",
        "shade": round(15 + 50 * row[predicted] / sum(row)),
        "label": cell_label(result, true, predicted),
        "true": true,
        "predicted": predicted,
    }


def cell_label(result: Result, true: int, predicted: int) -> str:
    """A cell's label, such as "2 images of glass predicted as metal"."""
    count, names = result.trial.test.confusion[true][predicted], result.classes
    what = "1 image" if count == 1 else f"{count} images"
    return f"{what} of {names[true]} {'classified correctly' if true == predicted else f'predicted as {names[predicted]}'}"


def cell_images(result: Result, true: int, predicted: int) -> Markup:
    """The images of one cell of the confusion matrix."""
    matches = result.in_cell(true, predicted)
    more = max(0, len(matches) - MOST_IN_CELL)
    return macros.cell(cell_label(result, true, predicted), _tested(result, matches[:MOST_IN_CELL]) if matches else None, more)


def per_class(result: Result) -> Markup:
    """The accuracy of each class and what it is mistaken for, lowest first."""
    tested = result.trial.test
    rows = []
    for label, (name, value) in enumerate(tested.per_class.items()):
        count, hint = sum(tested.confusion[label]), classifiers.confused_with(result, label)
        if value is not None:
            rows.append((name, value, share(value), f"{count} test images{hint and f', {hint}'}"))
    untested = [parts.warning(f"{name} (0): no test images.") for name in result.untested()]
    return Markup("").join([macros.bars(sorted(rows, key=lambda row: row[1])), *untested])


def worst_mistakes(result: Result) -> Markup:
    """The wrong predictions with the highest confidence, and why they cannot be used for training."""
    wrong = result.mistakes()
    if not wrong:
        return parts.note("No mistakes on the test images.")
    return _tested(result, wrong[:WORST]) + parts.note(WORST_NOTE)


def _tested(result: Result, matches: Sequence[ImagePrediction]) -> Markup:
    """Test images with their predictions."""
    names, figures = result.classes, []
    for one in matches:
        caption = macros.caption("" if one.is_right else names[one.true], names[one.predicted], share(one.confidence))
        figures.append((tile(source_of(result.record, one), f"a test image of {names[one.true]}"), caption))
    return parts.tiles(figures)


def _calibration(result: Result) -> str:
    """The expected calibration error before and after temperature scaling, as a sentence."""
    before, after = result.trial.test.calibration_error, result.trial.calibrated.calibration_error
    believed = "are well calibrated" if after <= CALIBRATED else "are only a rough guide"
    return (
        f"Expected calibration error, the mean gap between confidence and accuracy: {100 * before:.1f} percentage points as "
        f"trained, {100 * after:.1f} after temperature scaling on validation images (temperature "
        f"{result.trial.temperature:.2f}). The probabilities on this page are the scaled ones; they {believed}."
    )


def _reliability(result: Result) -> Plot:
    """The reliability diagram: accuracy against confidence."""
    series = {RELIABILITY[0]: [(0.0, 0.0), (1.0, 1.0)]}
    for name, metrics in zip(RELIABILITY[1:], (result.trial.test, result.trial.calibrated), strict=True):
        bins = zip(metrics.reliability.confidence, metrics.reliability.accuracy, metrics.reliability.counts, strict=True)
        series[name] = [(confidence, accuracy) for confidence, accuracy, count in bins if count]
    return Plot("Accuracy by confidence", series, (0.0, 1.0))
