"""Scores against scikit-learn, scipy and algebra."""

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.calibration import calibration_curve
from sklearn.metrics import accuracy_score, confusion_matrix, log_loss, recall_score
from torch.nn import functional as F

from pipelines.fewshot.metrics import (
    TEMPERATURES,
    Interval,
    fit_temperature,
    harmonic_mean,
    interval_over_seeds,
    reliability,
    score,
    top1,
    wilson_interval,
)

CLASSES = ("a", "b", "c", "d")


def drawn(count=600, classes=4, seed=0, sharpness=2.0):
    """Labels drawn from softmax(logits): a classifier that is calibrated as it is."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, classes, generator=generator, dtype=torch.float64) * sharpness
    return logits, torch.multinomial(logits.softmax(dim=1), 1, generator=generator).squeeze(1)


def test_scores_are_scikit_learns():
    logits, labels = drawn()
    found = score(logits, labels, CLASSES, temperature=1.7)
    predicted, probabilities = logits.argmax(dim=1), (logits / 1.7).softmax(dim=1)
    assert found.count == 600
    assert found.top1.value == top1(logits, labels) == accuracy_score(labels, predicted)
    assert list(found.per_class.values()) == recall_score(labels, predicted, average=None).tolist()
    assert tuple(found.per_class) == CLASSES
    assert found.confusion == confusion_matrix(labels, predicted).tolist()
    assert math.isclose(found.negative_log_likelihood, log_loss(labels, probabilities), rel_tol=1e-9)
    assert json.loads(json.dumps(found.to_json()))["top1"]["value"] == found.top1.value


def test_a_class_without_images_has_no_accuracy_and_keeps_its_row():
    logits = torch.eye(4)[[0, 1, 3, 3]]
    found = score(logits, torch.tensor([0, 1, 3, 1]), CLASSES)
    assert found.per_class == {"a": 1.0, "b": 0.5, "c": None, "d": 1.0}
    assert found.confusion == [[1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 0, 1]]


def test_classes_with_the_same_name_are_numbered():
    found = score(torch.eye(3), torch.arange(3), ["missile", "dog", "missile"])
    assert found.per_class == {"missile (0)": 1.0, "dog": 1.0, "missile (2)": 1.0}


def test_the_calibration_curve_is_scikit_learns():
    """scikit-learn supports two classes: whether the prediction is right, by confidence."""
    logits, labels = drawn()
    probabilities = logits.softmax(dim=1)
    confidence, predicted = probabilities.max(dim=1)
    found = reliability(probabilities, labels)
    filled = np.asarray(found.counts) > 0
    accuracy, mean_confidence = calibration_curve(predicted == labels, confidence, n_bins=15)
    np.testing.assert_allclose(np.asarray(found.accuracy)[filled], accuracy)
    np.testing.assert_allclose(np.asarray(found.confidence)[filled], mean_confidence)
    assert sum(found.counts) == 600


def test_the_calibration_error_of_equal_confidences_is_their_distance_from_the_accuracy():
    probabilities = torch.tensor([[0.9, 0.1]] * 10, dtype=torch.float64)
    labels = torch.tensor([0] * 6 + [1] * 4)
    assert math.isclose(reliability(probabilities, labels).expected_calibration_error, 0.3)
    mixed = torch.cat([probabilities, torch.tensor([[0.75, 0.25]] * 30, dtype=torch.float64)])
    with_right_ones = torch.cat([labels, torch.zeros(30, dtype=torch.int64)])
    assert math.isclose(reliability(mixed, with_right_ones).expected_calibration_error, 0.25 * 0.3 + 0.75 * 0.25)


@pytest.mark.parametrize("confidence", [1 / 15, 7 / 15, 1.0])
def test_a_confidence_on_an_edge_is_in_the_lower_bin(confidence):
    row = torch.zeros(1, 30, dtype=torch.float64)
    row[0, 0] = confidence
    counts = reliability(row, torch.tensor([0])).counts
    assert counts.index(1) == round(confidence * 15) - 1


@pytest.mark.parametrize("stretch", [0.2, 1.0, 3.0])
def test_the_temperature_is_the_factor_of_scaled_calibrated_logits(stretch):
    logits, labels = drawn(count=20_000, seed=1)
    fitted = fit_temperature(logits * stretch, labels)
    assert math.isclose(fitted, stretch, rel_tol=0.05)
    assert score(logits * stretch, labels, CLASSES, fitted).calibration_error < 0.02


@pytest.mark.parametrize("sharpness", [0.3, 1.0, 10.0])
def test_the_objective_has_zero_slope_at_the_temperature(sharpness):
    """With beta = 1 / T its slope in log T is  log T - beta sum(E[logit under the model] - logit of the label)."""
    logits, labels = drawn(count=80, seed=2)
    logits = logits * sharpness
    fitted = fit_temperature(logits, labels)
    expected = ((logits / fitted).softmax(dim=1) * logits).sum(dim=1)
    surplus = (expected - logits.gather(1, labels[:, None]).squeeze(1)).sum()
    torch.testing.assert_close(float(surplus / fitted), math.log(fitted), atol=1e-3, rtol=0)

    def objective(temperature):
        return F.cross_entropy(logits / temperature, labels, reduction="sum") + math.log(temperature) ** 2 / 2

    assert all(objective(fitted * factor) > objective(fitted) for factor in (0.3, 0.9, 1.1, 3))


def test_with_all_images_right_the_temperature_falls_with_their_number_but_is_bounded():
    few, many = (fit_temperature(torch.eye(4).repeat(times, 1) * 3, torch.arange(4).repeat(times)) for times in (1, 50))
    assert 2 * TEMPERATURES[0] < many < few < 1
    assert math.isclose(fit_temperature(torch.eye(4) * 300, torch.arange(4)), 1, abs_tol=1e-3)


def test_with_all_images_wrong_the_temperature_rises():
    assert fit_temperature(torch.eye(4).repeat(9, 1) * 9, torch.arange(4).roll(1).repeat(9)) > 3


def test_a_temperature_changes_no_prediction():
    logits, labels = drawn()
    assert score(logits, labels, CLASSES, 3.0).confusion == score(logits, labels, CLASSES).confusion


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (3, 7), (10, 10), (700, 1000)])
def test_the_bounds_of_wilsons_interval_solve_its_equation(correct, total):
    found = wilson_interval(correct, total)
    z = stats.norm.ppf(0.975)
    for end in (found.low, found.high):
        assert math.isclose((correct / total - end) ** 2, z**2 * end * (1 - end) / total, rel_tol=1e-6, abs_tol=1e-12)
    assert 0 <= found.low <= found.value == correct / total <= found.high <= 1


def test_the_interval_over_seeds_is_students_and_covers_the_mean_in_95_of_100_cases():
    values = [0.61, 0.64, 0.58, 0.66, 0.60]
    found = interval_over_seeds(values)
    reference = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    np.testing.assert_allclose([found.low, found.high], reference)
    rng = np.random.default_rng(0)
    held = [own.low <= 0.7 <= own.high for own in map(interval_over_seeds, rng.normal(0.7, 0.1, (2000, 5)))]
    assert abs(np.mean(held) - 0.95) < 0.015


def test_the_harmonic_mean_is_between_both_values_and_zero_if_either_is():
    assert math.isclose(harmonic_mean(0.8, 0.4), 2 * 0.8 * 0.4 / 1.2)
    assert harmonic_mean(0.8, 0.0) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: score(torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64), CLASSES), r"labels \(n,\).* got .*3, 4.*2"),
        (lambda: score(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), CLASSES), r"n >= 1"),
        (lambda: score(torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64), CLASSES), r"each of 4 classes, got 3"),
        (lambda: top1(torch.full((1, 4), torch.nan), torch.zeros(1, dtype=torch.int64)), r"finite, got 4 non-finite values"),
        (lambda: fit_temperature(torch.full((1, 4), torch.inf), torch.zeros(1, dtype=torch.int64)), r"finite, got 4"),
        (lambda: wilson_interval(0, 0), r"got 0 of 0"),
        (lambda: wilson_interval(3, 2), r"got 3 of 2"),
        (lambda: interval_over_seeds([0.5]), r"at least two runs, got 1"),
    ],
)
def test_invalid_logits_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_interval_is_printed_within_0_and_100_percent():
    assert Interval(0.5, 0.25, 0.75).as_share() == "50.0% (25.0% to 75.0%)"
    assert Interval(0.9, 0.7, 1.1).as_share() == "90.0% (70.0% to 100.0%)"
    assert Interval(0.1, -0.1, 0.3).as_share() == "10.0% (0.0% to 30.0%)"
