"""The world model's batches, and the pure function that makes one row of one.

Letters: `B` rows, `T` unroll steps, `n` bootstrap steps (td_steps), `E` embedding dimension, `V`
vocabulary size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from priorzero.data.returns import n_step_return
from priorzero.data.segment import Window


@dataclass(frozen=True, eq=False)
class WorldModelBatch:
    """What one update of the world model reads.

    The n-step value target of step k is returns[k] + discounts[k] * v(s), where s is state
    bootstrap_index[k] of the row's bootstrap window, a stretch of the same episode.

    Attributes:
        observations: `[B, T+1, E]` states of the unrolled window and the one after it.
        actions: `[B, T]` ids taken in them.
        rewards: `[B, T]` what they earned.
        policies: `[B, T, V]` target policies, 0 for what was not valid.
        mask_step: `[B, T]` 1.0 where the transition was played (policy, next latent).
        mask_value, mask_reward: `[B, T]` 1.0 there and in the absorbing steps after a true end,
            whose value and reward are zero.
        returns, discounts: `[B, T]` of the value targets.
        bootstrap_observations: `[B, T, E]` states of the bootstrap window.
        bootstrap_actions: `[B, T]` ids taken in them.
        bootstrap_index: `[B, T]` int64.
        search_values: `[B, T]` the search's own values of the bootstrap states where known, else
            nan.
        weights: `[B]` importance weights.
        indices: `[B]` of the rows' first transitions, for `update_priority`.
    """

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    policies: np.ndarray
    mask_step: np.ndarray
    mask_value: np.ndarray
    mask_reward: np.ndarray
    returns: np.ndarray
    discounts: np.ndarray
    bootstrap_observations: np.ndarray
    bootstrap_actions: np.ndarray
    bootstrap_index: np.ndarray
    search_values: np.ndarray
    weights: np.ndarray
    indices: np.ndarray

    @classmethod
    def zeros(
        cls, unroll: int, dim: int, vocabulary: int, weights: np.ndarray, indices: np.ndarray
    ) -> WorldModelBatch:
        """An empty batch for `fill_row`, one row per index."""
        assert len(weights) == len(indices)
        shape = (len(indices), unroll)

        def empty(*more: int, steps: int = unroll, dtype=np.float32) -> np.ndarray:
            return np.zeros((len(indices), steps, *more), dtype=dtype)

        return cls(
            observations=empty(dim, steps=unroll + 1),
            actions=empty(dtype=np.int64),
            rewards=empty(),
            policies=empty(vocabulary),
            mask_step=empty(),
            mask_value=empty(),
            mask_reward=empty(),
            returns=empty(),
            discounts=empty(),
            bootstrap_observations=empty(dim),
            bootstrap_actions=empty(dtype=np.int64),
            bootstrap_index=empty(dtype=np.int64),
            search_values=np.full(shape, np.nan, dtype=np.float32),
            weights=weights,
            indices=indices,
        )

    def __len__(self) -> int:
        return len(self.actions)


@dataclass(frozen=True, eq=False)
class LearnOutput:
    """What one update of the world model gives back.

    Attributes:
        metrics: scalars to log.
        priorities: `[B]` |value error| of each row's first step, for prioritised replay.
    """

    metrics: dict[str, float]
    priorities: np.ndarray


def fill_row(
    batch: WorldModelBatch,
    row: int,
    view: Window,
    unroll: int,
    td_steps: int,
    discount: float,
    filler_action: int,
) -> None:
    """Write one window into a row of a zeroed batch.

    With m steps known, step k < m bootstraps from state k + min(td_steps, m - k), unless that is
    the state after a true end, whose value is zero. Steps k >= m are absorbing after a true end and
    masked out otherwise.

    Args:
        view: Steps r_0.., at most unroll + td_steps of them.
        unroll: `T`.
        filler_action: The id fed to the model where no action was played.
    """
    known = len(view.steps)
    assert 1 <= known <= unroll + td_steps
    over = view.end == "terminated"

    for k in range(unroll + 1):
        batch.observations[row, k] = view.observation(k)

    # The bootstrap window begins where the first step's return ends.
    base = min(td_steps, known)
    for k in range(unroll):
        at = base + k
        batch.bootstrap_observations[row, k] = view.observation(at)
        batch.bootstrap_actions[row, k] = view.steps[at].action_id if at < known else filler_action

    for k in range(min(unroll, known)):
        step = view.steps[k]
        batch.actions[row, k] = step.action_id
        batch.rewards[row, k] = step.reward
        batch.policies[row, k, step.valid_ids] = step.target_policy
        batch.mask_step[row, k] = batch.mask_value[row, k] = batch.mask_reward[row, k] = 1.0

        # A network can value any state, so the last one known counts as well.
        target = n_step_return(view, k, td_steps, discount, last_valued=known)
        batch.returns[row, k] = target.reward_sum
        batch.discounts[row, k] = target.discount
        batch.bootstrap_index[row, k] = target.state - base
        if target.state < known:
            batch.search_values[row, k] = view.steps[target.state].root_value

    for k in range(known, unroll):
        batch.actions[row, k] = filler_action
        if over:
            batch.mask_value[row, k] = batch.mask_reward[row, k] = 1.0
