"""Line plots by gr.LinePlot: data frames that are sent only when they changed, and tables of the values.

Gradio draws outdated data if series or axes of a plot change together with its data. So a component names its series and their
colours once, and only its data changes, which is also cheap: the browser moves the lines of the plot that it has. A row without a
value keeps an empty series in the legend and extends the x axis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import gradio as gr
import pandas as pd
from markupsafe import Markup

from webui.render import LazyUpdate, parts

Point = tuple[float, float]
# Every point is an element of the page, which costs processor time; and rows of a table that a person would listen to.
MOST_POINTS, MOST_ROWS = 120, 12
X, Y, SERIES = "step", "value", "series"
# Colours with a contrast of at least 3 to 1 on the light and on the dark background.
COLOURS = ("#0d9488", "#ea580c", "#7c7ff2", "#c026d3")
PALE, LIMIT, MARKED = "#94a3b880", "#dc2626", "#64748b"


def line_plot(
    title: str, series: Sequence[str], hint: str = "", colours: Mapping[str, str] | None = None, **named: object
) -> gr.LinePlot:
    """A component for the updates of a `Plot`, hidden until the first.

    Args:
        series: the names of all series.
        hint: a sentence below the plot that says how to read it.
        colours: of the series that do not take the next of `COLOURS`.
        named: further arguments of gr.LinePlot.
    """
    others = iter(COLOURS)
    return gr.LinePlot(
        x=X, y=Y, color=SERIES, color_map={name: (colours or {}).get(name) or next(others) for name in series}, title=title,
        caption=hint or None, x_title=named.pop("x_title", X), y_title=" ", color_title=" ", height=240, visible=False,
        buttons=["fullscreen", "export"], elem_classes="plot", **named,
    )  # fmt: skip


@dataclass(frozen=True)
class Plot:
    """The data of one plot.

    Args:
        title: of its table of values.
        series: points (x, y), by x, by the names of the component's series, empty ones included. A line has two points or more.
        x_range: of the x axis.
        marked: the series of a vertical line and its x, None without such a line at present.
    """

    title: str
    series: Mapping[str, Sequence[Point]]
    x_range: Point
    marked: tuple[str, float | None] | None = None

    @property
    def lines(self) -> dict[str, list[Point]]:
        """The points of each line on the screen; without any line, it is empty."""
        lines = {name: thinned(points, MOST_POINTS) if len(points) > 1 else [] for name, points in self.series.items()}
        values = [y for points in lines.values() for _, y in points]
        if values and self.marked is not None:
            name, x = self.marked
            lines[name] = [] if x is None else [(x, min(values)), (x, max(values))]
        return lines if values else {}

    def update(self) -> LazyUpdate:
        """The update of the component, which is hidden while there is no line."""
        rows = tuple((x, y, name) for name, points in self.lines.items() for x, y in [*points, *self._ends(points)])
        if not rows:
            return LazyUpdate(None, lambda: gr.LinePlot(value=None, visible=False))
        return LazyUpdate(rows, lambda: gr.LinePlot(value=pd.DataFrame(rows, columns=[X, Y, SERIES]), visible=True))

    def _ends(self, points: Sequence[Point]) -> list[tuple[float, None]]:
        """The ends of the x axis beyond the points; within them, a row without a value would interrupt the line."""
        return [(x, None) for x in self.x_range if not points or not points[0][0] <= x <= points[-1][0]]


def value_tables(plots: Sequence[Plot]) -> Markup:
    """Some values of each series as tables for screen readers."""
    tables = []
    for plot in plots:
        lines = {name: thinned(points, MOST_ROWS) for name, points in plot.series.items()}
        tables.append((plot.title, [(name, f"{x:g}", number(y)) for name, points in lines.items() for x, y in points]))
    return Markup("").join(parts.value_table(title, X, rows) for title, rows in tables if rows)


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """At most about `most` of the points, evenly spaced, including the last."""
    stride = math.ceil(len(points) / most)
    return [point for index, point in enumerate(points) if (len(points) - 1 - index) % stride == 0]


def running_mean(points: Sequence[Point], over: int) -> list[Point]:
    """The mean of each point's y and the `over` - 1 before it."""
    total, means = 0.0, []
    for index, (x, y) in enumerate(points):
        total += y - (points[index - over][1] if index >= over else 0.0)
        means.append((x, total / min(index + 1, over)))
    return means


def number(value: float) -> str:
    """A value of a plot as text."""
    return f"{value:.4g}" if value == 0 or 1e-4 <= abs(value) < 1e5 else f"{value:.1e}".replace("e-0", "e-")
