"""The fused inference against the reference of `inference.py`, which is tested against LightZero's
own forward; in float64, so that what differs is not rounding.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from priorzero.world_model.fused import (
    FusedMemory,
    WeightCopies,
    fuse,
    inverse_transform,
    shape_of,
)
from priorzero.world_model.inference import SearchMemory, read_contexts

SIMULATIONS, ACTIONS, LENGTHS = 12, 8, [1, 3, 2, 3]


@pytest.fixture(params=["stable", "positional"])
def model(make_policy, randomise, request):
    """Both kinds of action table."""
    policy = make_policy(action_vocabulary=dict(kind=request.param))
    return randomise(policy.network, seed=1).double()


def contexts_of(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    longest = max(LENGTHS)
    return read_contexts(
        model,
        torch.randn(len(LENGTHS), longest, 6, generator=generator, dtype=torch.float64),
        torch.randint(ACTIONS, (len(LENGTHS), longest), generator=generator),
        torch.tensor(LENGTHS),
    )


def fused_memory(model, contexts, inner_actions=ACTIONS, batch=None, context=None):
    context = context or contexts.visible.shape[1]
    weights = fuse(model, inner_actions, context + 2 * SIMULATIONS - 1)
    batch = batch or len(contexts.visible)
    memory = FusedMemory(weights, shape_of(model), batch, context, SIMULATIONS)
    memory.begin(contexts)
    return memory, weights


def random_steps(batch, chain=False, seed=3):
    """Parents and actions, `[n, batch]` each: random trees, or one path as deep as can be."""
    rng = np.random.default_rng(seed)
    parents = [
        np.full(batch, s) if chain else rng.integers(0, s + 1, batch) for s in range(SIMULATIONS)
    ]
    actions = rng.integers(ACTIONS, size=(SIMULATIONS, batch))
    return torch.from_numpy(np.stack(parents)), torch.from_numpy(actions)


@pytest.mark.parametrize("chain", [False, True])
@torch.no_grad()
def test_equals_the_reference_node_by_node(model, scalar_of, chain):
    contexts = contexts_of(model)
    reference = SearchMemory(model, SIMULATIONS)
    reference.begin(contexts)
    memory, _ = fused_memory(model, contexts)

    values = []
    for simulation, (parents, actions) in enumerate(zip(*random_steps(4, chain), strict=True)):
        want = reference.expand(simulation, parents, actions)
        got = memory.expand(simulation, parents, actions)
        for ours, logits in ((got.rewards, want.reward_logits), (got.values, want.value_logits)):
            torch.testing.assert_close(ours, scalar_of(logits).view(-1), atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(got.logits, want.policy_logits[:, :ACTIONS], atol=1e-9, rtol=0)
        values.append(got.values)

    assert torch.stack(values).std(dim=0).min() > 0.01
    assert int(memory.clamped(4)) == reference.positions_clamped
    assert reference.positions_clamped > 0


@torch.no_grad()
def test_padding_of_rows_and_contexts_changes_nothing(model):
    contexts = contexts_of(model)
    memory, _ = fused_memory(model, contexts)
    padded, _ = fused_memory(model, contexts, batch=7, context=11)
    parents, actions = random_steps(7)
    for simulation in range(SIMULATIONS):
        a = memory.expand(simulation, parents[simulation, :4], actions[simulation, :4])
        b = padded.expand(simulation, parents[simulation], actions[simulation])
        torch.testing.assert_close(b.values[:4], a.values, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(b.logits[:4], a.logits, atol=1e-10, rtol=0)
        assert torch.isfinite(b.logits).all()


@torch.no_grad()
def test_weights_are_copies_that_are_refreshed_in_place(model, randomise):
    """A captured graph reads one place in memory for good."""
    contexts = contexts_of(model)
    memory, weights = fused_memory(model, contexts, inner_actions=5)
    step = torch.tensor([0] * 4), torch.tensor([1, 2, 3, 4])
    first = memory.expand(0, *step)
    copies = WeightCopies(weights, model)
    assert first.logits.shape == (4, 5)

    randomise(model, seed=2)
    memory.begin(contexts)
    torch.testing.assert_close(memory.expand(0, *step).logits, first.logits, atol=0, rtol=0)

    copies.refresh()
    memory.begin(contexts)
    fresh, _ = fused_memory(model, contexts, inner_actions=5)
    second = memory.expand(0, *step).logits
    torch.testing.assert_close(second, fresh.expand(0, *step).logits, atol=0, rtol=0)
    assert (second - first.logits).abs().max() > 0.01


def test_the_transform_undoes_the_scaling_of_values():
    """h(x) = sign(x) (sqrt(|x| + 1) - 1) + 0.001 x (arXiv:1805.11593)."""
    x = torch.tensor([-350.0, -1.0, -1e-3, 0.0, 0.5, 12.0, 200.0], dtype=torch.float64)
    scaled = torch.sign(x) * (torch.sqrt(x.abs() + 1) - 1) + 0.001 * x
    torch.testing.assert_close(inverse_transform(scaled), x, atol=1e-9, rtol=1e-9)
