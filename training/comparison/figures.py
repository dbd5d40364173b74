"""The figures of an arena: quality against parameters with the Pareto front, and accuracy by shots."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, SymmetricalLogLocator

from pipelines.run_options import Task
from training.runs.arena_files import ArenaReport
from training.runs.arena_results import (
    MEASURES,
    PRIMARY,
    all_shots,
    front_of,
    largest_shots,
    measure_named,
    points_of,
    quality_by_shots,
)
from training.runs.naming import variant_title

SIZE, DPI = (8.0, 5.0), 120
# Of an entry of the legend, in inches.
ENTRY_HEIGHT = 0.17
# Trained parameters from which the axis is logarithmic: some methods have none.
SMALLEST_DECADE = 100
FRONT_COLOUR, OTHER_COLOUR = "#c2410c", "#64748b"


def write_figures(report: ArenaReport, folder: Path) -> dict[Task, list[str]]:
    """Write the figures of each task with results into `folder`; returns their names."""
    names: dict[Task, list[str]] = {}
    for task in MEASURES:
        shots = largest_shots(report.summaries, task)
        figures = {f"parameters-{task}.png": quality_by_parameters(report, task, shots)}
        if task == "few-shot":
            figures["shots.png"] = accuracy_by_shots(report, task)
        names[task] = []
        for name, figure in figures.items():
            if figure is not None:
                figure.savefig(folder / name, dpi=DPI)
                names[task].append(name)
    return names


def quality_by_parameters(report: ArenaReport, task: Task, shots: int | None) -> Figure | None:
    """The primary measure of each variant against its trained parameters; None without two variants.

    Points are numbered from the best one on, as in the legend: names beside many points would cover each other.
    """
    points = points_of(report, task, shots)
    if len(points) < 2:
        return None
    front, measure = front_of(report, task, shots), measure_named(task, PRIMARY[task])
    figure = Figure((SIZE[0], max(SIZE[1], ENTRY_HEIGHT * (len(points) + 1))), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, parameters, quality, low, high) in enumerate(points, start=1):
        colour = FRONT_COLOUR if name in front else OTHER_COLOUR
        axes.errorbar(parameters, quality, [[quality - low], [high - quality]], fmt="none", color=colour, alpha=0.3)
        axes.plot(
            parameters, quality, marker=f"${number}$", linestyle="none", markersize=9, color=colour, label=variant_title(name)
        )
    key = "Line: the Pareto front. Bars: 95% intervals\nof the difference to the best method."
    figure.legend(loc="outside right upper", fontsize=7, title=key, title_fontsize=8)
    on_front = {name: (parameters, quality) for name, parameters, quality, *_ in points}
    axes.plot(*zip(*(on_front[name] for name in front), strict=True), color=FRONT_COLOUR, linewidth=1, alpha=0.5, zorder=0)
    axes.set_xscale("symlog", linthresh=SMALLEST_DECADE)
    axes.xaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=SMALLEST_DECADE, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if measure.better == "lower":
        axes.invert_yaxis()
    axes.set_xlabel("trained parameters")
    axes.set_ylabel(f"{measure.title}{f' at {shots} shots' if shots is not None else ''}")
    return figure


def accuracy_by_shots(report: ArenaReport, task: Task) -> Figure | None:
    """The primary measure of each variant by the number of shots; None for a single number."""
    shots = all_shots(report.summaries, task)
    if len(shots) < 2:
        return None
    figure = Figure(SIZE, layout="constrained")
    axes = figure.add_subplot()
    for variant, curve in quality_by_shots(report.summaries, task).items():
        numbers, intervals = zip(*curve, strict=True)
        values = [one.value for one in intervals]
        axes.plot(numbers, values, marker="o", markersize=3, label=variant_title(variant))
        axes.fill_between(numbers, [one.low for one in intervals], [one.high for one in intervals], alpha=0.12)
    axes.set_xscale("log", base=2)
    axes.set_xticks(shots, labels=list(map(str, shots)))
    axes.set_xlabel("training images per class")
    axes.set_ylabel(measure_named(task, PRIMARY[task]).title)
    axes.legend(fontsize=7, ncols=2)
    return figure
