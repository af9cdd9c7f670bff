"""Scales of advantages, against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from priorzero.llm.update.advantages import Advantages

RAW = np.array([-1.0, 0.0, 4.0])


def test_raw_is_as_it_comes():
    assert Advantages("raw")(RAW).tolist() == RAW.tolist()


def test_batch_by_hand():
    spread = np.sqrt((4 + 1 + 9) / 3)
    assert Advantages("batch")(RAW).tolist() == pytest.approx(
        [-2 / spread, -1 / spread, 3 / spread]
    )


@pytest.mark.parametrize("kind", ["batch", "robust"])
def test_one_decision_keeps_its_advantage(kind):
    assert Advantages(kind)(np.array([3.0])).tolist() == [3.0]


def test_running_is_the_batch_of_all_so_far():
    scale, drawn = Advantages("running"), np.random.default_rng(0).normal(2.0, 3.0, 300)
    for start in range(0, 300, 20):
        got = scale(drawn[start : start + 20])
        seen = drawn[: start + 20]
        assert got.tolist() == pytest.approx(
            ((drawn[start : start + 20] - seen.mean()) / seen.std()).tolist(), rel=1e-4
        )


def test_running_forgets():
    scale = Advantages("running")
    for _ in range(100):
        scale(np.linspace(-1, 1, 50))
    for _ in range(200):
        last = scale(np.linspace(9, 11, 50))
    assert abs(last.mean()) < 0.1


def test_a_good_phase_stays_good_where_the_usual_is_remembered():
    scale = Advantages("running")
    scale(np.linspace(-1, 1, 50))
    assert scale(np.array([2.0, 2.1])).min() > 0
    assert Advantages("batch")(np.array([2.0, 2.1])).min() < 0


def test_robust_by_hand():
    """Median 2, quartiles 1 and 3; the outlier leaves the others their size."""
    got = Advantages("robust")(np.array([0.0, 1.0, 2.0, 3.0, 1000.0]))
    unit = 1.349 / 2
    assert got.tolist() == pytest.approx([-2 * unit, -unit, 0.0, unit, 5.0], rel=1e-5)


def test_robust_where_most_are_equal():
    got = Advantages("robust")(np.array([0.0] * 9 + [1.0]))
    assert got.tolist() == pytest.approx([0.0] * 9 + [1 / 0.3], rel=1e-4)
