"""Ranks, calibration and reductions against numbers worked out by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from priorzero.evidence.metrics import (
    Judged,
    expected_calibration_error,
    figures,
    judge,
    reduce,
    reliability,
    uniform_figures,
)


def probabilities(*values: float) -> np.ndarray:
    return np.log(np.asarray(values))


def test_reductions_of_two_commands():
    tokens = ((-1.0, -3.0), (-0.5, -0.5, -2.0))
    unconditional = np.asarray([-6.0, -2.0])
    assert reduce(tokens, unconditional, "sum").tolist() == [-4.0, -3.0]
    assert reduce(tokens, unconditional, "mean").tolist() == [-2.0, -1.0]
    # What the state adds to a command: -4 + 6 and -3 + 2.
    assert reduce(tokens, unconditional, "pmi").tolist() == [2.0, -1.0]


def test_a_decision_by_hand():
    """p = 0.5, 0.3, 0.2; the second command is right."""
    one = judge(probabilities(0.5, 0.3, 0.2), (1, 0, 2), 1.0)
    assert one.rank == 2 and not one.hit
    assert math.exp(one.log_right) == pytest.approx(0.3)
    assert one.confidence == pytest.approx(0.5)


def test_equal_commands_count_as_one_answer():
    """Right are the second and the last: the better one gives the rank, both the probability. The
    favourite has an equal as well, so the confidence is that of both.
    """
    one = judge(probabilities(0.4, 0.1, 0.2, 0.3), (7, 0, 7, 0), 1.0)
    assert one.rank == 2
    assert math.exp(one.log_right) == pytest.approx(0.4)
    assert one.confidence == pytest.approx(0.6) and not one.hit

    right = judge(probabilities(0.4, 0.1, 0.2, 0.3), (0, 0, 1, 2), 1.0)
    assert right.rank == 1 and right.hit and right.confidence == pytest.approx(0.5)


def test_ties_count_half_a_place():
    assert judge(np.zeros(3), (1, 0, 2), 1.0).rank == 2.0
    assert judge(np.zeros(2), (0, 1), 1.0).rank == 1.5
    # A tie among right commands is none.
    assert judge(np.zeros(2), (0, 0), 1.0).rank == 1.0


def test_temperature_flattens_probabilities_and_leaves_ranks():
    """At temperature 2: sqrt(0.8) : sqrt(0.2) = 2 : 1."""
    cold, warm = (judge(probabilities(0.8, 0.2), (1, 0), t) for t in (1.0, 2.0))
    assert cold.rank == warm.rank == 2
    assert math.exp(warm.log_right) == pytest.approx(1 / 3)
    assert warm.confidence == pytest.approx(2 / 3)


def test_scores_that_underflow_keep_a_finite_log_loss():
    one = judge(np.asarray([0.0, -2000.0]), (1, 0), 1.0)
    assert one.log_right == pytest.approx(-2000.0)


def test_figures_are_means():
    """Ranks 1, 2, 4, 6 and p(right) 0.5, 0.25, 0.125, 0.125."""
    judged = [
        Judged(rank, math.log(p), 0.5, rank == 1)
        for rank, p in zip((1, 2, 4, 6), (0.5, 0.25, 0.125, 0.125), strict=True)
    ]
    found = figures(judged)
    assert found["decisions"] == 4 and found["rank"] == 3.25
    assert (found["top1"], found["top3"], found["top5"]) == (0.25, 0.5, 0.75)
    reciprocal = [1, 1 / 2, 1 / 4, 1 / 6]
    mrr = sum(reciprocal) / 4
    assert found["mrr"] == pytest.approx(mrr)
    spread = math.sqrt(sum((r - mrr) ** 2 for r in reciprocal) / 4)
    assert found["mrr_error"] == pytest.approx(spread / 2)
    assert found["probability"] == pytest.approx(0.25)
    assert found["log_loss"] == pytest.approx((1 + 2 + 3 + 3) / 4 * math.log(2))
    assert found["ece"] == pytest.approx(0.25)  # says 0.5, is right in one of four


def test_calibration_error_by_hand():
    """Bins 0.2-0.3 (two, one right), 0.9-1 (three, all right, one of them fully sure)."""
    given = [(0.2, False), (0.28, True), (0.9, True), (0.95, True), (1.0, True)]
    judged = [Judged(1.0, -1.0, confidence, hit) for confidence, hit in given]
    low, high = reliability(judged)
    assert low == {"decisions": 2, "confidence": pytest.approx(0.24), "right": 0.5}
    assert high == {"decisions": 3, "confidence": pytest.approx(0.95), "right": 1.0}
    assert expected_calibration_error(judged) == pytest.approx(2 / 5 * 0.26 + 3 / 5 * 0.05)


def test_uniform_order_against_all_orders():
    """Five commands, two of them right; and three, one right: every order is as likely."""
    cases = [(0, 1, 0, 2, 3), (4, 0, 5)]
    ranks = []
    for outcomes in cases:
        orders = list(itertools.permutations(outcomes))
        ranks.append([1 + order.index(0) for order in orders])

    def expected(value) -> float:
        return sum(sum(map(value, own)) / len(own) for own in ranks) / 2

    found = uniform_figures(cases)
    assert found["decisions"] == 2
    assert found["rank"] == pytest.approx(expected(lambda r: r))
    assert found["mrr"] == pytest.approx(expected(lambda r: 1 / r))
    for top in (1, 3, 5):
        assert found[f"top{top}"] == pytest.approx(expected(lambda r, top=top: r <= top))
    assert found["probability"] == pytest.approx((2 / 5 + 1 / 3) / 2)
    assert found["log_loss"] == pytest.approx(-(math.log(2 / 5) + math.log(1 / 3)) / 2)
