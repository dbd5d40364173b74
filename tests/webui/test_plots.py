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


def test_a_plot_sends_a_few_hundred_rows_and_marks_a_step():
    plot = Plot("Loss", {"each step": LOSSES, "mean": running_mean(LOSSES, 9), "none": []}, (0, 2000), ("best", 40.0))
    sent = plot.update().make()
    data = sent.value["data"]
    assert len(data) <= 2 * MOST_POINTS + 12
    assert [row for row in data if row[2] == "each step" and row[1] is not None][-1] == [1000.0, 0.001, "each step"]
    marked = [row for row in data if row[2] == "best" and row[1] is not None]
    assert [row[0] for row in marked] == [40.0, 40.0]
    values = [row[1] for row in data if row[1] is not None]
    assert [row[1] for row in marked] == [min(values), max(values)]
    assert sent.visible is True


def test_rows_without_values_extend_the_axis_and_keep_empty_series_but_interrupt_no_line():
    rows = Plot("Loss", {"loss": [(0, 1.0), (5, 2.0), (9, 1.0)], "short": [(2, 1.0), (3, 1.0)], "none": []}, (0, 9)).update().key
    assert [row for row in rows if row[1] is None] == [
        (0, None, "short"), (9, None, "short"), (0, None, "none"), (9, None, "none"),
    ]  # fmt: skip


def test_a_component_has_a_colour_for_each_series_from_the_start():
    component = line_plot("Loss", ["each step", "mean", "best"], colours={"each step": PALE, "best": MARKED})
    assert component.color_map == {"each step": PALE, "mean": COLOURS[0], "best": MARKED}


def test_an_update_changes_nothing_but_the_data_and_only_if_they_differ():
    """Gradio draws outdated data if another property changes with them."""

    def update(points, extent=(0.0, 9.0)):
        return Plot("Loss", {"loss": points}, extent).update()

    assert set(update([(0, 1), (1, 2)]).make().constructor_args) >= {"value", "visible"}
    assert update([(0, 1), (1, 2)]).key == update([(0, 1), (1, 2)]).key
    assert (
        len({update(*each).key for each in ([[(0, 1), (1, 2)]], [[(0, 1), (1, 3)]], [[(0, 1), (1, 2)], (0.0, 8.0)], [[]])}) == 4
    )


def test_a_plot_without_a_line_is_hidden():
    for series in ({}, {"loss": []}, {"loss": [(1.0, 2.0)]}):
        assert Plot("Loss", series, (0, 9), marked=("best", 1.0)).update().make().visible is False
    assert line_plot("Loss", ["loss"]).visible is False


def test_the_tables_have_values_of_all_series():
    shown = value_tables([Plot("<b>Loss", {"loss": LOSSES, "none": []}, (0, 9)), Plot("No", {}, (0, 9))])
    assert shown.count("<table") == 1
    assert "&lt;b&gt;Loss" in shown
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
