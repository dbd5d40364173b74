"""Line plots by gr.LinePlot: series to a data frame, an update that is sent only when it changed, and a table of the values.

A change of the data alone redraws the lines; a change of the series or of the x axis builds the plot again. So the limits of the
y axis are left to the plot, and a series keeps its name while it grows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import gradio as gr
import pandas as pd
from markupsafe import Markup

from webui.context import LazyUpdate
from webui.render import render

Point = tuple[float, float]
# More points than a screen resolves, and rows of a table that a person would listen to.
MOST_POINTS, MOST_ROWS = 240, 12
X, Y, SERIES = "step", "value", "series"
# Colours with a contrast of at least 3 to 1 on the light and on the dark background.
COLOURS = ("#0d9488", "#ea580c", "#7c7ff2", "#c026d3")
PALE, LIMIT, MARKED = "#94a3b880", "#dc2626", "#64748b"


@dataclass(frozen=True)
class Plot:
    """The content of one plot.

    Args:
        title: of its table of values.
        series: points (x, y), by x, by the name of the series in the legend. A line has at least two points.
        x_range: of the x axis.
        colours: of the series that do not take the next of `COLOURS`.
        marked: an x with a vertical line, and the line's name; None for none.
    """

    title: str
    series: Mapping[str, Sequence[Point]]
    x_range: Point
    colours: Mapping[str, str] | None = None
    marked: tuple[float, str] | None = None

    @property
    def lines(self) -> dict[str, list[Point]]:
        """The points of each line on the screen."""
        lines = {name: thinned(points, MOST_POINTS) for name, points in self.series.items() if len(points) > 1}
        if lines and self.marked is not None:
            values = [y for points in lines.values() for _, y in points]
            x, name = self.marked
            lines[name] = [(x, min(values)), (x, max(values))]
        return lines

    def update(self) -> LazyUpdate:
        """The update of a component made by `line_plot`, which is hidden while there is no line."""
        lines = self.lines
        if not lines:
            return LazyUpdate(None, lambda: gr.LinePlot(value=None, visible=False))
        rows = tuple((x, y, name) for name, points in lines.items() for x, y in points)
        return LazyUpdate((rows, self.x_range), lambda: self._component(rows))

    def _component(self, rows: Sequence[tuple[float, float, str]]) -> gr.LinePlot:
        given = dict(self.colours or {}) | ({} if self.marked is None else {self.marked[1]: MARKED})
        others = iter(COLOURS)
        colours = {name: given.get(name) or next(others) for name in self.lines}
        data = pd.DataFrame(rows, columns=[X, Y, SERIES])
        return gr.LinePlot(value=data, color_map=colours, x_lim=list(self.x_range), visible=True)


def line_plot(title: str, hint: str = "", y_title: str = " ", x_title: str = X, **named: object) -> gr.LinePlot:
    """A component for the updates of a `Plot`, hidden until the first.

    Args:
        hint: a sentence below the plot that says how to read it.
        named: further arguments of gr.LinePlot.
    """
    return gr.LinePlot(
        x=X, y=Y, color=SERIES, title=title, caption=hint or None, x_title=x_title, y_title=y_title, color_title=" ",
        height=240, visible=False, buttons=["fullscreen", "export"], elem_classes="plot", **named,
    )  # fmt: skip


def value_tables(plots: Sequence[Plot]) -> Markup:
    """The values of the plots as tables for screen readers, without those of many points."""
    tables = [(plot.title, _rows(plot)) for plot in plots]
    return render("value_tables.html", tables=[table for table in tables if table[1]], x=X)


def _rows(plot: Plot) -> list[tuple[str, str, str]]:
    pale = [name for name, colour in (plot.colours or {}).items() if colour == PALE]
    lines = {name: thinned(points, MOST_ROWS) for name, points in plot.series.items() if name not in pale}
    return [(name, f"{x:g}", number(y)) for name, points in lines.items() for x, y in points]


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
