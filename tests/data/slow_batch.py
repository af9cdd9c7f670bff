"""The slow reference of the world model's batches: one row after the other, from segments.

It reads what the buffer's segments hold, cut by `window`, one step at a time, and draws from a
generator in the buffer's order.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from priorzero.data.batch import Revisit, find_revisits
from priorzero.data.returns import n_step_return
from priorzero.data.segment import Segment, Window, window
from priorzero.settings.policy import PolicySettings

Row = dict[str, np.ndarray]


def draw(
    rng: np.random.Generator, first: int, priorities: np.ndarray, count: int, s: PolicySettings
) -> tuple[np.ndarray, np.ndarray]:
    """Running numbers and importance weights, over all transitions held."""
    if not s.use_priority:
        ones = np.ones(count, dtype=np.float32)
        return first + rng.integers(len(priorities), size=count), ones
    scaled = priorities**s.priority_prob_alpha
    probability = scaled / scaled.sum()
    chosen = rng.choice(len(priorities), size=count, p=probability)
    weights = (len(priorities) * probability[chosen]) ** -s.priority_prob_beta
    return first + chosen, (weights / weights.max()).astype(np.float32)


def slow_batch(
    rng: np.random.Generator,
    places: Mapping[int, tuple[Segment, int]],
    indices: np.ndarray,
    s: PolicySettings,
    dim: int,
) -> tuple[Row, list[Revisit]]:
    """The arrays of `WorldModelBatch` but weights and indices, and its revisits.

    Args:
        places: running number of a transition -> (segment, position).
    """
    reach = max(s.burn_in, s.context_steps - 1 if s.reanalyse_ratio else 0)
    span = s.num_unroll_steps + s.td_steps
    views = [window(*places[int(i)], span, reach) for i in indices]
    rows = [_row(view, int(rng.choice(view.steps[-1].valid_ids)), s, dim) for view in views]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    if not s.reanalyse_ratio:
        return batch, []

    count = max(1, round(s.reanalyse_ratio * len(views)))
    chosen = rng.choice(len(views), size=count, replace=False)
    revisits = find_revisits(
        {int(row): views[row] for row in chosen},
        s.num_unroll_steps,
        s.td_steps,
        s.discount_factor,
        s.context_steps,
        with_values=s.value_bootstrap == "search",
    )
    return batch, revisits


def _row(view: Window, filler: int, s: PolicySettings, dim: int) -> Row:
    unroll, known = s.num_unroll_steps, len(view.steps)
    length, capacity = s.burn_in + unroll, s.action_vocabulary.capacity
    base = min(s.td_steps, known)
    observations, actions, start = _sequence(view, 0, s.burn_in, length + 1, filler, dim)
    other, other_actions, other_start = _sequence(view, base, s.burn_in, length, filler, dim)

    def zeros(*shape: int) -> np.ndarray:
        return np.zeros((unroll, *shape), dtype=np.float32)

    row = dict(
        observations=observations,
        actions=actions[:-1],
        starts=np.int64(start),
        rewards=zeros(),
        policies=zeros(capacity),
        mask_step=zeros(),
        mask_value=zeros(),
        mask_reward=zeros(),
        returns=zeros(),
        discounts=zeros(),
        bootstrap_observations=other,
        bootstrap_actions=other_actions,
        bootstrap_index=np.zeros(unroll, dtype=np.int64),
        search_values=np.full(unroll, np.nan, dtype=np.float32),
    )
    for k in range(min(unroll, known)):
        step = view.steps[k]
        row["rewards"][k] = step.reward
        row["policies"][k, step.valid_ids] = step.target_policy
        for mask in ("mask_step", "mask_value", "mask_reward"):
            row[mask][k] = 1.0

        target = n_step_return(view, k, s.td_steps, s.discount_factor, last_valued=known)
        row["returns"][k], row["discounts"][k] = target.reward_sum, target.discount
        in_own = s.burn_in > 0 and start + target.state < length
        row["bootstrap_index"][k] = (
            length + start + target.state if in_own else other_start + target.state - base
        )
        if target.state < known:
            row["search_values"][k] = view.steps[target.state].root_value
    if view.end == "terminated":
        row["mask_value"][known:] = row["mask_reward"][known:] = 1.0
    return row


def _sequence(
    view: Window, first: int, burn_in: int, length: int, filler: int, dim: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Observations and actions from s_first on, behind its context; and where s_first stands."""
    observations, actions = np.zeros((length, dim), np.float32), np.zeros(length, np.int64)
    context = view.history(first, burn_in)
    for position in range(length):
        at = first + position - len(context)
        if position < len(context):
            step = context[position]
            observations[position], actions[position] = step.observation, step.action_id
        else:
            observations[position] = view.observation(at)
            actions[position] = view.steps[at].action_id if at < len(view.steps) else filler
    return observations, actions, len(context)
