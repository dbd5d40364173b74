"""HTML of a classifier's result: sentences, tables and bars. User-supplied text is escaped here."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from pipelines.methods import method_names, title_of
from training.runs.fewshot_files import ImagePrediction, TrialResult
from webui.class_results import CONTROL, ZERO_SHOT, Result, source_of
from webui.curves import Series, plot
from webui.labelled_datasets import LabelledClasses
from webui.render import parts, tile

BASELINES = {
    "zeroshot": "Zero-shot: no training, only the class names",
    "pixels": "Raw pixels: no model at all (the control)",
    "linear_probe": "Linear probe: logistic regression on the image features",
    "tip_adapter": "Tip-Adapter: compares each image with the cached training images",
    "tip_adapter_f": "Tip-Adapter-F: Tip-Adapter with a fine-tuned cache",
    "clap": "CLAP: a linear probe kept close to the zero-shot weights",
    "coop": "CoOp: learned prompt tokens around the class names",
    "clip_adapter": "CLIP-Adapter: a small network after the image encoder",
    "taskres": "TaskRes: a learned offset to the class embeddings",
    "gda": "GDA: Gaussian discriminant analysis",
}
MOST_IN_MATRIX, MOST_IN_CELL, WORST = 25, 48, 12
# Expected calibration error up to which the probabilities count as calibrated.
CALIBRATED = 0.05
# Handles clicks, and Enter on a focused cell, because cells are buttons.
MATRIX_JS = """element.addEventListener('click', (event) => {
  const cell = event.target.closest('button[data-true]');
  if (cell) trigger('select', {true: Number(cell.dataset.true), predicted: Number(cell.dataset.predicted)});
});"""


def method_title(method: str) -> str:
    """The display name of a method, with a short description."""
    return f"{title_of(method)} adapter" if method in method_names() else BASELINES.get(method, method)


def share(value: float) -> str:
    """`value` in percent, such as 69%; 100% only if it is exactly 1."""
    percent = f"{value:.0%}"
    return "over 99%" if percent == "100%" and value < 1 else percent


def result_summary(result: Result) -> str:
    """The test accuracy with its confidence interval, compared with the baselines, and warnings."""
    tested = result.trial.test
    count, value = tested.count, share(tested.top1.value)
    right = round(tested.top1.value * count)
    lead = (
        f'<p class="lead"><b class="figure">{value}</b>test accuracy: {right} of {count} test images are classified correctly '
        f"(95% interval: {share(tested.top1.low)} to {share(tested.top1.high)}). They were not used for training.</p>"
    )
    return lead + f"<p>{' '.join(_beside(result))}</p>" + "".join(_notes(result))


def _beside(result: Result) -> list[str]:
    sentences = []
    for method, words in ((ZERO_SHOT, "zero-shot (no training)"), (CONTROL, "raw pixels (no model)")):
        other = result.beside(method)
        if other is not None and result.trial.method != method:
            sentences.append(f"{words} {share(other.test.top1.value)}")
    chance = f"random guessing {share(1 / len(result.classes))}"
    return [f"On the same images: {'; '.join([*sentences, chance])}."]


def _notes(result: Result) -> list[str]:
    """Warnings: reasons to doubt the accuracy, and methods that are significantly better."""
    trial, notes = result.trial, []
    better = [one for one in result.same_split() if one.test.top1.low > trial.test.top1.high]
    if trial.scale_reason:
        notes.append(f"The adapter's scale was lowered because training reduced the accuracy. {html.escape(trial.scale_reason)}")
    if trial.method not in (CONTROL, ZERO_SHOT):
        notes += _beside_control(result, better)
    if untested := result.untested():
        what = ", ".join(map(html.escape, untested))
        notes.append(f"No test images for {what}, so the accuracy says nothing about it.")
    if better:
        names = " and ".join(html.escape(_short(one.method)) for one in better)
        verb, which = ("is", "it") if len(better) == 1 else ("are", "one of them")
        notes.append(f"{names} {verb} significantly better on these images. Choose {which} above.")
    return [f'<p class="warning">{note}</p>' for note in notes]


def _beside_control(result: Result, better: Sequence[TrialResult]) -> list[str]:
    """Warnings from comparing the method with the raw-pixel control.

    Args:
        better: the trials that are significantly better than this one.
    """
    control = result.beside(CONTROL)
    if control is None:
        return ["The raw-pixel control was not run, so it is unknown whether these images need a model at all."]
    if result.trial.test.top1.low > control.test.top1.high:
        return []
    compared = "better" if control in better else "about as good"
    return [
        f"Raw pixels are {compared} here. The images within a class are so similar that this test cannot show whether the "
        "model helps. Do not expect the same accuracy on images taken under other conditions."
    ]


def methods_table(result: Result) -> str:
    """All methods of the run side by side, averaged over its splits."""
    rows = []
    for row in result.report.summary:
        if row.shots != result.trial.shots:
            continue
        top1 = row.top1
        low, high = max(0.0, top1.low), min(1.0, top1.high)
        chosen = ' class="chosen"' if row.method == result.trial.method else ""
        rows.append(
            f"<tr{chosen}><th scope='row'>{html.escape(method_title(row.method))}</th>"
            f"<td class='number'>{share(top1.value)}</td><td class='number'>{share(low)} to {share(high)}</td>"
            f"<td class='number'>{row.num_trainable_parameters:,.0f}</td><td class='number'>{_size(row.stored_bytes)}</td>"
            f"<td class='number'>{row.seconds:.0f} s</td></tr>"
        )
    splits = len(result.report.seeds)
    heads = ("accuracy", "95% interval", "trainable parameters", "file size", "training time")
    head = "".join(f"<th scope='col' class='number'>{one}</th>" for one in heads)
    note = f"Means over {splits} splits." if splits > 1 else "From one split."
    return (
        f"<div class='scroll'><table class='plain'><thead><tr><th scope='col'>method</th>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div><p class='quiet'>{note}</p>"
    )


def _short(method: str) -> str:
    """The display name of a method without its description."""
    return method_title(method).partition(":")[0].partition(",")[0]


def _size(count: float) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} KB"


def per_class(result: Result) -> str:
    """Accuracy of each class, lowest first."""
    accuracies = {name: value for name, value in result.trial.test.per_class.items() if value is not None}
    counts = dict(zip(result.trial.test.per_class, map(sum, result.trial.test.confusion), strict=True))
    rows = [(name, value, f"{name} ({counts[name]})") for name, value in sorted(accuracies.items(), key=lambda one: one[1])]
    untested = "".join(f"<p class='warning'>{html.escape(name)} (0): no test images.</p>" for name in result.untested())
    shares = bars([(label, value) for _, value, label in rows])
    return f"{shares}<p class='quiet'>In brackets: the number of test images.</p>{untested}"


def bars(rows: Sequence[tuple[str, float]], first_only: bool = False) -> str:
    """Shares as bars.

    Args:
        rows: pairs of a name, which is escaped here, and a share in [0, 1].
        first_only: highlight only the first bar.
    """
    cells = []
    for index, (name, value) in enumerate(rows):
        second = " second" if first_only and index else ""
        fill = f'<span class="fill{second}" style="display:block;width:{value:.1%}"></span>'
        cells.append(
            f'<span class="name">{html.escape(name)}</span><span class="track">{fill}</span>'
            f'<span class="share">{share(value)}</span>'
        )
    return f'<div class="shares">{"".join(cells)}</div>'


def confusion(result: Result) -> str:
    """The confusion matrix, one row for each true class. Cells that count images are buttons."""
    counts, names = result.trial.test.confusion, result.classes
    labels = _in_matrix(counts)
    head = "".join(f"<th scope='col'>{html.escape(names[label])}</th>" for label in labels)
    rows = [
        f"<tr><th scope='row'>{html.escape(names[true])}</th>"
        f"{''.join(_cell(counts, names, true, other) for other in labels)}</tr>"
        for true in labels
    ]
    left_out = len(names) - len(labels)
    note = f" The {left_out} classes with the fewest mistakes are not shown." if left_out else ""
    return (
        "<div class='scroll'><table class='confusion'><caption>Rows: true class. Columns: predicted class. "
        f"Click a number to see its images.{note}</caption>"
        f"<thead><tr><td></td>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _in_matrix(counts: Sequence[Sequence[int]]) -> list[int]:
    """The indices of the classes in the matrix: all, or the `MOST_IN_MATRIX` with the most mistakes."""
    wrong = [sum(row) - row[label] + sum(other[label] for other in counts) - row[label] for label, row in enumerate(counts)]
    most = sorted(range(len(counts)), key=lambda label: -wrong[label])[:MOST_IN_MATRIX]
    return sorted(most)


def _cell(counts: Sequence[Sequence[int]], names: Sequence[str], true: int, predicted: int) -> str:
    count, total = counts[true][predicted], max(1, sum(counts[true]))
    if not count:
        return "<td>·</td>"
    kind = "right" if true == predicted else "wrong"
    words = html.escape(cell_label(names, true, predicted, count))
    opens = f"data-true='{true}' data-predicted='{predicted}' aria-label='{words}. Show images.' title='{words}'"
    shade = f"--share: {15 + 50 * count / total:.0f}%"
    return f"<td class='{kind}' style='{shade}'><button type='button' {opens}>{count}</button></td>"


def cell_label(names: Sequence[str], true: int, predicted: int, count: int) -> str:
    """A cell's label, such as "2 images of glass predicted as metal"; not escaped."""
    what = "1 image" if count == 1 else f"{count} images"
    return f"{what} of {names[true]} {'classified correctly' if true == predicted else f'predicted as {names[predicted]}'}"


def cell_images(result: Result, true: int, predicted: int) -> str:
    """The images of one cell of the confusion matrix."""
    matches = result.in_cell(true, predicted)
    heading = html.escape(cell_label(result.classes, true, predicted, result.trial.test.confusion[true][predicted]))
    if not matches:
        return f"<h4>{heading}</h4><p class='quiet'>This run is from an earlier version, which recorded no predictions.</p>"
    more = f"<p class='quiet'>And {len(matches) - MOST_IN_CELL} more.</p>" if len(matches) > MOST_IN_CELL else ""
    return f"<h4>{heading}</h4>{_tested(result, matches[:MOST_IN_CELL])}{more}"


def worst_mistakes(result: Result) -> str:
    """The wrong predictions with the highest confidence, and why they cannot be used for training."""
    wrong = result.mistakes()
    if not wrong:
        return "<p class='quiet'>No mistakes on the test images.</p>"
    return (
        f"{_tested(result, wrong[:WORST])}<p class='quiet'>These are test images. Training on them would raise the next "
        "accuracy without improving the classifier, so they cannot be added to the training images. If one has the wrong label, "
        "move it to its class under Images. To fix a kind of mistake, add other images like it under Use.</p>"
    )


def _tested(result: Result, matches: Sequence[ImagePrediction]) -> str:
    names = result.classes
    figures = []
    for one in matches:
        image = tile(source_of(result.record, one), f"a test image of {names[one.true]}")
        truth = "" if one.is_right else f"true class {html.escape(names[one.true])}, "
        figures.append((image, Markup(f"{truth}predicted <b>{html.escape(names[one.predicted])}</b> ({share(one.confidence)})")))
    return parts.tiles(figures)


def calibration(result: Result) -> str:
    """Expected calibration error before and after temperature scaling, as a sentence."""
    before, after = result.trial.test.calibration_error, result.trial.calibrated.calibration_error
    believed = "are well calibrated" if after <= CALIBRATED else "are only a rough guide"
    return (
        f"<p>Expected calibration error, the mean gap between confidence and accuracy: {100 * before:.1f} percentage points as "
        f"trained, {100 * after:.1f} after temperature scaling on validation images (temperature "
        f"{result.trial.temperature:.2f}). The probabilities on this page are the scaled ones; they {believed}. A dot below "
        "the line means overconfidence.</p>"
    )


def reliability(result: Result) -> str:
    """Reliability diagram: accuracy against confidence."""
    series = [Series("perfect calibration", [(0.0, 0.0), (1.0, 1.0)], "line", 3)]
    for metrics, name, colour in (
        (result.trial.test, "as trained", 2),
        (result.trial.calibrated, "after temperature scaling", 1),
    ):
        calibration_bins = metrics.reliability
        bins = zip(calibration_bins.confidence, calibration_bins.accuracy, calibration_bins.counts, strict=True)
        series.append(Series(name, [(confidence, accuracy) for confidence, accuracy, count in bins if count], "marks", colour))
    return plot("Accuracy by confidence", series, (0.0, 1.0))


def class_cards(classes: LabelledClasses, right: Mapping[str, tuple[int, int]], each: int = 8) -> str:
    """Every class with its number of images, some of them, and its zero-shot accuracy."""
    cards = []
    for one in classes.classes:
        stride = max(1, len(one.images) // each)
        some = [(tile(source, f"an image of {one.name}"), "") for source in one.images[::stride][:each]]
        recognised = right.get(one.key)
        untrained = f"<span class='quiet'>zero-shot: {recognised[0]} of {recognised[1]} correct</span>" if recognised else ""
        count = f"{len(one.images)} image{'' if len(one.images) == 1 else 's'}"
        cards.append(
            f"<section class='class-card'><header><b>{html.escape(one.name)}</b> <span>{count}</span> {untrained}</header>"
            f"{parts.tiles(some, 'small')}</section>"
        )
    return f"<div class='class-cards'>{''.join(cards)}</div>"
