"""What a root looks back on, per episode, and how roots are batched."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from priorzero.search.context import EpisodeContext
from priorzero.search.roots import Root, batch_contexts


def vector(x):
    return np.full(2, x, dtype=np.float32)


def played(capacity, steps, base=0):
    """Observations base, base + 1, … with actions 100 + step between them; the last one has no
    action yet.
    """
    context = EpisodeContext(capacity)
    for i in range(steps):
        context.observe(vector(base + i))
        if i < steps - 1:
            context.act(100 + base + i)
    return context


def root(context):
    return Root(context.observations, context.actions, np.array([0]))


def test_roots_are_right_padded_to_the_longest():
    contexts = played(3, 1, base=50), played(3, 5), played(3, 2, base=70)
    observations, actions, lengths = batch_contexts([root(c) for c in contexts], "cpu")
    assert lengths.tolist() == [1, 3, 2]
    assert observations[..., 0].tolist() == [[50, 0, 0], [2, 3, 4], [70, 71, 0]]
    assert actions.tolist() == [[0, 0, 0], [102, 103, 0], [170, 0, 0]]
    assert observations.dtype == torch.float32 and actions.dtype == torch.int64


def test_action_and_observation_stay_aligned_while_the_window_slides():
    context = EpisodeContext(3)
    for i in range(9):
        context.observe(vector(i))
        seen = context.observations[:, 0].astype(int).tolist()
        assert seen == list(range(max(i - 2, 0), i + 1))
        assert context.actions.tolist() == [100 + s for s in seen[:-1]]
        context.act(100 + i)


def test_a_context_of_one_step_keeps_no_action():
    context = played(1, 4)
    assert context.observations.tolist() == [[3, 3]] and context.actions.tolist() == []


def test_what_was_handed_out_does_not_change_with_the_episode():
    context = played(3, 2)
    observations, actions = context.observations, context.actions
    context.act(9)
    context.observe(vector(9))
    assert observations[:, 0].tolist() == [0, 1] and actions.tolist() == [100]


def test_a_root_whose_parts_do_not_fit_is_refused():
    with pytest.raises(AssertionError):
        Root(np.zeros((2, 3), np.float32), np.array([]), np.array([1]))
    with pytest.raises(AssertionError):
        Root(np.zeros((1, 3), np.float32), np.array([]), np.array([1, 2]), np.zeros(3))
