"""Intervals, paired tests, the Pareto front, and the sweep of the learning rate."""

import math
from itertools import product

import numpy as np
import pytest
from scipy.stats import binomtest, rankdata, wilcoxon

from training.comparison.rates import MAX_EXTENSIONS, choose_rate
from training.comparison.statistics import bootstrap_interval, holm, signed_rank_p, smallest_p
from training.runs.arena_results import pareto_front


def test_the_interval_of_one_dataset_is_that_of_the_mean_of_its_seeds():
    values = np.random.default_rng(0).normal(3.0, 1.0, 60)
    interval = bootstrap_interval({"only": values})
    error = values.std(ddof=0) / math.sqrt(len(values))
    assert interval.value == pytest.approx(values.mean())
    assert (interval.high - interval.low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.1)


def test_the_interval_covers_the_spread_between_datasets():
    """With equal seeds, every resample is a mean of datasets alone."""
    levels = {"a": [0.0] * 5, "b": [1.0] * 5, "c": [2.0] * 5}
    interval = bootstrap_interval(levels)
    assert (interval.value, interval.low, interval.high) == (1.0, pytest.approx(0.0, abs=0.34), pytest.approx(2.0, abs=0.34))


def test_the_interval_covers_the_true_mean_nineteen_times_in_twenty():
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(100):
        levels = rng.normal(0, 1, 12)
        interval = bootstrap_interval({str(i): level + rng.normal(0, 0.5, 5) for i, level in enumerate(levels)}, seed)
        covered += interval.low <= 0 <= interval.high
    assert binomtest(covered, 100, 0.93).pvalue > 0.01


@pytest.mark.parametrize("count", [5, 12, 30])
def test_the_signed_rank_p_is_scipy_s_exact_one_without_ties(count):
    differences = np.random.default_rng(count).normal(0.3, 1.0, count)
    assert signed_rank_p(differences) == pytest.approx(wilcoxon(differences, method="exact").pvalue)


@pytest.mark.parametrize("differences", [[0.1, 0.1, 0.1, -0.2, 0.3], [0.0, 0.1, 0.1, 0.2, -0.1, 0.2], [-1, -1, -1, -1]])
def test_with_ties_it_is_the_share_of_all_signs_with_an_equal_or_more_extreme_sum(differences):
    ranks = rankdata(np.abs(differences))
    sums = np.asarray(
        [np.dot(np.asarray(signs) * (np.asarray(differences) != 0), ranks) for signs in product((-1, 1), repeat=len(ranks))]
    )
    observed = np.dot(np.sign(differences), ranks)
    assert signed_rank_p(differences) == pytest.approx(min(1.0, 2 * min((sums <= observed).mean(), (sums >= observed).mean())))


def test_the_smallest_p_is_that_of_differences_of_one_sign():
    assert [smallest_p(count) for count in (1, 2, 6)] == [signed_rank_p([1.0] * count) for count in (1, 2, 6)]


def test_equal_results_have_a_p_of_one():
    assert signed_rank_p([0.0, 0.0, 0.0]) == 1.0


def test_holm_multiplies_by_the_number_of_hypotheses_left_and_never_falls():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_keeps_the_error_of_the_family_below_its_level():
    """Of ten true hypotheses, the smallest adjusted p is below 0.05 in at most a twentieth of the families."""
    uniform = np.random.default_rng(2).random((500, 10))
    rejected = sum(min(holm(family)) < 0.05 for family in uniform)
    assert binomtest(rejected, 500, 0.05, alternative="greater").pvalue > 0.01


def test_the_pareto_front_has_the_points_that_no_other_one_beats():
    points = {
        "small": (10, 0.5),
        "better": (20, 0.7),
        "worse": (30, 0.6),
        "equal": (20, 0.7),
        "best": (40, 0.9),
        "costly": (50, 0.9),
    }
    assert pareto_front(points) in (["small", "better", "best"], ["small", "equal", "best"])


def scores(best, tried):
    """A score that is lowest at the rate `best`; the tried rates are recorded."""

    def score_at(rate):
        tried.append(rate)
        return abs(math.log(rate / best))

    return score_at


def test_an_inner_best_rate_is_chosen_at_once():
    tried = []
    assert choose_rate([0.1, 0.3, 1.0], scores(0.3, tried)) == (0.3, [])
    assert sorted(set(tried)) == [0.1, 0.3, 1.0]


@pytest.mark.parametrize("best", [1e-6, 1e6])
def test_rates_beyond_the_best_end_are_tried_on_its_side_alone(best):
    tried = []
    rate, missing = choose_rate([0.1, 0.3, 0.9], scores(best, tried))
    extensions = (
        [0.9 * 3**i for i in range(1, MAX_EXTENSIONS + 1)] if best > 1 else [0.1 / 3**i for i in range(1, MAX_EXTENSIONS + 1)]
    )
    assert not missing
    assert sorted(set(tried)) == pytest.approx(sorted([0.1, 0.3, 0.9, *extensions]))
    assert rate == pytest.approx(extensions[-1])


def test_rates_without_a_score_are_asked_for():
    assert choose_rate([0.1, 0.3], lambda rate: None) == (None, [0.1, 0.3])


def test_a_rate_whose_training_failed_is_not_chosen():
    rate, missing = choose_rate([0.1, 0.3, 0.9], lambda rate: math.inf if rate > 0.2 else rate)
    assert (rate is None or rate < 0.2, missing) == (True, [])
    assert choose_rate([0.1, 0.3], lambda rate: math.inf) == (None, [])


def test_a_single_rate_is_chosen_without_extensions():
    assert choose_rate([0.1], lambda rate: 1.0) == (0.1, [])


def test_rates_are_the_same_numbers_whichever_others_they_were_computed_from():
    asked = set()
    for default in (3e-4 * 10, 1e-4 * 10):
        choose_rate([default * factor for factor in (0.3, 1.0, 3.0)], lambda rate: asked.add(rate) or rate)
    assert {0.0003, 0.0009, 0.001, 0.003, 0.009} <= asked
    assert all(rate == float(f"{rate:.6g}") for rate in asked)
