"""What a root looks back on, per environment."""

from __future__ import annotations

import numpy as np
import torch

from priorzero.search.context import ContextStore


def vector(x):
    return np.full(2, x, dtype=np.float32)


def play(store, env_id, steps, base=0):
    """steps observations base, base + 1, … with actions 100 + step between them; the last one has
    no action yet.
    """
    for i in range(steps):
        store.observe(env_id, vector(base + i))
        if i < steps - 1:
            store.act(env_id, 100 + base + i)


def test_newest_steps_right_padded_per_environment():
    store = ContextStore(3, 2)
    play(store, 7, 5)
    play(store, 3, 1, base=50)
    play(store, 4, 2, base=70)
    observations, actions, lengths = store.batch([3, 7, 4], "cpu")
    assert lengths.tolist() == [1, 3, 2]
    assert observations[..., 0].tolist() == [[50, 0, 0], [2, 3, 4], [70, 71, 0]]
    assert actions.tolist() == [[0, 0, 0], [102, 103, 0], [170, 0, 0]]
    assert observations.dtype == torch.float32 and actions.dtype == torch.int64


def test_action_and_observation_stay_aligned_while_the_window_slides():
    store = ContextStore(3, 2)
    for i in range(9):
        store.observe(0, vector(i))
        observations, actions, lengths = store.batch([0], "cpu")
        n = int(lengths[0])
        assert n == min(i + 1, 3)
        seen = observations[0, :n, 0].int().tolist()
        assert seen == list(range(i - n + 1, i + 1))
        assert actions[0, : n - 1].tolist() == [100 + s for s in seen[:-1]]
        store.act(0, 100 + i)


def test_a_context_of_one_step_keeps_no_action():
    store = ContextStore(1, 2)
    play(store, 0, 4)
    observations, actions, lengths = store.batch([0], "cpu")
    assert observations.shape == (1, 1, 2) and observations[0, 0, 0] == 3
    assert lengths.tolist() == [1] and actions.shape == (1, 1)


def test_reset_forgets_one_environment_or_all():
    store = ContextStore(3, 2)
    play(store, 0, 3)
    play(store, 1, 3, base=10)
    store.reset(0)
    store.observe(0, vector(99))
    observations, _, lengths = store.batch([0, 1], "cpu")
    assert (
        lengths.tolist() == [1, 3] and observations[0, 0, 0] == 99 and observations[1, 2, 0] == 12
    )
    store.reset()
    store.observe(1, vector(5))
    assert store.batch([1], "cpu")[2].tolist() == [1]
