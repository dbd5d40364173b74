"""Line plots as SVG in HTML: a few kilobytes, sharp at every width, with a table of the values for screen readers.

The SVG is stretched to the available width; strokes are not, and labels are HTML text around it.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Point = tuple[float, float]
WIDTH, HEIGHT = 1000, 400
# More points than a screen resolves.
MOST_POINTS, ROWS = 240, 12
EDGE = 0.012
# Of a cloud's points, 1 / FAR_OUT may lie above the y axis's range, and as many below.
FAR_OUT = 50
STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Series:
    """One series of a plot.

    Args:
        name: its label in the legend.
        points: (x, y), by x.
        kind: pale dots, a line, a line with dots, or a dashed line.
        colour: the number of the colour in the style sheet, 1 to 4.
    """

    name: str
    points: Sequence[Point]
    kind: Literal["cloud", "line", "marks", "limit"] = "line"
    colour: int = 1


def plot(
    title: str, series: Sequence[Series], x_range: tuple[float, float], marked: tuple[float, str] | None = None, css: str = ""
) -> str:
    """The plot as HTML: axes, SVG, legend, and a table for screen readers.

    Args:
        title: the title of the plot.
        x_range: the range of the x axis in training steps.
        marked: an x to mark, and its label.
        css: CSS classes of the figure.
    """
    visible = [each for each in series if each.points]
    if not visible:
        return ""
    low, high = _range([y for each in visible for y in _bounds(each)])
    across, up = _ticks(*x_range, integers=True), _ticks(low, high)
    low, high = min(low, up[0]), max(high, up[-1])
    wide = max(x_range[1] - x_range[0], 1.0)
    # Slightly wider, so that dots at the ends are not cut.
    frame = _Frame(x_range[0] - EDGE * wide, x_range[0] + (1 + EDGE) * wide, low, high)
    paths = "".join(_path_of(each, frame) for each in visible)
    lines, left, below = _axes(frame, across, up)
    legend = "".join(f'<li class="c{each.colour} {each.kind}">{html.escape(each.name)}</li>' for each in visible)
    mark, note = "", ""
    if marked is not None:
        mark = f'<path class="marked" d="M{frame.x(marked[0]):.0f} 0V{HEIGHT}"/>'
        legend += f'<li class="marked">{html.escape(marked[1])}</li>'
        note = f" {html.escape(marked[1])}."
    name = html.escape(title)
    return (
        f'<figure class="curve {css}"><figcaption>{name}</figcaption><ul class="legend">{legend}</ul>'
        f'<div class="left" aria-hidden="true">{left}</div>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" aria-label="{name}.{note}">'
        f"<title>{name}</title>{lines}{mark}{paths}</svg>"
        f'<div class="below" aria-hidden="true">{below}</div>{_table(name, visible)}</figure>'
    )


def _axes(frame: _Frame, across: Sequence[float], up: Sequence[float]) -> tuple[str, str, str]:
    """The grid lines, and the labels on the left and below."""
    lines = "".join(f'<path class="grid" d="M0 {frame.y(y):.0f}H{WIDTH}"/>' for y in up)
    left = "".join(f'<span style="top:{frame.y(y) / HEIGHT:.1%}">{_number(y)}</span>' for y in up)
    below = "".join(f'<span style="left:{frame.x(x) / WIDTH:.1%}">{_number(x)}</span>' for x in across)
    return lines, left, below


def running_mean(points: Sequence[Point], over: int) -> list[Point]:
    """The mean of each point's y and the `over` - 1 before it."""
    total, means = 0.0, []
    for index, (x, y) in enumerate(points):
        total += y - (points[index - over][1] if index >= over else 0.0)
        means.append((x, total / min(index + 1, over)))
    return means


@dataclass(frozen=True)
class _Frame:
    """The range of the axes; converts values to SVG coordinates."""

    left: float
    right: float
    low: float
    high: float

    def x(self, value: float) -> float:
        return (value - self.left) / (self.right - self.left) * WIDTH

    def y(self, value: float) -> float:
        return (self.high - value) / (self.high - self.low) * HEIGHT


def _path_of(series: Series, frame: _Frame) -> str:
    points = [(frame.x(x), frame.y(y)) for x, y in _thinned(series.points)]
    line = "M" + "L".join(f"{x:.0f} {y:.1f}" for x, y in points)
    # A line of zero length with round caps is a dot that stays round when the SVG is stretched.
    dots = "".join(f"M{x:.0f} {y:.1f}h0" for x, y in points)
    paths = {"cloud": [dots], "marks": [dots, line]}.get(series.kind, [line])
    kinds = (series.kind, "line")
    return "".join(f'<path class="c{series.colour} {kind}" d="{d}"/>' for kind, d in zip(kinds, paths, strict=False))


def _thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """About `most` of the points at most, evenly spaced, including the last."""
    stride = math.ceil(len(points) / most)
    return [point for index, point in enumerate(points) if (len(points) - 1 - index) % stride == 0]


def _bounds(series: Series) -> list[float]:
    """The values that the y axis must include: all of them, except for the outliers of a cloud."""
    values = sorted(y for _, y in series.points)
    out = len(values) // FAR_OUT if series.kind == "cloud" else 0
    return values[out : len(values) - out]


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The range of the y axis: the values and a margin; a constant is centred."""
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    return (0.0 if low >= 0 > low - margin else low - margin), high + margin


def _ticks(low: float, high: float, integers: bool = False, about: int = 4) -> list[float]:
    """Round values from `low` to `high`."""
    rough = max(high - low, 1e-12) / about
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * each for each in STEPS if size * each >= rough)
    step = max(1.0, round(step)) if integers else step
    return [index * step for index in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)] or [low]


def _number(value: float) -> str:
    return f"{value:.4g}" if value == 0 or 1e-4 <= abs(value) < 1e5 else f"{value:.1e}".replace("e-0", "e-")


def _table(title: str, series: Sequence[Series]) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(each.name)}</th><td>{x:g}</td><td>{_number(y)}</td></tr>"
        for each in series
        if each.kind != "cloud"
        for x, y in _thinned(each.points, ROWS)
    )
    return f'<table class="heard"><caption>{title}</caption><tr><th>curve</th><th>step</th><th>value</th></tr>{rows}</table>'
