"""The n-step return with numbers worked out on paper, and what the LLM's advantage makes of it."""

from __future__ import annotations

import numpy as np
import pytest

from game_buffer_priorzero import PriorZeroGameBuffer
from priorzero.data.returns import n_step_return, n_step_returns
from priorzero.data.segment import Segment, StepRecord, window
from priorzero.settings.policy import PolicySettings
from priorzero.types import TextState, TokenisedRequest


def played(rewards, end: str, values=None, predicted=None) -> Segment:
    """An episode of two actions a step; `end` is how its last step left it."""
    segment = Segment(0, 0, len(rewards))
    for t, reward in enumerate(rewards):
        step = StepRecord(
            state=TextState(f"room {t}", ("north", "south")),
            observation=np.full(2, t, np.float32),
            valid_actions=("north", "south"),
            valid_ids=np.array([0, 1]),
            action_index=0,
            visit_counts=np.array([1.0, 1.0]),
            behaviour=np.array([0.5, 0.5]),
            target_policy=np.array([0.5, 0.5]),
            root_value=0.0 if values is None else values[t],
            predicted_value=0.0 if predicted is None else predicted[t],
            reward=reward,
            done_kind=end if t == len(rewards) - 1 else "running",
            timestep=t,
            request=TokenisedRequest((1,), (t,), ((2,), (3,))),
        )
        segment.record(step, np.full(2, t + 1, np.float32))
    return segment


# Rewards 1 2 4 8, discount 0.5, two-step returns.
@pytest.mark.parametrize(
    ("end", "last_valued", "start", "expected"),
    [
        ("terminated", 4, 0, (1 + 0.5 * 2, 0.25, 2)),
        ("terminated", 4, 2, (4 + 0.5 * 8, 0.0, 4)),
        ("terminated", 4, 3, (8.0, 0.0, 4)),
        ("terminated", 3, 3, (8.0, 0.0, 4)),  # the state after the end needs no value
        ("truncated", 4, 2, (4 + 0.5 * 8, 0.25, 4)),
        ("truncated", 4, 3, (8.0, 0.5, 4)),
        ("truncated", 3, 1, (2 + 0.5 * 4, 0.25, 3)),
        ("truncated", 3, 2, (4.0, 0.5, 3)),  # its own 8 lies in v(s_3) already
        ("truncated", 3, 3, (0.0, 1.0, 3)),
    ],
)
def test_by_hand(end, last_valued, start, expected):
    view = window(played([1.0, 2.0, 4.0, 8.0], end), 0, 5)
    assert n_step_return(view, start, 2, 0.5, last_valued=last_valued) == pytest.approx(expected)


@pytest.mark.parametrize("end", ["terminated", "truncated"])
def test_many_at_once_are_the_same_to_the_last_bit(end):
    """Windows of 1 to 9 known steps, unrolled 4 steps, with 5-step returns."""
    rng, unroll, td = np.random.default_rng(0), 4, 5
    rewards = rng.normal(size=(40, unroll + td)) * 10.0 ** rng.integers(-8, 8, size=(40, 9))
    known = rng.integers(1, unroll + td + 1, size=40)
    over = np.full(40, end == "terminated")
    sums, discounts, states = n_step_returns(rewards, known, over, unroll, td, 0.97)

    for row, m in enumerate(known):
        view = window(played(rewards[row, :m].tolist(), end), 0, unroll + td)
        for k in range(unroll):
            given = sums[row, k], discounts[row, k], states[row, k]
            want = n_step_return(view, k, td, 0.97, last_valued=m) if k < m else (0.0, 0.0, 0)
            assert given == want, (row, k)


def llm_advantages(segment: Segment, td_steps: int) -> dict[int, float]:
    settings = PolicySettings(td_steps=td_steps, discount_factor=0.99)
    buffer = PriorZeroGameBuffer(settings, 2, seed=0)
    buffer.push_game_segments([segment])
    return {s.request.body_ids[0]: s.advantage for s in buffer.sample_llm(100)}


@pytest.mark.parametrize("end", ["truncated", "terminated", "hang", "running"])
def test_perfect_values_give_no_advantage_even_where_the_last_step_earns(end):
    """The last of six steps earns 10; every value is the true return of its state."""
    rewards = [0.0] * 5 + [10.0]
    values = [10.0 * 0.99 ** (5 - t) for t in range(6)]
    advantages = llm_advantages(played(rewards, end, values, values), td_steps=5)
    assert advantages == pytest.approx({t: 0.0 for t in range(6)}, abs=1e-9)


def test_at_a_cut_the_last_searched_state_ends_the_return():
    values = [5.0, 6.0, 7.0]
    advantages = llm_advantages(played([1.0, 2.0, 4.0], "truncated", values), td_steps=5)
    assert advantages == pytest.approx(
        {0: 1 + 0.99 * 2 + 0.99**2 * 7, 1: 2 + 0.99 * 7, 2: 7.0}, abs=1e-9
    )
