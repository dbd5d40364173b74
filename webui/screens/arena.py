"""The screen Arena: adapter methods compared on the user's data: start an arena, follow it, and read what it has shown."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from pipelines.errors import InputError
from pipelines.run_options import Task
from training.options.arena import DEFAULT_STEPS, ArenaDataOptions
from training.runs import arena_results, naming
from training.runs.arena_files import BLIND, KEY, MARKDOWN, OBSERVATIONS, RATINGS, ArenaReport
from training.runs.arena_results import (
    MEASURES,
    PRIMARY,
    Measure,
    all_shots,
    front_of,
    largest_shots,
    measure_named,
    points_of,
    quality_by_shots,
    ranked,
)
from training.runs.snapshot import revision
from webui import launching
from webui.arenas import DEFAULT_METHODS, METHOD_CHOICES, ArenaPlan, known_words, photo_titles, running
from webui.context import QUIET, AppContext
from webui.draft import EXAMPLE, SAMPLE_CLASS, Draft
from webui.labelled_datasets import titles
from webui.render import LazyUpdate, component, in_cache, lazy_text, macros, parts, text, thumbnail, updates
from webui.runs import RunView, views

INTRO = """Which adapter method is best for your images? An arena trains several with the same budget, chooses a learning rate for
each on validation data, and compares them on images that were not trained on, with intervals and paired tests."""
DOWNLOADS = {
    "markdown": ("Report (Markdown)", MARKDOWN),
    "csv": ("All values (CSV)", OBSERVATIONS),
    "json": ("All results (JSON)", ArenaReport.NAME),
    "ratings": ("Table for your ratings (CSV)", f"{BLIND}/{RATINGS}"),
}
SHEET_SIDE, MOST_TICKS = 1600, 5
arena_html = macros("arena.html", results=arena_results, naming=naming, running=running)


@dataclass(frozen=True)
class Chart:
    """Methods in an area, at positions in percent.

    Args:
        x_ticks, y_ticks: texts and positions.
        lines: CSS classes and points.
        marks: CSS class, x and y by method.
    """

    title: str
    hint: str
    x_title: str
    x_ticks: Sequence[tuple[str, float]]
    y_ticks: Sequence[tuple[str, float]]
    lines: Sequence[tuple[str, Sequence[tuple[float, float]]]]
    marks: Mapping[str, tuple[str, float, float]]


def scale(values: Sequence[float], transform: Callable[[float], float] = float) -> Callable[[float], float]:
    """Maps the range of `values` to 5 to 95 percent, after a `transform` that rises."""
    low, high = transform(min(values)), transform(max(values))
    return lambda value: round(5 + 90 * (transform(value) - low) / ((high - low) or 1.0), 2)


def quality_axis(measure: Measure, values: Sequence[float]) -> tuple[Callable[[float], float], list[tuple[str, float]]]:
    """The position of a value in percent, with better ones further up, and the ticks."""
    position = scale(values)
    y = (lambda value: 100 - position(value)) if measure.better == "lower" else position
    return y, [(measure.text(value), y(value)) for value in round_ticks(min(values), max(values))]


def round_ticks(low: float, high: float) -> list[float]:
    """At most `MOST_TICKS` + 1 round numbers from `low` to `high`."""
    magnitude = 10.0 ** math.floor(math.log10((high - low) or 1.0))
    step = next(one * magnitude for one in (0.2, 0.5, 1, 2) if (high - low) <= MOST_TICKS * one * magnitude)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def count_ticks(low: float, high: float) -> list[int]:
    """Some of 0 and the powers of ten from `low` to `high`, and three times these in a narrow range."""
    digits = (1,) if high >= 1000 * max(low, 100) else (1, 3)
    counts = [0, *(digit * 10**power for power in range(3, 12) for digit in digits)]
    return [count for count in counts if low <= count <= high]


def by_parameters(report: ArenaReport, task: Task, shots: int | None) -> Chart:
    """The primary measure of each method against its trained parameters, with the Pareto front."""
    measure, points = measure_named(task, PRIMARY[task]), points_of(report, task, shots)
    front, counts = front_of(report, task, shots), [count for _, count, *_ in points]
    y, y_ticks = quality_axis(measure, [value for *_, low, high in points for value in (low, high)])
    x = scale(counts, lambda count: math.log10(1 + count / 100))
    at = {name: (x(count), y(quality)) for name, count, quality, *_ in points}
    intervals = [("interval", [(x(count), y(low)), (x(count), y(high))]) for _, count, _, low, high in points]
    return Chart(
        title=f"{measure.title} against parameters",
        hint="Further up is better. The line is the Pareto front; bars are 95% intervals of the difference to the best.",
        x_title="Trained parameters",
        x_ticks=[(f"{count:,}", x(count)) for count in count_ticks(min(counts), max(counts))],
        y_ticks=y_ticks,
        lines=[*intervals, ("front", [at[name] for name in front])],
        marks={name: ("front" if name in front else "", *point) for name, point in at.items()},
    )


def by_shots(report: ArenaReport, task: Task, shots: Sequence[int]) -> Chart:
    """The primary measure of each method by the number of training images per class."""
    measure, values = measure_named(task, PRIMARY[task]), quality_by_shots(report.summaries, task)
    y, y_ticks = quality_axis(measure, [one.value for curve in values.values() for _, one in curve])
    x = scale(shots, math.log2)
    lines = [
        (f"rank-{rank}", [(x(count), y(one.value)) for count, one in curve]) for rank, curve in enumerate(values.values(), 1)
    ]
    # Spread over the shots, so that they do not hide each other.
    marks = [(css, *points[-1 - index % len(points)]) for index, (css, points) in enumerate(lines)]
    return Chart(
        title=f"{measure.title} by shots",
        hint="Further up is better.",
        x_title="Training images per class",
        x_ticks=[(str(count), x(count)) for count in shots],
        y_ticks=y_ticks,
        lines=lines,
        marks=dict(zip(values, marks, strict=True)),
    )


def charts(report: ArenaReport) -> dict[Task, list[Chart]]:
    """The charts of each task with results."""
    by_task: dict[Task, list[Chart]] = {}
    for task in MEASURES:
        shots, last = all_shots(report.summaries, task), largest_shots(report.summaries, task)
        if ranked(report.summaries, task, last, PRIMARY[task]):
            several = len(points_of(report, task, last)) > 1
            by_task[task] = [by_parameters(report, task, last)] if several else []
            by_task[task] += [by_shots(report, task, shots)] if len(shots) > 1 else []
    return by_task


def build(context: AppContext) -> None:
    """Put the screen into the open tab."""
    _Arena(context)


class _Arena:
    """The components of the screen and the handlers of their events."""

    def __init__(self, context: AppContext) -> None:
        self.context, self.settings, self.seen = context, context.settings, gr.State({})
        gr.HTML(parts.note(INTRO))
        self.components: dict[str, Any] = {}
        self._lay_out_form()
        self._lay_out_result()
        self._wire()

    def _lay_out_result(self) -> None:
        add, hidden = self.components, {"visible": False}
        add["chosen"] = gr.Dropdown(label="Arena", elem_id="arena-chosen", interactive=True, **hidden)
        add["state"] = gr.HTML(elem_id="arena-state")
        with gr.Row(elem_classes="buttons"):
            for name, variant in (("stop", "stop"), ("resume", "primary")):
                label = name.capitalize()
                add[name] = gr.Button(label, variant=variant, elem_id=f"arena-{name}", scale=0, min_width=140, **hidden)
        add["report"] = gr.HTML(elem_id="arena-report", elem_classes="arena", **hidden)
        with gr.Accordion("Judge the images without knowing the methods", open=False, **hidden) as add["blind"]:
            gr.HTML(parts.note("Each row has the images of one method, in an order of its own for each sheet."))
            add["sheet"] = gr.Dropdown(label="Sheet", elem_id="arena-sheet", interactive=True)
            self.image = gr.HTML(elem_id="arena-image", elem_classes="arena")
            self.reveal = gr.Button("Show which method each row is", elem_id="arena-reveal", scale=0, min_width=260)
        with gr.Row(elem_classes="buttons"):
            for name, (label, _) in DOWNLOADS.items():
                add[name] = gr.DownloadButton(label, elem_id=f"arena-{name}", size="sm", min_width=180, **hidden)

    def _lay_out_form(self) -> None:
        with gr.Accordion("Start an arena", elem_id="arena-form") as self.components["form"]:
            several = {"multiselect": True, "interactive": True}
            with gr.Row():
                subjects = {"label": "Subjects", "info": "Photos that you added under Photos.", **several}
                photos = gr.Dropdown([EXAMPLE], value=[EXAMPLE], **subjects)
                words = gr.Textbox(SAMPLE_CLASS, label="Class words", info="What each subject is, in order: dog, coffee mug.")
            classes = gr.Dropdown([], label="Labelled datasets", info="Those of Classify.", **several)
            methods = gr.Dropdown(METHOD_CHOICES, value=DEFAULT_METHODS, label="Methods", elem_id="arena-methods", **several)
            with gr.Row():
                unit = gr.Radio(["steps", "seconds"], value="steps", label="Budget of each training", min_width=160)
                budget = gr.Number(DEFAULT_STEPS, label="Steps or seconds", minimum=1, maximum=1e6, min_width=120)
                seeds = gr.Number(5, label="Seeds", precision=0, minimum=1, maximum=50, min_width=120)
                numbers = list(ArenaDataOptions.__dataclass_fields__["shots"].default_factory())
                shots = gr.CheckboxGroup(numbers, value=numbers, label="Shots of labelled datasets", min_width=240)
            self.plan = gr.HTML(elem_id="arena-plan")
            self.start = gr.Button("Start", variant="primary", elem_id="arena-start")
        self.components |= {"photos": photos, "classes": classes}
        self.words, self.fields = words, [photos, words, classes, methods, unit, budget, seeds, shots]

    def _wire(self) -> None:
        context, components, arena = self.context, self.components, self.context.arena
        given, outputs = [arena, context.draft, self.seen], [*components.values(), self.seen, arena]
        refreshing = {"fn": self.refresh, "inputs": given, "outputs": outputs, **QUIET}
        context.refreshes["arena"].click(trigger_mode="always_last", **refreshing)
        described = {"fn": self.describe, "inputs": set(self.fields), "outputs": self.plan, **QUIET}
        context.opened["arena"].select(**described)
        components["chosen"].input(self.choose, components["chosen"], context.outputs, **QUIET)
        clicks = [components["stop"].click, components["resume"].click]
        gr.on(clicks, self.act, arena, context.outputs, api_visibility="private").then(**refreshing)
        components["photos"].input(self.name_subjects, [components["photos"], context.draft], self.words, **QUIET)
        gr.on([each.change for each in self.fields], trigger_mode="always_last", **described)
        begun = [components["form"], *context.outputs]
        self.start.click(self.begin, set(self.fields), begun, concurrency_limit=1, api_visibility="private")
        components["sheet"].change(self.show_sheet, components["sheet"], self.image, **QUIET)
        self.reveal.click(self.show_key, components["sheet"], self.image, **QUIET)

    def refresh(self, run_id: str | None, stored: object, seen: dict[str, Hashable], request: gr.Request) -> dict[Any, Any]:
        """What has changed on the screen."""
        workspace, draft = self.settings.workspace(request), Draft.from_browser(stored)
        arenas = [view for view in views(workspace) if view.task == "arena"]
        view = next((each for each in arenas if each.id == run_id), next(iter(arenas), None))
        offered = {"photos": photo_titles(workspace, draft), "classes": titles(workspace)}
        now = contents(view, arenas) | {name: _choices(by_id) for name, by_id in offered.items()}
        return updates(now, seen, self.components, self.seen) | {self.context.arena: None if view is None else view.id}

    def choose(self, run_id: str, request: gr.Request) -> list[Any]:
        """Select an arena."""
        return self.context.show(self.settings.workspace(request), run_id)

    def act(self, event: gr.EventData, run_id: str | None, request: gr.Request) -> list[Any]:
        """Stop the arena, or go on with it."""
        workspace = self.settings.workspace(request)
        (launching.stop if event.target.elem_id == "arena-stop" else launching.resume)(workspace, run_id)
        return self.context.show(workspace, run_id)

    def name_subjects(self, photos: list[str], stored: object) -> str:
        """The class words of the chosen photos, as far as they are known."""
        return known_words(photos, Draft.from_browser(stored))

    def describe(self, given: dict[Any, Any], request: gr.Request) -> str:
        """What Start would do, or why it cannot."""
        try:
            return parts.note(self._planned(given, request).describe())
        except InputError as error:
            return parts.note(str(error))

    def begin(self, given: dict[Any, Any], request: gr.Request) -> list[Any]:
        """Start an arena."""
        plan = self._planned(given, request)
        return [gr.Accordion(open=False), *self.context.show(plan.workspace, plan.start())]

    def _planned(self, given: dict[Any, Any], request: gr.Request) -> ArenaPlan:
        photos, words, classes, methods, unit, budget, seeds, shots = (given[each] for each in self.fields)
        workspace = self.settings.workspace(request)
        return ArenaPlan(workspace, photos or [], words, classes or [], methods, unit, budget or 0, seeds or 0, shots)

    def show_sheet(self, sheet: str | None, request: gr.Request) -> str:
        """The images of a sheet."""
        return self._sheet(sheet, request, reveals=False)

    def show_key(self, sheet: str | None, request: gr.Request) -> str:
        """The images of a sheet, and which method each row is."""
        return self._sheet(sheet, request, reveals=True)

    def _sheet(self, sheet: str | None, request: gr.Request, reveals: bool) -> str:
        run_id, _, name = (sheet or "").partition("/")
        folder = self.settings.workspace(request).run(run_id).path
        key = blind_key(folder)
        if name not in key:
            raise InputError("This sheet no longer exists. Reload the page.")
        return arena_html.sheet(thumbnail(folder / BLIND / f"{name}.png", SHEET_SIDE), name, key[name] if reveals else {})


def contents(view: RunView | None, arenas: Sequence[RunView]) -> dict[str, LazyUpdate]:
    """The current content of the screen, but the form's, by the names of its components."""
    actions = () if view is None else view.actions
    now = {
        "chosen": _choices({each.id: each.label for each in arenas}, view and view.id),
        "state": text(arena_html.state(view)),
        **{name: component(gr.Button, name in actions) for name in ("stop", "resume")},
        "form": LazyUpdate(bool(arenas), lambda: gr.Accordion(open=not arenas)),
    }
    if view is not None:
        return now | _results(view)
    hidden = {name: component(gr.DownloadButton, False) for name in DOWNLOADS}
    return now | hidden | {"report": text(""), "blind": component(gr.Accordion, False), "sheet": _choices({})}


def _results(view: RunView) -> dict[str, LazyUpdate]:
    """The report, the sheets and the files of an arena, as far as there are some."""
    folder, error = view.record.path, view.file_error(ArenaReport)
    sheets = {f"{view.id}/{name}": name for name in blind_key(folder)}

    def made() -> str:
        report = view.read_file(ArenaReport)
        return "" if report is None else arena_html.report(report, charts(report))

    return {
        "report": text(parts.warning(error)) if error else lazy_text((view.id, revision(folder / ArenaReport.NAME)), made),
        "blind": component(gr.Accordion, bool(sheets)),
        "sheet": _choices(sheets, next(iter(sheets), None)),
        **{name: _download(folder / file) for name, (_, file) in DOWNLOADS.items()},
    }


def blind_key(arena: Path) -> dict[str, dict[str, str]]:
    """The method of each row by its letter, for each sheet; empty without sheets."""
    path = arena / BLIND / KEY
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _choices(titles: Mapping[str, str], value: str | None = None) -> LazyUpdate:
    """The update of a dropdown whose values have `titles`; `value` is selected, unless it is None."""
    choices = [(title, each) for each, title in titles.items()]
    selected = {} if value is None else {"value": value, "visible": True}
    return LazyUpdate((*choices, value), lambda: gr.Dropdown(choices, **selected))


def _download(path: Path) -> LazyUpdate:
    changed = revision(path)
    if changed is None:
        return component(gr.DownloadButton, False)
    return LazyUpdate((path, changed), lambda: gr.DownloadButton(value=in_cache(path), visible=True))
