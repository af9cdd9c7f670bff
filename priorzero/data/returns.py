"""The n-step return, of one step and of many at once.

`n_step_return` is for the buffer's decisions for the LLM, which bootstrap with stored root values,
and for the steps that reanalysis visits; `n_step_returns` for the world model's batches.

Letters: `B` rows, `T` unroll steps, `L` steps of a window, n = td_steps.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from priorzero.data.segment import Window


class NStepReturn(NamedTuple):
    """What a value target is made of: target = reward_sum + discount * v(s_state).

    `discount` is 0 where nothing is to be expected from that state, because the game has ended.
    """

    reward_sum: float
    discount: float
    state: int


def n_step_return(
    view: Window, start: int, td_steps: int, discount: float, *, last_valued: int
) -> NStepReturn:
    """The n-step return of state s_start of a window with rewards r_0..r_{m-1}.

        n = min(td_steps, last - start)
        G = sum_{i<n} discount^i r_{start+i} + discount^n v(s_{start+n})

    where `last` is the last state whose value is known: s_m after a true end (its value is 0), else
    `last_valued`. A value holds what its state earns from then on, so a return ends with the reward
    before the state it bootstraps from, and no reward counts twice.

    Args:
        view: steps of one episode, `m` of them.
        start: 0 <= start < m.
        td_steps: most rewards in a return.
        discount: per step.
        last_valued: last state s_0..s_m that the caller has a value of, where the episode does not
            end in s_m: m for a network, which can look at any state; m - 1 for values of the
            search, which s_m may never have seen.
    """
    steps = len(view.steps)
    assert 0 <= start < steps and td_steps >= 1 and last_valued in (steps - 1, steps)

    over = view.end == "terminated"
    span = min(td_steps, (steps if over else last_valued) - start)
    reward_sum = sum(discount**i * view.steps[start + i].reward for i in range(span))
    state = start + span
    return NStepReturn(reward_sum, 0.0 if over and state == steps else discount**span, state)


class NStepReturns(NamedTuple):
    """`NStepReturn` of the first `T` steps of `B` windows, `[B, T]` each; all 0 from r_m on.

    `reward_sum` and `discount` are float64.
    """

    reward_sum: np.ndarray
    discount: np.ndarray
    state: np.ndarray


def n_step_returns(
    rewards: np.ndarray,
    known: np.ndarray,
    over: np.ndarray,
    unroll: int,
    td_steps: int,
    discount: float,
) -> NStepReturns:
    """`n_step_return` of many steps, with last_valued = m: to the last bit the same sums.

    Args:
        rewards: `[B, L]` float64 of r_0..; what stands from r_m on is not read.
        known: `[B]` m. over: `[B]` bool, whether the episode truly ended with r_{m-1}.
        unroll: `T`, with T + n <= L.
    """
    assert rewards.shape[1] >= unroll + td_steps
    steps = np.arange(unroll)
    span = np.clip(known[:, None] - steps, 0, td_steps)

    # In the order of `n_step_return`: another one would round differently.
    powers = np.array([discount**i for i in range(td_steps + 1)])
    reward_sum = np.zeros(span.shape)
    for i in range(td_steps):
        reward_sum += np.where(i < span, powers[i] * rewards[:, i : i + unroll], 0.0)

    inside = span > 0
    state = np.where(inside, steps + span, 0)
    ended = over[:, None] & (state == known[:, None])
    return NStepReturns(reward_sum, np.where(inside & ~ended, powers[span], 0.0), state)
