"""The batches the buffer hands out, and the pure function that makes one row of a world-model
batch.

Letters: `B` rows, `T` unroll steps, `n` bootstrap steps (td_steps), `E` embedding dimension, `V`
vocabulary size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from priorzero.data.segment import Window
from priorzero.types import TextState


@dataclass
class WorldModelBatch:
    """A world-model batch.

    observations `[B, T+1, E]`, actions `[B, T]`, rewards `[B, T]`, policies `[B, T, V]` (visit
    distributions). masks `[B, T]` float: mask_step 1 where the transition was played (policy, next
    latent), mask_value and mask_reward also 1 in the absorbing steps after a true end, whose value
    and reward are zero. n-step value target of step k: returns[k] + discounts[k] * v(state
    bootstrap_index[k] of the bootstrap window); bootstrap_observations `[B, T, E]`,
    bootstrap_actions `[B, T]`, bootstrap_index `[B, T]`; search_values `[B, T]` are the search's
    own values of those states where known, else nan. weights `[B]`, indices `[B]` for the
    priorities. new_priorities `[B]` is filled by the policy's update and goes back into the buffer.
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
    new_priorities: np.ndarray | None = field(default=None)

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


@dataclass(frozen=True)
class LLMSample:
    """One decision at text level, for the LLM's SFT (target_policy) and RFT (advantage).

    target_policy `[A]` visit distribution and behaviour `[A]` sampling probabilities over
    `state.valid_actions`; action_index the executed one; target_value: n-step return bootstrapped
    with the search's value; advantage: target_value - predicted_value; prior_logprobs: token
    log-probabilities when it was scored, prior_version by whom.
    """

    state: TextState
    valid_actions: tuple[str, ...]
    target_policy: np.ndarray
    behaviour: np.ndarray
    action_index: int
    target_value: float
    advantage: float
    prior_logprobs: tuple[tuple[float, ...], ...] | None
    prior_version: int
    reasoning: str = ""


def fill_row(
    batch: WorldModelBatch,
    row: int,
    view: Window,
    unroll: int,
    td_steps: int,
    discount: float,
    filler_action: int,
) -> None:
    """Write one window (steps r_0.., at most unroll + td_steps of them) into row `row` of a zeroed
    batch.

    With m steps known, step k < m has n_k = min(td_steps, m - k) rewards in its return and
    bootstraps from state k + n_k, unless that is the state after a true end, whose value is zero.
    Steps k >= m are absorbing after a true end and masked out otherwise. `filler_action` is the id
    fed to the model where no action was played.
    """
    m = len(view.steps)
    rewards = [s.reward for s in view.steps]
    base = min(td_steps, m)
    for k in range(unroll + 1):
        batch.observations[row, k] = view.observation(k)
    for k in range(unroll):
        at = base + k
        batch.bootstrap_observations[row, k] = view.observation(at)
        batch.bootstrap_actions[row, k] = view.steps[at].action_id if at < m else filler_action
        if k >= m:
            batch.actions[row, k] = filler_action
            if view.end == "terminated":
                batch.mask_value[row, k] = batch.mask_reward[row, k] = 1.0
            continue
        step = view.steps[k]
        batch.actions[row, k] = step.action_id
        batch.rewards[row, k] = step.reward
        batch.policies[row, k, step.valid_ids] = step.visit_distribution
        batch.mask_step[row, k] = batch.mask_value[row, k] = batch.mask_reward[row, k] = 1.0
        span = min(td_steps, m - k)
        batch.returns[row, k] = sum(discount**i * rewards[k + i] for i in range(span))
        end = k + span
        batch.discounts[row, k] = 0.0 if (end == m and view.end == "terminated") else discount**span
        batch.bootstrap_index[row, k] = end - base
        batch.search_values[row, k] = view.steps[end].root_value if end < m else np.nan
