"""What a run says about its steps, as HTML: samples side by side, curves, scores, the suggestion, the certificate."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from training.runs.record import RunRecord
from training.subject.checkpoint_selection import COPY_THRESHOLD, Point, StepScores
from training.subject.measured import heldout_curve, sample_scores
from webui.curves import Series, plot
from webui.images import Sample, address, sampled_steps, samples, subject, thumbnail
from webui.views import RunView

SUGGESTION, CERTIFICATE = "suggestion.json", "certificate.json"
READ_LOSS = (
    "How wrong the model is about a photo of your subject that it does not learn from, and about those it does. Where the first "
    "turns upwards while the second falls on, it learns your photos by heart."
)
READ_SUBJECT = "How alike the samples are to your photos. Higher is better, and the curve flattens when there is no more to gain."
READ_PROMPT = "How well the samples show what the words ask for. It falls when the subject pushes the words aside."
READ_COPY = (
    "How near the samples come to one single photo of yours, by what is in them and by their outlines. At the limit they are "
    "copies of it rather than new images."
)
LOSSES = {"heldout": "loss, held out", "seen": "loss, learned"}
SCORES = {"subject": "likeness", "prompt": "words", "nearest": "nearest photo", "copy": "nearest outline"}
NO_LOSS = "No photo was held out, so there is no such curve."


def suggestion(view: RunView) -> str:
    """Which step to use and why, and what is warned of."""
    recommended = view.read(SUGGESTION)
    if not recommended:
        return _not_yet(view)
    reason, _, figures = str(recommended["why"]).partition(". ")
    more = f"<details><summary>All the figures behind it</summary><p>{html.escape(figures)}</p></details>" if figures else ""
    warnings = "".join(f'<p class="warning overfit">{html.escape(each)}</p>' for each in recommended["warnings"])
    return (
        '<p class="phase"><span class="chip good">recommended</span> '
        f"<b>Step {recommended['step']} of {recommended['last']}</b></p>"
        f"<p>{html.escape(reason.rstrip('.'))}.</p>{more}{warnings}"
    )


def _not_yet(view: RunView) -> str:
    measured = bool(sampled_steps(view.record))
    if view.is_active:
        lead, there = "The recommended step appears when training is done.", "What there is so far is below."
        state = there if measured else "Images and figures of each step will be here, side by side."
    else:
        lead = "Training did not finish, so there is no recommended step."
        state = "What was measured until then is below." if measured else "Nothing was measured until then."
    return f'<div class="empty"><p><b>{lead}</b></p><p>{state}</p></div>'


def suggested_step(record: RunRecord) -> int | None:
    """The step that the run suggests, once it does."""
    recommended = record.read_json(SUGGESTION)
    return recommended.get("step")


def sample_table(record: RunRecord, selected: tuple[int, int] | None) -> str:
    """Every step's samples side by side, a row for each prompt, the base model first; in a box that scrolls by itself.

    Args:
        selected: the step and the place of the prompt that are looked at closely.
    """
    steps = {step: samples(record, step) for step in sampled_steps(record)}
    if not steps:
        return ""
    suggested, prompts = suggested_step(record), max(steps.values(), key=len)
    heads = "".join(f'<th scope="col">{_step_head(step, suggested)}</th>' for step in steps)
    rows = "".join(_sample_row(index, prompt.prompt, steps, selected) for index, prompt in enumerate(prompts))
    table = f'<table class="samples"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>'
    photos = "".join(_image(each, "one of your photos") for each in subject(record))
    if photos:
        photos = f'<h4>Your photos, as the model sees them</h4><div class="scroll strip">{photos}</div>'
    return f'<h3>Every step side by side</h3>{photos}<div class="scroll">{table}</div>'


def _step_head(step: int, suggested: int | None) -> str:
    name = f"step {step}" if step else "before training"
    return f'{name}<br><span class="chip good">recommended</span>' if step == suggested else name


def _sample_row(prompt_index: int, prompt: str, steps: Mapping[int, Sequence[Sample]], selected: tuple[int, int] | None) -> str:
    cells = []
    for step, images in steps.items():
        if prompt_index >= len(images):
            cells.append("<td></td>")
            continue
        css = ' class="shown"' if (step, prompt_index) == selected else ""
        label = html.escape(f"compare: {prompt}, {f'step {step}' if step else 'before training'}")
        button = f'<button type="button" data-step="{step}" data-place="{prompt_index}" aria-label="{label}"{css}>'
        cells.append(f"<td>{button}{_image(images[prompt_index], '')}</button></td>")
    words = f'<tr><th colspan="{len(steps)}" scope="rowgroup"><span>{html.escape(prompt)}</span></th></tr>'
    return f"{words}<tr>{''.join(cells)}</tr>"


def _image(sample: Sample, words: str) -> str:
    return f'<img class="{sample.css}" src="{address(thumbnail(sample.path))}" alt="{html.escape(words)}">'


def curves(record: RunRecord) -> str:
    """The held-out loss and the three scores by step, each with a sentence on how to read it."""
    points, scores = heldout_curve(record), sample_scores(record)
    steps = [0, *(point.step for point in points), *scores, int(record.status().get("total") or 0)]
    across, suggested = (0.0, float(max(steps))), suggested_step(record)
    mark = None if suggested is None else (float(suggested), f"recommended: step {suggested}")
    plots = [_loss_curve(points, across, mark) if points else f'<p class="quiet">{NO_LOSS}</p>' if scores else ""]
    if scores:
        plotted = _score_curves(sorted(scores.items()), across)
        plots += [_explained(plot(title, series, across, mark, "half"), explanation) for title, series, explanation in plotted]
    return f'<div class="judged">{"".join(plots)}</div>' if any(plots) else ""


def _score_curves(by_step: Sequence[tuple[int, StepScores]], across: tuple[float, float]) -> list[tuple[str, list[Series], str]]:
    """Each drawing of scores: its title, its curves, and how to read it."""
    limit, judged = by_step[-1][1].nearest_limit, {name: _column(by_step, name) for name in vars(by_step[0][1])}
    similarities, followed = (
        Series("mean of the samples", judged[name], "marks", c) for name, c in (("subject", 1), ("prompt", 4))
    )
    copying = [
        Series("most alike photo", judged["nearest"], "marks", 2),
        Series(f"its limit {limit:.2f}", [(x, limit) for x in across], "limit", 2),
        Series("most alike outline", judged["copy"], "marks", 3),
        Series(f"its limit {COPY_THRESHOLD:.2f}", [(x, COPY_THRESHOLD) for x in across], "limit", 3),
    ]
    return [
        ("Image similarity", [similarities], READ_SUBJECT),
        ("Prompt similarity", [followed], READ_PROMPT),
        ("Memorisation", copying, READ_COPY),
    ]


def _loss_curve(points: Sequence[Point], across: tuple[float, float], mark: tuple[float, str] | None) -> str:
    heldout = Series("photo held out", [(point.step, point.heldout) for point in points], "marks", 2)
    seen = Series("photos it learns from", [(point.step, point.seen) for point in points if point.seen is not None], "marks", 3)
    return _explained(plot("Loss by step (lower is better)", [heldout, seen], across, mark, "half"), READ_LOSS)


def _column(scores: Sequence[tuple[int, StepScores]], name: str) -> list[tuple[float, float]]:
    return [(float(step), getattr(each, name)) for step, each in scores]


def _explained(figure: str, explanation: str) -> str:
    return f'<div>{figure}<p class="quiet">{explanation}</p></div>'


def figures(record: RunRecord) -> str:
    """All that was measured: a row for each step, a column for each of LOSSES and SCORES of which there is a figure."""
    points, scores = {point.step: point for point in heldout_curve(record)}, sample_scores(record)
    steps, suggested = sorted({*points, *scores}), suggested_step(record)
    if not steps:
        return ""
    columns = {head: _cells(points, steps, name, 4) for name, head in LOSSES.items()}
    columns |= {head: _cells(scores, steps, name, 3) for name, head in SCORES.items()}
    columns = {head: cells for head, cells in columns.items() if any(cells)}
    head = "".join(f'<th scope="col">{each}</th>' for each in ("step", *columns))
    rows = (
        f'<tr><th scope="row">{_step_head(step, suggested)}</th>{"".join(f"<td>{each}</td>" for each in cells)}</tr>'
        for step, *cells in zip(steps, *columns.values(), strict=True)
    )
    return (
        f'<div class="scroll"><table class="figures"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _cells(by_step: Mapping[int, object], steps: Sequence[int], name: str, digits: int) -> list[str]:
    values = [getattr(by_step.get(step), name, None) for step in steps]
    return ["" if value is None else f"{value:.{digits}f}" for value in values]


def certificate(record: RunRecord) -> str:
    """What the check of the saved files found, in a sentence or two."""
    record_fields: dict[str, Any] = record.read_json(CERTIFICATE)
    if not record_fields:
        return '<p class="quiet">The saved files have not been checked against another program.</p>'
    if not record_fields["passed"]:
        problems = html.escape("; ".join(record_fields["problems"]))
        return f'<p class="warning">The exported files differ from the trained adapter: {problems}.</p>'
    largest = max(record_fields["largest_difference"].values(), default=0.0)
    converted = (
        f" It read the {html.escape(' and '.join(record_fields['converted']))} file in its own form."
        if record_fields.get("converted")
        else ""
    )
    return (
        '<p><span class="chip good">certified</span> A plain diffusers program without this app drew the same images from the '
        f"saved files: at most {largest:.2g} of 255 shades apart, where the adapter changes up to {record_fields['effect']:.0f}."
        f"{converted}</p>"
    )


def card(record: RunRecord) -> str:
    """The model card as Markdown, without its header for the hub and its image; empty before it is written."""
    path = record.path / "README.md"
    if not path.is_file():
        return ""
    _, _, body = path.read_text(encoding="utf-8").removeprefix("---").partition("\n---\n")
    return "\n".join(line for line in body.splitlines() if not line.startswith("!["))
