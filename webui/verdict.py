"""The evaluation of a run as HTML: samples side by side, curves, scores, the recommended step, the certificate."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from pipelines.run_file import RunFile
from training.runs.record import RunRecord
from training.runs.run_files import COPY_THRESHOLD, Certificate, Point, StepScores, Suggestion
from training.subject.measured import Sample, heldout_curve, sample_scores, sampled_steps, samples, subject_images
from webui.curves import Series, plot
from webui.render import sample_image
from webui.runs import RunView

READ_LOSS = (
    "Validation loss is measured on a photo that is not trained on. If it rises while the training loss keeps falling, the model "
    "overfits: it memorises your photos."
)
READ_SUBJECT = (
    "Similarity of the samples to your photos. Higher is better. Once the curve is flat, longer training does not help."
)
READ_PROMPT = "Similarity of the samples to their prompts. Higher is better. It falls when the model overfits to the subject."
READ_COPY = (
    "Similarity of each sample to the closest single photo, by content and by outlines. Above the limit a sample is close to a "
    "copy of that photo."
)
LOSSES = {"heldout": "validation loss", "seen": "training loss"}
SCORES = {
    "subject": "image similarity (CLIP-I)",
    "prompt": "prompt similarity (CLIP-T)",
    "nearest": "closest photo",
    "copy": "closest outlines",
}
NO_LOSS = "No photo was held out, so there is no validation loss."


def suggestion(view: RunView) -> str:
    """The recommended step, the reasons and the warnings."""
    recommended = view.read_file(Suggestion)
    if recommended is None:
        return _error(view, Suggestion) or _not_yet(view)
    reason, figures = recommended.reasons[0], " ".join(recommended.reasons[1:])
    more = f"<details><summary>All measurements</summary><p>{html.escape(figures)}</p></details>" if figures else ""
    warnings = "".join(f'<p class="warning overfit">{html.escape(each)}</p>' for each in recommended.warnings)
    return (
        '<p class="phase"><span class="chip good">recommended</span> '
        f"<b>Step {recommended.step} of {recommended.last}</b></p>"
        f"<p>{html.escape(reason)}</p>{more}{warnings}"
    )


def _error(view: RunView, kind: type[RunFile]) -> str:
    """Why a file of the run cannot be read; empty if it can be read or is missing."""
    error = view.file_error(kind)
    return "" if error is None else _warning(error)


def _warning(error: str) -> str:
    return f'<p class="warning">{html.escape(error)}</p>'


def _not_yet(view: RunView) -> str:
    measured = bool(sampled_steps(view.record))
    if view.is_active:
        lead, results = "A step is recommended when training is done.", "The results so far are below."
        state = results if measured else "Images and scores of each step appear here, side by side."
    else:
        lead = "Training did not finish, so no step is recommended."
        state = "The results up to that point are below." if measured else "Nothing was measured before it ended."
    return f'<div class="empty"><p><b>{lead}</b></p><p>{state}</p></div>'


def suggested_step(record: RunRecord) -> int | None:
    """The recommended step; None before training is done."""
    recommended = RunView(record).read_file(Suggestion)
    return None if recommended is None else recommended.step


def sample_table(record: RunRecord, selected: tuple[int, int] | None) -> str:
    """A scrollable table of the samples: a column for each step, the base model first, and a row for each prompt.

    Args:
        selected: the step and the index of the prompt shown in the comparison.
    """
    steps = {step: samples(record, step) for step in sampled_steps(record)}
    if not steps:
        return ""
    suggested, prompts = suggested_step(record), max(steps.values(), key=len)
    heads = "".join(f'<th scope="col">{_step_head(step, suggested)}</th>' for step in steps)
    rows = "".join(_sample_row(index, prompt.prompt, steps, selected) for index, prompt in enumerate(prompts))
    table = f'<table class="samples"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>'
    photos = "".join(_image(each, "one of your photos") for each in subject_images(record))
    if photos:
        photos = f'<h4>Your photos as the model sees them</h4><div class="scroll strip">{photos}</div>'
    return f'<h3>Every step side by side</h3>{photos}<div class="scroll">{table}</div>'


def _step_head(step: int, suggested: int | None) -> str:
    name = f"step {step}" if step else "base model"
    return f'{name}<br><span class="chip good">recommended</span>' if step == suggested else name


def _sample_row(prompt_index: int, prompt: str, steps: Mapping[int, Sequence[Sample]], selected: tuple[int, int] | None) -> str:
    cells = []
    for step, images in steps.items():
        if prompt_index >= len(images):
            cells.append("<td></td>")
            continue
        css = ' class="shown"' if (step, prompt_index) == selected else ""
        label = html.escape(f"compare: {prompt}, {f'step {step}' if step else 'base model'}")
        button = f'<button type="button" data-step="{step}" data-place="{prompt_index}" aria-label="{label}"{css}>'
        cells.append(f"<td>{button}{_image(images[prompt_index], '')}</button></td>")
    words = f'<tr><th colspan="{len(steps)}" scope="rowgroup"><span>{html.escape(prompt)}</span></th></tr>'
    return f"{words}<tr>{''.join(cells)}</tr>"


def _image(sample: Sample, words: str) -> str:
    return sample_image(sample, words)


def curves(record: RunRecord) -> str:
    """Validation loss and scores by step, each with a sentence on how to read it."""
    view = RunView(record)
    if view.metrics_error is not None:
        return _warning(view.metrics_error)
    points, scores = heldout_curve(record), sample_scores(record)
    steps = [0, *(point.step for point in points), *scores, view.status.total or 0]
    across, suggested = (0.0, float(max(steps))), suggested_step(record)
    mark = None if suggested is None else (float(suggested), f"recommended: step {suggested}")
    plots = [_loss_curve(points, across, mark) if points else f'<p class="quiet">{NO_LOSS}</p>' if scores else ""]
    if scores:
        plotted = _score_curves(sorted(scores.items()), across)
        plots += [_explained(plot(title, series, across, mark, "half"), explanation) for title, series, explanation in plotted]
    return f'<div class="judged">{"".join(plots)}</div>' if any(plots) else ""


def _score_curves(by_step: Sequence[tuple[int, StepScores]], across: tuple[float, float]) -> list[tuple[str, list[Series], str]]:
    """Each plot of scores: its title, its series, and how to read it."""
    limit, columns = by_step[-1][1].nearest_limit, {name: _column(by_step, name) for name in vars(by_step[0][1])}
    image_similarity, prompt_similarity = (
        Series("mean of the samples", columns[name], "marks", c) for name, c in (("subject", 1), ("prompt", 4))
    )
    copying = [
        Series("closest photo", columns["nearest"], "marks", 2),
        Series(f"limit {limit:.2f}", [(x, limit) for x in across], "limit", 2),
        Series("closest outlines", columns["copy"], "marks", 3),
        Series(f"limit {COPY_THRESHOLD:.2f}", [(x, COPY_THRESHOLD) for x in across], "limit", 3),
    ]
    return [
        ("Image similarity (CLIP-I)", [image_similarity], READ_SUBJECT),
        ("Prompt similarity (CLIP-T)", [prompt_similarity], READ_PROMPT),
        ("Memorisation", copying, READ_COPY),
    ]


def _loss_curve(points: Sequence[Point], across: tuple[float, float], mark: tuple[float, str] | None) -> str:
    heldout = Series("validation loss", [(point.step, point.heldout) for point in points], "marks", 2)
    seen = Series("training loss", [(point.step, point.seen) for point in points if point.seen is not None], "marks", 3)
    return _explained(plot("Validation and training loss (lower is better)", [heldout, seen], across, mark, "half"), READ_LOSS)


def _column(scores: Sequence[tuple[int, StepScores]], name: str) -> list[tuple[float, float]]:
    return [(float(step), getattr(each, name)) for step, each in scores]


def _explained(figure: str, explanation: str) -> str:
    return f'<div>{figure}<p class="quiet">{explanation}</p></div>'


def figures(record: RunRecord) -> str:
    """All measurements: a row for each step, a column for each of LOSSES and SCORES with a value."""
    if RunView(record).metrics_error is not None:
        return ""
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
    """The result of the check of the exported files, in a sentence or two."""
    view = RunView(record)
    result = view.read_file(Certificate)
    if error := _error(view, Certificate):
        return error
    if result is None:
        return '<p class="quiet">The exported files have not been checked with plain diffusers.</p>'
    if not result.passed:
        problems = html.escape("; ".join(result.problems))
        return f'<p class="warning">The exported files differ from the trained adapter: {problems}.</p>'
    if not result.exact:
        return (
            '<p><span class="chip good">loads</span> Plain diffusers loads the exported files, which approximate the adapter: '
            f"their images differ by {max(result.mean_difference.values()):.2g} of 255 on average; the adapter's mean effect is "
            f"{result.mean_effect:.2g}.</p>"
        )
    largest = max(result.largest_difference.values(), default=0.0)
    converted = f" The {html.escape(' and '.join(result.converted))} file was converted for this." if result.converted else ""
    return (
        '<p><span class="chip good">certified</span> Plain diffusers generates the same images from the exported files. '
        f"The largest pixel difference is {largest:.2g} of 255; the adapter's effect is up to {result.effect:.0f}."
        f"{converted}</p>"
    )


def card(record: RunRecord) -> str:
    """The model card as Markdown without its YAML header and image; empty before it is written."""
    path = record.path / "README.md"
    if not path.is_file():
        return ""
    _, _, body = path.read_text(encoding="utf-8").removeprefix("---").partition("\n---\n")
    return "\n".join(line for line in body.splitlines() if not line.startswith("!["))
