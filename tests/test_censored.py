"""Curves of what some of N do within a number of steps, against definitions that are computed another way."""

import numpy as np
import pytest

from ietagc_diffusers.eval.censored import (
    bootstrap_intervals,
    done_by,
    mean_steps,
    median,
    median_interval,
    share_intervals,
)
from ietagc_diffusers.eval.metrics.intervals import bootstrap_interval, wilson_interval

CHECKS = [0, 10, 20, 30]


def kaplan_meier(steps, checks):
    """1 minus the product-limit estimate of what is not done yet."""
    left, estimates = 1.0, []
    for check in checks:
        at_risk = sum(step is None or step >= check for step in steps)
        left *= 1 - sum(step == check for step in steps) / at_risk if at_risk else 1
        estimates.append(1 - left)
    return estimates


@pytest.mark.parametrize(
    ("steps", "middle"),
    [([0, 10, None, 30], 10), ([None] * 3, None), ([20, 20, None], 20), ([0, 0], 0), ([30, None, None, 10], 30)],
)
def test_shares_are_kaplan_meier_s_and_the_median_of_those_that_never_end_is_over_all_steps(steps, middle):
    done = done_by(steps, CHECKS)
    np.testing.assert_allclose(done.mean(axis=0), kaplan_meier(steps, CHECKS))
    assert median(done, CHECKS) == middle
    by_hand = [CHECKS[-1] if step is None else step for step in steps]
    assert mean_steps(done, CHECKS)[:, 0].tolist() == by_hand


def test_intervals_of_shares_and_medians():
    done = done_by([10] * 8 + [None] * 2, CHECKS)
    low, high = share_intervals(done)
    assert [low[1], high[1]] == wilson_interval(done[:, 1]) and high[0] < 0.5
    assert median_interval(done, CHECKS) == [10, None if low[1] < 0.5 else 10]
    assert median_interval(done_by([10] * 50, CHECKS), CHECKS) == [10, 10]
    assert median_interval(done_by([None, 20], CHECKS), CHECKS) == [0, None]


def test_the_interval_of_the_median_holds_it_as_often_as_it_says():
    rng, held = np.random.default_rng(0), 0
    for _ in range(300):  # uniform over 1 to 30 in steps of 1: the median is 15
        checks = list(range(31))
        low, high = median_interval(done_by(rng.integers(1, 31, 20).tolist(), checks), checks)
        held += low <= 15 and (high is None or high >= 15)
    assert held >= 0.93 * 300


def test_bootstrap_intervals_of_one_part_are_the_plain_ones_and_of_two_those_of_the_difference():
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=(12, 1)), rng.normal(1, size=(40, 1))
    low, high = bootstrap_intervals(first)
    assert [low[0], high[0]] == pytest.approx(bootstrap_interval(first[:, 0], np.mean))
    low, high = bootstrap_intervals(first, -second)
    spread = (first.var() / 12 + second.var() / 40) ** 0.5
    assert high[0] - low[0] == pytest.approx(2 * 1.96 * spread, rel=0.1)
    assert low[0] < first.mean() - second.mean() < high[0]
