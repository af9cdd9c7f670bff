"""Clocks, by hand."""

from __future__ import annotations

import pytest

from priorzero.loop.clocks import Every, Ratio


@pytest.mark.parametrize(
    ("clock", "due"),
    [
        (Every(1), [0, 1, 2, 3, 4, 5, 6]),
        (Every(3), [0, 3, 6]),
        (Every(3, phase=2), [2, 5]),
        (Every(2, phase=5), [5]),
        (Every(0), []),
    ],
)
def test_every(clock, due):
    assert [step for step in range(7) if clock(step)] == due


@pytest.mark.parametrize(
    ("ratio", "transitions", "updates"), [(0.25, 40, 10), (0.25, 41, 11), (2.0, 3, 6), (0.5, 0, 0)]
)
def test_ratio_rounds_up(ratio, transitions, updates):
    assert Ratio(ratio)(transitions) == updates
