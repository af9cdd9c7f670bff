"""Interquartile means and intervals by hand, and against enumeration of every resample."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from priorzero.comparison.statistics import (
    estimate,
    interquartile_mean,
    probability_of_improvement,
)


def slow_mean(values) -> float:
    """One value after the other leaves at both ends until floor(N / 4) are gone."""
    left = list(values)
    for _ in range(len(values) // 4):
        left.remove(min(left))
        left.remove(max(left))
    return sum(left) / len(left)


def within(all_resamples: list[float], low: float, high: float) -> bool:
    """Whether an interval is that of the exact distribution, up to half a percent of its mass."""
    ordered = sorted(all_resamples)
    at = [ordered[int(q * len(ordered))] for q in (0.02, 0.03, 0.97, 0.98)]
    return at[0] <= low <= at[1] and at[2] <= high <= at[3]


def test_interquartile_mean_by_hand():
    assert interquartile_mean(np.array([3.0])) == 3
    assert interquartile_mean(np.array([9.0, 0.0, 3.0])) == 4  # nothing is left out of three
    assert interquartile_mean(np.array([100.0, 1.0, 3.0, -50.0])) == 2
    # Eight runs: two at each end.
    assert interquartile_mean(np.array([8.0, 7, 6, 5, 4, 3, 2, 100])) == (4 + 5 + 6 + 7) / 4


def test_interquartile_mean_against_the_slow_one():
    draws = np.random.default_rng(3)
    for count in range(1, 14):
        rows = draws.normal(size=(5, count))
        assert interquartile_mean(rows) == pytest.approx([slow_mean(row) for row in rows])


@pytest.mark.parametrize("values", [[1.0, 2.0, 4.0], [0.0, 1.0, 10.0, 100.0, 1000.0]])
def test_interval_against_every_resample(values):
    told = estimate(values)
    every = [slow_mean(drawn) for drawn in itertools.product(values, repeat=len(values))]
    assert told.value == pytest.approx(slow_mean(values))
    assert within(every, told.low, told.high) and told.low < told.value < told.high


def test_one_run_has_no_interval():
    assert estimate([5.0]) == (5.0, None, None)
    assert probability_of_improvement([5.0], [4.0, 6.0]) == (0.5, None, None)


def test_probability_of_improvement_by_hand():
    # Pairs of 1 and 3 with 1, 2, 4: a tie and two losses; two wins and a loss.
    told = probability_of_improvement([1.0, 3.0], [1.0, 2.0, 4.0])
    assert told.value == pytest.approx(2.5 / 6)
    assert probability_of_improvement([2.0, 3.0], [0.0, 1.0]) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [([1.0, 3.0, 5.0, 7.0], [2.0, 4.0, 6.0]), ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])],
)
def test_its_interval_against_every_resample(ours, theirs):
    """Equal groups are drawn independently of each other too: else every draw is a draw."""
    pairs = len(ours) * len(theirs)
    every = [
        sum((a > b) + (a == b) / 2 for a in left for b in right) / pairs
        for left in itertools.product(ours, repeat=len(ours))
        for right in itertools.product(theirs, repeat=len(theirs))
    ]
    told = probability_of_improvement(ours, theirs)
    assert told.value == pytest.approx(0.5)
    assert within(every, told.low, told.high) and told.low < told.value < told.high
