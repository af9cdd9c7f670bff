"""The world model's batches, and the function that gathers one from the stored steps.

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

from priorzero.data.returns import n_step_return, n_step_returns
from priorzero.data.segment import StepRecord, Window
from priorzero.data.store import StepStore, Windows


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
    burn-in from W on in its own sequence (see `gather_batch`).

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


def gather_batch(
    store: StepStore,
    windows: Windows,
    weights: np.ndarray,
    filler_actions: np.ndarray,
    *,
    unroll: int,
    burn_in: int,
    td_steps: int,
    discount: float,
    vocabulary: int,
) -> WorldModelBatch:
    """A batch whose rows are these windows.

    With m steps known, step k < m bootstraps from state k + min(td_steps, m - k), unless that is
    the state after a true end, whose value is zero. Steps k >= m are absorbing after a true end and
    masked out otherwise.

    With burn-in the bootstrap state is read from the row's own sequence, as far as that reaches,
    and only beyond from the bootstrap sequence: seen with less history than the step itself has,
    its value would average over what the step can still tell apart.

    Args:
        windows: of unroll + td_steps steps.
        weights: `[B]` float32 importance weights.
        filler_actions: `[B]` ids fed to the model where no action was played.
        unroll: `T`.
        burn_in: `c`.
        vocabulary: `V`.
    """
    known, length, reach = windows.known, burn_in + unroll, unroll + td_steps
    assert windows.steps.shape == (len(weights), reach)
    played = np.arange(unroll) < known[:, None]
    mask = played.astype(np.float32)
    mask_absorbing = (played | windows.over[:, None]).astype(np.float32)

    # A row's own sequence begins with its oldest context, its bootstrap sequence with the context
    # of the state where the first step's return ends.
    base = np.minimum(td_steps, known)
    behind = np.minimum(windows.context + base, burn_in)
    own = _columns(burn_in - windows.context, length + 1)
    other = _columns(burn_in + base - behind, length)

    rewards = store.rewards(windows.steps)
    target = n_step_returns(rewards, known, windows.over, unroll, td_steps, discount)
    in_own = (windows.context[:, None] + target.state < length) & (burn_in > 0)
    index = np.where(
        in_own,
        length + windows.context[:, None] + target.state,
        (behind - base)[:, None] + target.state,
    )
    valued = played & (target.state < known[:, None])
    state_steps = np.take_along_axis(windows.steps, np.minimum(target.state, reach - 1), axis=1)

    return WorldModelBatch(
        observations=_observations(store, windows, own, burn_in),
        actions=_actions(windows, own[:, :-1], burn_in, filler_actions),
        starts=windows.context,
        rewards=np.where(played, rewards[:, :unroll], 0.0).astype(np.float32),
        policies=_policies(store, windows, played, vocabulary),
        mask_step=mask,
        mask_value=mask_absorbing,
        mask_reward=mask_absorbing.copy(),
        returns=target.reward_sum.astype(np.float32),
        discounts=target.discount.astype(np.float32),
        bootstrap_observations=_observations(store, windows, other, burn_in),
        bootstrap_actions=_actions(windows, other, burn_in, filler_actions),
        bootstrap_index=np.where(played, index, 0),
        search_values=np.where(valued, store.root_values(state_steps), np.float32(np.nan)),
        weights=weights,
        indices=windows.steps[:, 0].copy(),
    )


def _columns(first: np.ndarray, length: int) -> np.ndarray:
    """`[B]` -> `[B, length]`: as many columns of `Windows.states` from each `first` on."""
    return first[:, None] + np.arange(length)


def _observations(
    store: StepStore, windows: Windows, columns: np.ndarray, burn_in: int
) -> np.ndarray:
    """`[B, n, E]` at these columns; beyond the last known state that one is repeated."""
    end = (burn_in + windows.known)[:, None]
    states = np.take_along_axis(windows.states, np.minimum(columns, end), axis=1)
    return store.observations(states)


def _actions(
    windows: Windows, columns: np.ndarray, burn_in: int, filler_actions: np.ndarray
) -> np.ndarray:
    """`[B, n]` int64 at these columns; beyond the last known step the filler action."""
    end = (burn_in + windows.known)[:, None]
    actions = np.take_along_axis(windows.actions, np.minimum(columns, end - 1), axis=1)
    return np.where(columns < end, actions, filler_actions[:, None]).astype(np.int64)


def _policies(
    store: StepStore, windows: Windows, played: np.ndarray, vocabulary: int
) -> np.ndarray:
    """`[B, T, V]` float32 target policies of the steps that were played."""
    policies = np.zeros((*played.shape, vocabulary), dtype=np.float32)
    steps = windows.steps[:, : played.shape[1]][played]
    which, ids, targets = store.targets(steps)
    policies.reshape(-1, vocabulary)[np.flatnonzero(played)[which], ids] = targets
    return policies


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
