"""The world model's batches, and the pure function that makes one row of one.

With burn-in a row does not start cold: its window stands behind up to `c` real steps that only
serve as context, as the root of a search stands behind the steps before it. Both begin at the
network's position 0 with the oldest of them, so that a window at an episode's beginning has fewer.

Letters: `B` rows, `T` unroll steps, `c` steps of burn-in, `W` = c + T steps the network reads, `n`
bootstrap steps (td_steps), `E` embedding dimension, `V` vocabulary size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from priorzero.data.returns import n_step_return
from priorzero.data.segment import StepRecord, Window


@dataclass(frozen=True, eq=False)
class Revisit:
    """A step of a batch that is to be searched anew.

    Attributes:
        step: as it was played.
        context: at most context_steps - 1 steps before it, oldest first: what its root looked back
            on.
        policy_of: rows and steps `(b, k)` whose policy target it is.
        value_of: rows and steps that bootstrap from it.
    """

    step: StepRecord
    context: list[StepRecord]
    policy_of: list[tuple[int, int]] = field(default_factory=list)
    value_of: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class WorldModelBatch:
    """What one update of the world model reads.

    The n-step value target of step k is returns[k] + discounts[k] * v(s), where s is found at
    bootstrap_index[k] of the row's bootstrap sequence, a stretch of the same episode, or with
    burn-in from W on in its own sequence (see `fill_row`).

    Attributes:
        observations: `[B, W+1, E]` a row's own sequence: its context, the unrolled window and what
            follows.
        actions: `[B, W]` ids taken in them.
        starts: `[B]` int64, 0..c, steps of context: where the window stands in the sequence.
        rewards: `[B, T]` what they earned.
        policies: `[B, T, V]` target policies, 0 for what was not valid.
        mask_step: `[B, T]` 1.0 where the transition was played (policy, next latent).
        mask_value, mask_reward: `[B, T]` 1.0 there and in the absorbing steps after a true end,
            whose value and reward are zero.
        returns, discounts: `[B, T]` of the value targets.
        bootstrap_observations: `[B, W, E]` the bootstrap sequence: context, and the `T` states from
            the one on where the first step's return ends.
        bootstrap_actions: `[B, W]` ids taken in them.
        bootstrap_index: `[B, T]` int64, 0..2W-1.
        search_values: `[B, T]` the search's own values of the bootstrap states where known, else
            nan.
        weights: `[B]` importance weights.
        indices: `[B]` of the rows' first transitions, for `update_priority`.
        revisits: steps to be searched anew before the update; empty without reanalysis.
    """

    observations: np.ndarray
    actions: np.ndarray
    starts: np.ndarray
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
    revisits: list[Revisit] = field(default_factory=list)

    @classmethod
    def zeros(
        cls,
        unroll: int,
        burn_in: int,
        dim: int,
        vocabulary: int,
        weights: np.ndarray,
        indices: np.ndarray,
    ) -> WorldModelBatch:
        """An empty batch for `fill_row`, one row per index."""
        assert len(weights) == len(indices)
        shape, length = (len(indices), unroll), burn_in + unroll

        def empty(*more: int, steps: int = unroll, dtype=np.float32) -> np.ndarray:
            return np.zeros((len(indices), steps, *more), dtype=dtype)

        return cls(
            observations=empty(dim, steps=length + 1),
            actions=empty(steps=length, dtype=np.int64),
            starts=np.zeros(len(indices), dtype=np.int64),
            rewards=empty(),
            policies=empty(vocabulary),
            mask_step=empty(),
            mask_value=empty(),
            mask_reward=empty(),
            returns=empty(),
            discounts=empty(),
            bootstrap_observations=empty(dim, steps=length),
            bootstrap_actions=empty(steps=length, dtype=np.int64),
            bootstrap_index=empty(dtype=np.int64),
            search_values=np.full(shape, np.nan, dtype=np.float32),
            weights=weights,
            indices=indices,
        )

    @property
    def burn_in(self) -> int:
        """`c`, most steps of context of a row."""
        return self.actions.shape[1] - self.rewards.shape[1]

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

    With burn-in the bootstrap state is read from the row's own sequence, as far as that reaches,
    and only beyond from the bootstrap sequence: seen with less history than the step itself has,
    its value would average over what the step can still tell apart.

    Args:
        view: steps r_0.., at most unroll + td_steps of them, and the context before them.
        unroll: `T`.
        filler_action: the id fed to the model where no action was played.
    """
    known, length = len(view.steps), batch.burn_in + unroll
    assert 1 <= known <= unroll + td_steps
    over = view.end == "terminated"

    start = _write_sequence(
        batch.observations[row], batch.actions[row], view, 0, batch.burn_in, filler_action
    )
    batch.starts[row] = start

    # The bootstrap window begins where the first step's return ends.
    base = min(td_steps, known)
    bootstrap_start = _write_sequence(
        batch.bootstrap_observations[row],
        batch.bootstrap_actions[row],
        view,
        base,
        batch.burn_in,
        filler_action,
    )

    for k in range(min(unroll, known)):
        step = view.steps[k]
        batch.rewards[row, k] = step.reward
        batch.policies[row, k, step.valid_ids] = step.target_policy
        batch.mask_step[row, k] = batch.mask_value[row, k] = batch.mask_reward[row, k] = 1.0

        # A network can value any state, so the last one known counts as well.
        target = n_step_return(view, k, td_steps, discount, last_valued=known)
        batch.returns[row, k] = target.reward_sum
        batch.discounts[row, k] = target.discount
        in_own = batch.burn_in > 0 and start + target.state < length
        batch.bootstrap_index[row, k] = (
            length + start + target.state if in_own else bootstrap_start + target.state - base
        )
        if target.state < known:
            batch.search_values[row, k] = view.steps[target.state].root_value

    if over:
        batch.mask_value[row, known:] = batch.mask_reward[row, known:] = 1.0


def find_revisits(
    views: Mapping[int, Window],
    unroll: int,
    td_steps: int,
    discount: float,
    context_steps: int,
    *,
    with_values: bool,
) -> list[Revisit]:
    """What is to be searched anew for these rows of a batch, each step once.

    Args:
        views: by row: the windows they were made of, with context_steps - 1 steps before them.
        with_values: the states that the rows bootstrap from as well.
    """
    found: dict[StepRecord, Revisit] = {}

    def visit(view: Window, index: int) -> Revisit:
        step = view.steps[index]
        return found.setdefault(step, Revisit(step, view.history(index, context_steps - 1)))

    for row, view in views.items():
        known = len(view.steps)
        for k in range(min(unroll, known)):
            visit(view, k).policy_of.append((row, k))
            target = n_step_return(view, k, td_steps, discount, last_valued=known)
            if with_values and target.state < known:
                visit(view, target.state).value_of.append((row, k))
    return list(found.values())


def _write_sequence(
    observations: np.ndarray,
    actions: np.ndarray,
    view: Window,
    first: int,
    burn_in: int,
    filler_action: int,
) -> int:
    """Fill a row's sequence with the states from s_first on, behind at most `burn_in` steps.

    Beyond the last known state that one is repeated, and the filler action.

    Args:
        observations: `[n, E]`, written to. actions: `[m]`, written to.

    Returns:
        where s_first stands in the sequence.
    """
    context = view.history(first, burn_in)
    for position, step in enumerate(context):
        observations[position], actions[position] = step.observation, step.action_id

    start = len(context)
    for position in range(start, len(observations)):
        observations[position] = view.observation(first + position - start)
    for position in range(start, len(actions)):
        at = first + position - start
        known = at < len(view.steps)
        actions[position] = view.steps[at].action_id if known else filler_action
    return start
