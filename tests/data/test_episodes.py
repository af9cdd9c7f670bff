"""Which episodes are whole."""

from __future__ import annotations

import pytest

from priorzero.data.episodes import whole_episodes
from tests.test_buffer import Episode


def numbers(segments) -> list[list[int]]:
    """Per episode found, the time steps of its steps."""
    return [[step.timestep for step in e.steps] for e in whole_episodes(segments)]


def test_segments_of_several_episodes_in_between():
    long = Episode(0, [1.0, 2.0, 4.0, 8.0, 16.0], "terminated", cuts=[2, 2, 1]).segments()
    short = Episode(1, [3.0, -1.0], "truncated", cuts=[1, 1]).segments()
    found = whole_episodes([long[0], short[0], long[1], short[1], long[2]])
    assert [e.rewards.tolist() for e in found] == [[1, 2, 4, 8, 16], [3, -1]]


@pytest.mark.parametrize("end", ["running", "hang"])
def test_what_has_not_ended_does_not_count(end):
    assert numbers(Episode(0, [1.0, 2.0], end, cuts=[1, 1]).segments()) == []


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_nor_does_what_a_part_is_missing_of(missing):
    parts = Episode(0, [1.0, 2.0, 3.0], "terminated", cuts=[1, 1, 1]).segments()
    assert numbers(parts) == [[0, 1, 2]]
    assert numbers(parts[:missing] + parts[missing + 1 :]) == []
