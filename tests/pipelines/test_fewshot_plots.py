"""Figures show the given numbers, for any class names."""

import io

import numpy as np
import pytest
from PIL import Image

from pipelines.fewshot.metric_values import Interval, Reliability
from pipelines.fewshot.plots import comparison_figure, confusion_figure, per_class_figure, reliability_figure, save_figure

ODD_NAMES = ["$x$", "$\\frac{", "<b>bold</b>"]
CURVE = Reliability((0.3, 0.0, 0.9), (0.4, 0.0, 0.7), (10, 0, 30))


def words(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def stored(figure, path):
    save_figure(figure, path)
    return path.read_bytes()


def test_a_confusion_matrix_shows_its_counts_and_the_shares_of_each_row(tmp_path):
    confusion = [[8, 2, 0], [0, 0, 0], [1, 1, 2]]
    figure = confusion_figure(confusion, ODD_NAMES, "$ 5 $")
    axes = figure.axes[0]
    assert words(figure) == [str(count) for row in confusion for count in row]
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.8, 0.2, 0], [0, 0, 0], [0.25, 0.25, 0.5]])
    assert [label.get_text() for label in axes.get_xticklabels()] == ODD_NAMES
    assert [label.get_text() for label in axes.get_yticklabels()] == ODD_NAMES
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")
    assert Image.open(io.BytesIO(stored(figure, tmp_path / "deep" / "a.png"))).format == "PNG"


@pytest.mark.parametrize(("classes", "numbered", "named"), [(20, True, True), (21, False, True), (61, False, False)])
def test_many_classes_are_shown_without_counts_and_more_without_names(tmp_path, classes, numbered, named):
    figure = confusion_figure(np.eye(classes, dtype=int), ["a long name of a class " * 2] * classes)
    assert bool(words(figure)) == numbered
    shown = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert all(len(label) <= 24 for label in shown)
    assert ("a long name of a class …" in shown) == named
    stored(figure, tmp_path / "a.png")


def test_a_reliability_curve_leaves_empty_bins_out_and_names_its_error(tmp_path):
    figure = reliability_figure({"$plain$": CURVE, "fitted": CURVE})
    diagonal, *curves = figure.axes[0].lines
    np.testing.assert_allclose(diagonal.get_xydata(), [[0, 0], [1, 1]])
    for line in curves:
        np.testing.assert_allclose(line.get_xydata(), [[0.3, 0.4], [0.9, 0.7]])
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["$plain$, ECE 0.175", "fitted, ECE 0.175"]
    assert [bar.get_height() for bar in figure.axes[1].patches[:2]] == [0.25, 0.75]
    stored(figure, tmp_path / "a.png")


def test_classes_are_sorted_by_the_last_classifier_and_those_without_images_left_out(tmp_path):
    accuracies = {
        "zero-shot": {"$x$": 0.1, "b": 0.2, "c": None, "d": 0.9},
        "adapted": {"$x$": 0.8, "b": 0.3, "c": None, "d": 0.5},
    }
    figure = per_class_figure(accuracies)
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b", "d", "$x$"]
    assert [line.get_xdata().tolist() for line in axes.lines] == [[0.2, 0.9, 0.1], [0.3, 0.5, 0.8]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["zero-shot", "adapted"]
    stored(figure, tmp_path / "a.png")


def test_methods_are_compared_by_shots_with_their_intervals(tmp_path):
    curves = {"$a$": {16: Interval(0.8, 0.7, 0.85), 1: Interval(0.4, 0.3, 0.6)}, "b": {4: Interval(0.5, 0.45, 0.55)}}
    figure = comparison_figure(curves)
    axes = figure.axes[0]
    line, _, (bars,) = axes.containers[0]
    places, heights = line.get_xydata().T
    np.testing.assert_allclose(heights, [0.4, 0.8])
    np.testing.assert_allclose(places, [1, 16], rtol=0.05)
    assert not set(places) & {1, 16}
    np.testing.assert_allclose([bar[:, 1] for bar in bars.get_segments()], [[0.3, 0.6], [0.7, 0.85]])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "4", "16"]
    stored(figure, tmp_path / "a.png")


def test_the_same_figure_has_the_same_bytes(tmp_path):
    first, second = (stored(reliability_figure({"a": CURVE}), tmp_path / f"{place}.png") for place in range(2))
    assert first == second
