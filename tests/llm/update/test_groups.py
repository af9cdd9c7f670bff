"""Ratings within groups: by hand, against a slow reference, and on what a buffer holds."""

from __future__ import annotations

import statistics
from dataclasses import replace

import numpy as np
import pytest

from game_buffer_priorzero import PriorZeroGameBuffer
from priorzero.llm.update.groups import GroupDraw, compare
from priorzero.settings.llm import RFTSettings
from priorzero.types import ActionScores
from tests.test_buffer import DIM, Episode, empty, settings

REWARDS = [np.array([1.0, 0.0, 2.0]), np.array([0.0]), np.array([0.0, 6.0])]  # returns 3, 0, 6


def advantages(advantage: str, to_go: bool) -> list[list[float]]:
    compared = compare(REWARDS, advantage, to_go)
    values = (compared.outcome - compared.baseline) / compared.spread
    return [values[i, : len(own)].tolist() for i, own in enumerate(REWARDS)]


@pytest.mark.parametrize(
    ("advantage", "by_episode"),
    [
        ("group_mean", [0.0, -3.0, 3.0]),
        ("group", [0.0, -3 / 6**0.5, 3 / 6**0.5]),  # the population's deviation
        ("leave_one_out", [0.0, -4.5, 4.5]),  # the others: 3, 4.5, 1.5
    ],
)
def test_whole_episodes_by_hand(advantage, by_episode):
    for row, value, own in zip(advantages(advantage, False), by_episode, REWARDS, strict=True):
        assert row == pytest.approx([value] * len(own), abs=1e-5)


@pytest.mark.parametrize(
    ("advantage", "rows"),
    [
        # From each step on: 3 2 2, 0, 6 6; after its end an episode earns 0.
        ("group_mean", [[0, -2 / 3, 4 / 3], [-3], [3, 10 / 3]]),
        ("leave_one_out", [[0, -1, 2], [-4.5], [4.5, 5]]),
    ],
)
def test_returns_to_go_by_hand(advantage, rows):
    for got, want in zip(advantages(advantage, True), rows, strict=True):
        assert got == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("to_go", [False, True])
@pytest.mark.parametrize("advantage", ["group", "group_mean", "leave_one_out"])
def test_random_groups_equal_a_slow_reference(advantage, to_go):
    rng = np.random.default_rng(0)
    for _ in range(20):
        rewards = [rng.integers(-3, 4, rng.integers(1, 6)) * 1.0 for _ in range(rng.integers(2, 6))]
        got = compare(rewards, advantage, to_go)
        for i, own in enumerate(rewards):
            for t in range(len(own)):
                all_ = [float(sum(r[t:])) if to_go else float(sum(r)) for r in rewards]
                others = all_[:i] + all_[i + 1 :]
                mean = statistics.mean(others if advantage == "leave_one_out" else all_)
                spread = statistics.pstdev(all_) + 1e-6 if advantage == "group" else 1.0
                assert got.outcome[i, t] == pytest.approx(all_[i])
                assert got.baseline[i, t] == pytest.approx(mean)
                assert got.spread[i, t] == pytest.approx(spread)
                assert got.differs[i, t] == (len(set(all_)) > 1)


# ---- from a buffer -------------------------------------------------------------------------------


def alone(number: int, rewards: list[float], end: str = "terminated", version: int = 3) -> Episode:
    """An episode that the LLM of this version played alone."""
    episode = Episode(number, rewards, end)
    for t, step in enumerate(episode.steps):
        nothing = np.zeros(len(step.valid_actions))
        logprobs = ((-1.0, -0.5),) * len(step.valid_actions)
        episode.steps[t] = replace(
            step,
            visit_counts=nothing,
            root_value=float("nan"),
            predicted_value=float("nan"),
            scores=ActionScores(logprobs, weights_version=version),
        )
    return episode


def holding(*episodes: Episode) -> PriorZeroGameBuffer:
    buffer = empty(settings())
    for episode in episodes:
        buffer.push_game_segments(episode.segments())
    return buffer


def draw(buffer, count=1000, recent=1000, version=3, **fields):
    """(episode, step) -> sample, and the metrics."""
    chosen = RFTSettings(**dict(enable=True, advantage="group_mean", max_staleness=0) | fields)
    groups = GroupDraw(buffer.sample_episodes, chosen, version)
    samples = groups(count, recent)
    return {s.request.body_ids: s for s in samples}, groups.metrics


def choices(*episodes: Episode) -> set[tuple[int, int]]:
    """Decisions with more than one valid action."""
    return {
        (e.number, t)
        for e in episodes
        for t, step in enumerate(e.steps)
        if len(step.valid_actions) > 1
    }


GOOD, BAD = alone(0, [1.0, 4.0, 0.0, 0.0]), alone(1, [0.0, 0.0, 1.0, 0.0], end="truncated")


def test_decisions_carry_their_groups_rating():
    drawn, metrics = draw(holding(GOOD, BAD))
    assert set(drawn) == choices(GOOD, BAD) and len(drawn) >= 4
    for (number, t), sample in drawn.items():
        step = (GOOD, BAD)[number].steps[t]
        assert sample.advantage == (2.0 if number == 0 else -2.0)
        assert (sample.value_target, sample.predicted_value) == (5.0 - 4.0 * number, 3.0)
        assert sample.behaviour == tuple(step.behaviour) and sample.policy_version == 3
    assert metrics == dict(
        rft_groups=1.0,
        rft_groups_flat=0.0,
        rft_group_episodes=2.0,
        rft_group_return=3.0,
        rft_group_spread=2.0,
    )


def test_what_does_not_enter():
    """A hang, an episode that goes on, one that a search began, older weights."""
    others = [
        alone(2, [50.0, 50.0], end="hang"),
        alone(3, [50.0, 50.0], end="running"),
        alone(5, [50.0, 50.0], version=2),
        alone(6, [50.0, 50.0]),
    ]
    others[3].steps[0] = Episode(6, [50.0], "running").steps[0]
    drawn, metrics = draw(holding(GOOD, *others, BAD))
    assert set(drawn) == choices(GOOD, BAD) and metrics["rft_groups"] == 1.0
    assert metrics["rft_group_return"] == 3.0


def test_older_groups_are_drawn_from_where_the_limit_allows_it():
    """Each is compared within itself."""
    old = alone(2, [7.0, 0.0], version=1), alone(3, [9.0, 0.0], version=1)
    for limit, groups in ((0, 1), (1, 1), (2, 2), (None, 2)):
        drawn, metrics = draw(holding(*old, GOOD, BAD), max_staleness=limit)
        assert metrics["rft_groups"] == groups
        assert set(drawn) == choices(GOOD, BAD, *(old if groups == 2 else ()))
        by_episode = {number: s.advantage for (number, _), s in drawn.items()}
        assert by_episode.get(2, -1.0) == -1.0 and by_episode[0] == 2.0


def test_episodes_of_different_games_are_not_compared():
    buffer = empty(settings())
    rich = alone(2, [70.0, 0.0]), alone(3, [90.0, 0.0])
    for game, episodes in (("poor", (GOOD, BAD)), ("rich", rich)):
        for episode in episodes:
            for segment in episode.segments():
                segment.game = game
                buffer.push_game_segments([segment])
    drawn, metrics = draw(buffer)
    by_episode = {number: s.advantage for (number, _), s in drawn.items()}
    assert by_episode == {0: 2.0, 1: -2.0, 2: -10.0, 3: 10.0}
    assert (metrics["rft_groups"], metrics["rft_group_return"]) == (2.0, (3.0 + 80.0) / 2)


def test_groups_that_teach_nothing_are_counted_and_not_drawn_from():
    one, equal = alone(2, [1.0, 1.0], version=1), alone(4, [5.0, 0.0], version=2)
    buffer = holding(one, equal, alone(5, [0.0, 5.0, 0.0], version=2), GOOD, BAD)
    drawn, metrics = draw(buffer, max_staleness=None)
    assert set(drawn) == choices(GOOD, BAD)
    assert (metrics["rft_groups"], metrics["rft_groups_flat"]) == (3.0, 2.0)

    drawn, metrics = draw(holding(one, equal), version=2)
    assert drawn == {} and metrics["rft_groups_flat"] == 1.0
    assert draw(holding(), version=2) == ({}, dict(rft_groups=0.0, rft_groups_flat=0.0))


def test_with_returns_to_go_a_step_teaches_where_what_follows_differs():
    drawn, _ = draw(holding(GOOD, BAD), group_return="to_go")
    # To go: 5 4 0 0 and 1 1 1 0; nothing follows the last step.
    want = {(0, 0): 2, (1, 0): -2, (0, 1): 1.5, (1, 1): -1.5, (0, 2): -0.5, (1, 2): 0.5}
    got = {key: s.advantage for key, s in drawn.items()}
    assert got == {key: want[key] for key in choices(GOOD, BAD) if key in want} and len(got) > 2


def test_draws_are_without_repetition_random_and_of_whole_recent_episodes():
    buffer = holding(GOOD, BAD, alone(7, [1.0, 2.0]))
    usable = choices(GOOD, BAD, alone(7, [1.0, 2.0]))
    few = [frozenset(draw(buffer, count=2)[0]) for _ in range(20)]
    assert all(len(keys) == 2 and keys <= usable for keys in few) and len(set(few)) > 3
    # The newest 6 of 10 transitions: the first episode is cut off.
    assert set(draw(buffer, recent=6)[0]) <= choices(BAD, alone(7, [1.0, 2.0]))
    assert draw(buffer, recent=6)[1]["rft_group_episodes"] == 2.0


def test_a_resumed_buffer_draws_the_same():
    one = holding(GOOD, BAD)
    draw(one, count=2)
    two = PriorZeroGameBuffer(settings(), DIM, seed=9)
    two.load_state_dict(one.state_dict(), dict(one.numbered_segments()))
    assert list(draw(one, count=3)[0]) == list(draw(two, count=3)[0])


def test_what_the_llm_played_alone_is_not_drawn_for_a_search():
    assert holding(GOOD, BAD).sample_llm(100) == []
    assert holding(GOOD, BAD, Episode(8, [1.0, 1.0], "terminated")).sample_llm(100) != []
