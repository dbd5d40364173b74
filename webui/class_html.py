"""What a classifier's result looks like: sentences, tables and bars. Every word of a user's is escaped here."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.methods import method_names, title_of
from webui.class_results import CONTROL, ZERO_SHOT, Result, TestImage, source_of
from webui.curves import Series, plot
from webui.labelled_classes import LabelledClasses
from webui.thumbnails import image, images

BASELINES = {
    "zeroshot": "no training: the classes' names alone",
    "pixels": "raw pixels, without any model (the control)",
    "linear_probe": "linear probe: lines drawn between what the model sees",
    "tip_adapter": "Tip-Adapter: compares with the images kept in mind",
    "tip_adapter_f": "Tip-Adapter-F: the same, and trained",
    "clap": "CLAP: a linear probe held near the names",
    "coop": "CoOp: learned words around the names",
    "clip_adapter": "CLIP-Adapter: a small network behind the model",
    "taskres": "TaskRes: the names' meaning shifted",
    "gda": "GDA: a bell curve for each class",
}
MOST_IN_MATRIX, MOST_IN_CELL, WORST = 25, 48, 12
# Below it, a probability can be taken at its word.
CALIBRATED = 0.05
# Clicks, and Enter on a cell that has the focus, since cells are buttons.
MATRIX_JS = """element.addEventListener('click', (event) => {
  const cell = event.target.closest('button[data-true]');
  if (cell) trigger('select', {true: Number(cell.dataset.true), predicted: Number(cell.dataset.predicted)});
});"""


def called(method: str) -> str:
    """A method's name for people, with what it is."""
    return f"{title_of(method)} adapter" if method in method_names() else BASELINES.get(method, method)


def share(value: float) -> str:
    """Such as 69%; never 100% for less than all."""
    percent = f"{value:.0%}"
    return "over 99%" if percent == "100%" and value < 1 else percent


def result_summary(result: Result) -> str:
    """How good it is, beside what needs no training, and how far that can be trusted."""
    tested = result.trial["test"]
    count, value = tested["count"], share(tested["top1"]["value"])
    right = round(tested["top1"]["value"] * count)
    lead = (
        f'<p class="lead"><b class="figure">{value}</b>of {count} images that it was not shown, {right} are right: {value}, '
        f"between {share(tested['top1']['low'])} and {share(tested['top1']['high'])}.</p>"
    )
    return lead + f"<p>{' '.join(_beside(result))}</p>" + "".join(_notes(result))


def _beside(result: Result) -> list[str]:
    sentences = []
    for method, words in ((ZERO_SHOT, "before any training"), (CONTROL, "with raw pixels, which need no model at all")):
        other = result.beside(method)
        if other is not None and result.trial["method"] != method:
            sentences.append(f"{words} {share(other['test']['top1']['value'])}")
    chance = f"guessing would be right in {share(1 / len(result.classes))}"
    return [f"On the same images: {', '.join(sentences)}; {chance}." if sentences else f"{chance.capitalize()}."]


def _notes(result: Result) -> list[str]:
    """What stands against believing the accuracy, and where another method is plainly better."""
    trial, notes = result.trial, []
    better = [one for one in result.same_draw() if one["test"]["top1"]["low"] > trial["test"]["top1"]["high"]]
    if trial["guard"]:
        notes.append(f"Its strength was lowered, since training would have hurt. {html.escape(trial['guard'])}")
    if trial["method"] not in (CONTROL, ZERO_SHOT):
        notes += _beside_control(result, better)
    if untested := result.untested():
        what = ", ".join(map(html.escape, untested))
        notes.append(f"Nothing is known of how well {what} is recognised: there are no test images of it.")
    if better:
        names = " and ".join(html.escape(_short(one["method"])) for one in better)
        verb, which = ("is", "it") if len(better) == 1 else ("are", "one of them")
        notes.append(f"On these images {names} {verb} plainly better: choose {which} above.")
    return [f'<p class="warning">{note}</p>' for note in notes]


def _beside_control(result: Result, better: Sequence[dict[str, Any]]) -> list[str]:
    """What raw pixels, which need no model, say of the method's accuracy.

    Args:
        better: the methods that are plainly better than it.
    """
    control = result.beside(CONTROL)
    if control is None:
        return ["Raw pixels were not tried, so nothing here says whether these images need a model at all."]
    if result.trial["test"]["top1"]["low"] > control["test"]["top1"]["high"]:
        return []
    compared = "better" if control in better else "about as good"
    return [
        f"Raw pixels are {compared} here. These images are so alike within a class that nothing shows that the "
        "model helps; do not expect the accuracy to hold for images that were taken otherwise."
    ]


def methods_table(result: Result) -> str:
    """All methods of the run side by side, over all its draws."""
    rows = []
    for row in result.report["summary"]:
        if row["shots"] != result.trial["shots"]:
            continue
        top1 = row["top1"]
        low, high = max(0.0, top1["low"]), min(1.0, top1["high"])
        chosen = ' class="chosen"' if row["method"] == result.trial["method"] else ""
        rows.append(
            f"<tr{chosen}><th scope='row'>{html.escape(called(row['method']))}</th>"
            f"<td class='number'>{share(top1['value'])}</td><td class='number'>{share(low)} to {share(high)}</td>"
            f"<td class='number'>{row['trained_numbers']:,.0f}</td><td class='number'>{_size(row['stored_bytes'])}</td>"
            f"<td class='number'>{row['seconds']:.0f} s</td></tr>"
        )
    draws = len(result.report["seeds"])
    heads = ("right", "95% interval", "numbers learned", "file", "took")
    head = "".join(f"<th scope='col' class='number'>{one}</th>" for one in heads)
    note = f"Means over {draws} seeds (sampled training images)." if draws > 1 else "One seed (one sample of training images)."
    return (
        f"<div class='scroll'><table class='plain'><thead><tr><th scope='col'>method</th>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div><p class='quiet'>{note}</p>"
    )


def _short(method: str) -> str:
    """A method's name without what it is."""
    return called(method).partition(":")[0].partition(",")[0]


def _size(count: float) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} KB"


def per_class(result: Result) -> str:
    """The share that is right of each class, the worst first."""
    accuracies = {name: value for name, value in result.trial["test"]["per_class"].items() if value is not None}
    counts = dict(zip(result.trial["test"]["per_class"], map(sum, result.trial["test"]["confusion"]), strict=True))
    rows = [(name, value, f"{name} ({counts[name]})") for name, value in sorted(accuracies.items(), key=lambda one: one[1])]
    untested = "".join(f"<p class='warning'>{html.escape(name)} (0): no images were tested.</p>" for name in result.untested())
    shares = bars([(label, value) for _, value, label in rows])
    return f"{shares}<p class='quiet'>In brackets: how many images were tested.</p>{untested}"


def bars(rows: Sequence[tuple[str, float]], first_only: bool = False) -> str:
    """Shares as bars.

    Args:
        rows: a name, in users' words, and a share.
        first_only: colour the first alone.
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
    """The confusion matrix: a row for each true class, whose cells are buttons where there is an image in them."""
    counts, names = result.trial["test"]["confusion"], result.classes
    labels = _in_matrix(counts)
    head = "".join(f"<th scope='col'>{html.escape(names[label])}</th>" for label in labels)
    rows = [
        f"<tr><th scope='row'>{html.escape(names[true])}</th>"
        f"{''.join(_cell(counts, names, true, other) for other in labels)}</tr>"
        for true in labels
    ]
    left_out = len(names) - len(labels)
    note = f" The {left_out} classes with the fewest mistakes are left out." if left_out else ""
    return (
        "<div class='scroll'><table class='confusion'><caption>Rows are what an image shows, columns what it was taken for. "
        f"Open a number to see its images.{note}</caption>"
        f"<thead><tr><td></td>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _in_matrix(counts: Sequence[Sequence[int]]) -> list[int]:
    """The places of the classes that are shown: all, or of many those with the most mistakes."""
    wrong = [sum(row) - row[label] + sum(other[label] for other in counts) - row[label] for label, row in enumerate(counts)]
    most = sorted(range(len(counts)), key=lambda label: -wrong[label])[:MOST_IN_MATRIX]
    return sorted(most)


def _cell(counts: Sequence[Sequence[int]], names: Sequence[str], true: int, predicted: int) -> str:
    count, total = counts[true][predicted], max(1, sum(counts[true]))
    if not count:
        return "<td>·</td>"
    kind = "right" if true == predicted else "wrong"
    words = html.escape(cell_words(names, true, predicted, count))
    opens = f"data-true='{true}' data-predicted='{predicted}' aria-label='{words}. Show them.' title='{words}'"
    shade = f"--share: {15 + 50 * count / total:.0f}%"
    return f"<td class='{kind}' style='{shade}'><button type='button' {opens}>{count}</button></td>"


def cell_words(names: Sequence[str], true: int, predicted: int, count: int) -> str:
    """Such as "2 images of glass taken for metal"; in users' words."""
    what = "1 image" if count == 1 else f"{count} images"
    return f"{what} of {names[true]} {'recognised' if true == predicted else f'taken for {names[predicted]}'}"


def cell_images(result: Result, true: int, predicted: int) -> str:
    """The images of one cell of the matrix."""
    matches = result.in_cell(true, predicted)
    heading = html.escape(cell_words(result.classes, true, predicted, result.trial["test"]["confusion"][true][predicted]))
    if not matches:
        return f"<h4>{heading}</h4><p class='quiet'>This run is from before the tested images were written down.</p>"
    more = f"<p class='quiet'>And {len(matches) - MOST_IN_CELL} more.</p>" if len(matches) > MOST_IN_CELL else ""
    return f"<h4>{heading}</h4>{_tested(result, matches[:MOST_IN_CELL])}{more}"


def worst_mistakes(result: Result) -> str:
    """The wrong predictions that it was surest of, and why they cannot be learned from."""
    wrong = result.mistakes()
    if not wrong:
        return "<p class='quiet'>It made no mistake on the test images.</p>"
    return (
        f"{_tested(result, wrong[:WORST])}<p class='quiet'>These images are the test. Learning from them would raise the next "
        "accuracy without making the classifier better, so they cannot be added to the training. If one lies in the wrong class, "
        "move it under Images. To mend a mistake, add other images like it under Use.</p>"
    )


def _tested(result: Result, matches: Sequence[TestImage]) -> str:
    names = result.classes
    figures = []
    for one in matches:
        tile = image(source_of(result.record, one), f"a test image of {names[one.true]}")
        truth = "" if one.is_right else f"is {html.escape(names[one.true])}, "
        figures.append((tile, f"{truth}taken for <b>{html.escape(names[one.predicted])}</b>, {share(one.confidence)} sure"))
    return images(figures)


def calibration(result: Result) -> str:
    """How far the probabilities can be believed, before and after the temperature, in words."""
    before, after = (result.trial[part]["calibration_error"] for part in ("test", "calibrated"))
    believed = "can be taken at their word" if after <= CALIBRATED else "are only a rough guide"
    return (
        f"<p>How sure it says it is differs from how often it is right by {100 * before:.1f} percentage points as trained, and "
        f"by {100 * after:.1f} once its sureness was adjusted on other images (temperature "
        f"{result.trial['temperature']:.2f}). The probabilities here are the adjusted ones: they {believed}. A dot below the "
        "line means that it is too sure.</p>"
    )


def reliability(result: Result) -> str:
    """How often it is right when it is so sure, as a figure."""
    series = [Series("as it should be", [(0.0, 0.0), (1.0, 1.0)], "line", 3)]
    for part, name, colour in (("test", "as trained", 2), ("calibrated", "adjusted", 1)):
        calibration_bins = result.trial[part]["reliability"]
        bins = zip(calibration_bins["confidence"], calibration_bins["accuracy"], calibration_bins["counts"], strict=True)
        series.append(Series(name, [(sure, right) for sure, right, count in bins if count], "marks", colour))
    return plot("How often it is right, by how sure it is", series, (0.0, 1.0))


def class_cards(classes: LabelledClasses, right: Mapping[str, tuple[int, int]], each: int = 8) -> str:
    """Every class with its count, some of its images, and how often it is recognised before any training."""
    cards = []
    for one in classes.classes:
        stride = max(1, len(one.images) // each)
        some = [(image(source, f"an image of {one.name}"), "") for source in one.images[::stride][:each]]
        recognised = right.get(one.key)
        untrained = f"<span class='quiet'>{recognised[0]} of {recognised[1]} recognised untrained</span>" if recognised else ""
        count = f"{len(one.images)} image{'' if len(one.images) == 1 else 's'}"
        cards.append(
            f"<section class='class-card'><header><b>{html.escape(one.name)}</b> <span>{count}</span> {untrained}</header>"
            f"{images(some, 'small')}</section>"
        )
    return f"<div class='class-cards'>{''.join(cards)}</div>"
