"""Plots: data frames for gr.LinePlot, sent only when they change, and the values as a table."""

import itertools

import pytest

from webui.plots import COLOURS, MARKED, MOST_POINTS, PALE, Plot, line_plot, number, running_mean, thinned, value_tables

LOSSES = [(float(step), 1.0 / step) for step in range(1, 1001)]


def contrast(colour, background):
    """The contrast of two colours as WCAG defines it."""

    def luminance(code):
        shares = [int(code[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
        return sum(weight * share for weight, share in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    high, low = sorted([luminance(colour), luminance(background)], reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_a_plot_sends_a_few_hundred_rows_in_named_colours_and_marks_a_step():
    plot = Plot("Loss", {"each step": LOSSES, "mean": running_mean(LOSSES, 9)}, (0, 2000), {"each step": PALE}, (40.0, "best"))
    sent = plot.update().make()
    data = sent.value["data"]
    assert len(data) <= 2 * MOST_POINTS + 2
    assert [row for row in data if row[2] == "each step"][-1] == [1000.0, 0.001, "each step"]
    marked = [row for row in data if row[2] == "best"]
    assert [row[0] for row in marked] == [40.0, 40.0]
    assert [row[1] for row in marked] == [min(row[1] for row in data), max(row[1] for row in data)]
    assert sent.color_map == {"each step": PALE, "mean": COLOURS[0], "best": MARKED}
    assert (sent.x_lim, sent.visible) == ([0, 2000], True)


def test_an_update_has_another_key_only_if_the_plot_differs():
    def key(points, extent=(0.0, 9.0)):
        return Plot("Loss", {"loss": points}, extent).update().key

    assert key([(0, 1), (1, 2)]) == key([(0, 1), (1, 2)])
    assert len({key([(0, 1), (1, 2)]), key([(0, 1), (1, 3)]), key([(0, 1), (1, 2)], (0.0, 8.0)), key([])}) == 4


def test_a_plot_without_a_line_is_hidden():
    for series in ({}, {"loss": []}, {"loss": [(1.0, 2.0)]}):
        assert Plot("Loss", series, (0, 9), marked=(1.0, "best")).update().make().visible is False
    assert line_plot("Loss").visible is False


def test_the_tables_have_the_values_of_all_series_but_the_pale_ones():
    shown = value_tables(
        [Plot("<b>Loss", {"each step": LOSSES, "loss": LOSSES}, (0, 9), {"each step": PALE}), Plot("No", {}, (0, 9))]
    )
    assert shown.count("<table") == 1
    assert "&lt;b&gt;Loss" in shown
    assert "each step" not in shown
    assert shown.count("<tr>") <= 14
    assert "<td>1000</td><td>0.001</td>" in shown


@pytest.mark.parametrize(("count", "most"), [(0, 5), (1, 5), (5, 5), (6, 5), (1000, 240)])
def test_thinned_points_are_evenly_spaced_and_end_with_the_last(count, most):
    points = [(float(index), 0.0) for index in range(count)]
    kept = thinned(points, most)
    assert kept[-1:] == points[-1:]
    assert len({after[0] - before[0] for before, after in itertools.pairwise(kept)}) <= 1
    assert len(kept) <= most + 1


def test_a_running_mean_is_that_of_the_points_before():
    assert running_mean([(1, 3.0), (2, 5.0), (3, 10.0)], 2) == [(1, 3.0), (2, 4.0), (3, 7.5)]


def test_numbers_are_short():
    assert [number(value) for value in (0.0, 0.12345, 1e-5, 123456.0)] == ["0", "0.1235", "1.0e-5", "1.2e+05"]


def test_lines_are_visible_on_the_light_and_the_dark_background():
    for colour in (*COLOURS, MARKED):
        assert min(contrast(colour, background) for background in ("#ffffff", "#0f172a")) >= 3, colour
