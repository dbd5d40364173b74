"""Curves as HTML: points agree with the axes, screen readers get a table, and plots stay small."""

import re

import pytest

from webui.curves import HEIGHT, WIDTH, Series, plot, running_mean

FALLING = [(step, 2.0 - step / 100) for step in range(0, 101)]


def dots(drawing, kind):
    """The positions of all dots of a kind."""
    (path,) = re.findall(rf'class="c\d {kind}" d="([^"]+)"', drawing)
    return [(float(x), float(y)) for x, y in re.findall(r"M(\S+) (\S+?)h0", path)]


def numbers(drawing, box):
    """The positions and the values of an axis's labels."""
    (inside,) = re.findall(rf'<div class="{box}"[^>]*>(.*?)</div>', drawing)
    return [(float(place), float(number)) for place, number in re.findall(r'style="\w+:([\d.]+)%">([^<]+)<', inside)]


def test_points_agree_with_the_labels_of_the_axes():
    drawing = plot("loss", [Series("it", [(0, 1.0), (50, 2.0), (100, 3.0)], "marks")], (0, 100))
    across, up = numbers(drawing, "below"), numbers(drawing, "left")
    assert (across[0][1], across[-1][1]) == (0.0, 100.0)
    by_x = {number: place / 100 * WIDTH for place, number in across}
    by_y = {number: place / 100 * HEIGHT for place, number in up}
    first, middle, last = dots(drawing, "marks")
    assert first[0] == pytest.approx(by_x[0], abs=1)
    assert last[0] == pytest.approx(by_x[100], abs=1)
    assert middle == (pytest.approx(WIDTH / 2, abs=1), pytest.approx(by_y[2.0], abs=1))
    assert 0 < last[1] < middle[1] < first[1] < HEIGHT


def test_a_mark_is_at_its_step_and_in_the_label_for_screen_readers():
    drawing = plot("loss", [Series("it", FALLING)], (0, 100), marked=(50, "recommended: step 50"))
    assert f'class="marked" d="M{WIDTH // 2} 0' in drawing
    assert 'aria-label="loss. recommended: step 50."' in drawing


def test_the_table_for_screen_readers_has_the_values_of_lines_but_not_of_clouds():
    drawing = plot("loss", [Series("mean", FALLING), Series("each", FALLING, "cloud")], (0, 100))
    rows = re.findall(r"<tr><th>(\w+)</th><td>(\d+)</td><td>([\d.]+)</td></tr>", drawing)
    assert 2 < len(rows) <= 13
    assert all(name == "mean" and float(value) == pytest.approx(2 - int(step) / 100) for name, step, value in rows)
    assert rows[-1][1] == "100"


def test_outliers_of_a_cloud_do_not_widen_the_axis_but_all_marks_are_inside():
    cloud = [(step, 1.0 + (step % 7) / 100) for step in range(100)] + [(100, 1000.0)]
    drawing = plot("loss", [Series("each", cloud, "cloud"), Series("held out", [(0, 3.0)], "marks")], (0, 100))
    assert 3 <= max(number for _, number in numbers(drawing, "left")) < 5
    assert all(0 < y < HEIGHT for _, y in dots(drawing, "marks"))


@pytest.mark.parametrize("value", [0.0, 1e-7, -3.0, 123456.0])
def test_a_constant_is_inside_the_plot(value):
    ((_, y), *_) = dots(plot("rate", [Series("it", [(0, value), (9, value)], "marks")], (0, 9)), "marks")
    assert 0 <= y <= HEIGHT


def test_an_empty_series_a_single_point_and_names_with_tags_can_be_plotted():
    assert plot("loss", [Series("it", [])], (0, 10)) == ""
    drawing = plot("<i>loss</i>", [Series("<b>it</b>", [(1, 1.0)])], (0, 0), marked=(1, "<u>"))
    assert not re.search("<[ibu]>", drawing)


def test_a_plot_of_ten_thousand_points_takes_a_few_kilobytes():
    many = [(step, 1.0 + step % 13) for step in range(10_000)]
    drawing = plot("loss", [Series("each", many, "cloud"), Series("mean", many)], (0, 10_000))
    assert len(drawing) < 12_000
    assert "M988 " in drawing, "the newest is among those that are drawn"


def test_the_running_mean_averages_the_points_so_far():
    points = [(step, float(value)) for step, value in enumerate((4, 2, 6, 8))]
    assert running_mean(points, 2) == [(0, 4.0), (1, 3.0), (2, 4.0), (3, 7.0)]
