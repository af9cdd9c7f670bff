"""The fused search on the CPU against the plain one: the same choices on random trees, ties
included, and on roots of a network; and who searches.
"""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from priorzero.plugins import load
from priorzero.search.fused.cpu import CompiledTree, CpuSimulations
from priorzero.search.planner import simulate
from priorzero.types import PriorZeroError
from priorzero.world_model.inference import SearchMemory, read_contexts
from tests.search.games import POLICIES, Game, begin, grow, random_roots


def compiled(policy: str, search) -> CompiledTree:
    return CompiledTree(search, load("priorzero.search.root_policies", policy).fused(search))


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(4))
def test_the_same_trees_as_the_plain_search(policy, seed, coarse):
    game, simulations = Game(seed, actions=[3, 9, 40, 256][seed], coarse=coarse), 40
    plain, fused = (begin(policy, game, simulations, noisy=seed % 2 == 1) for _ in range(2))
    fused_tree = compiled(policy, fused)

    paths = grow(plain, game, simulations)
    assert grow(fused_tree, game, simulations) == paths
    assert max(len(path) for nodes in paths for path in nodes) > 3

    for name in ("child", "visits", "returns", "node_visits", "node_returns", "low", "high"):
        a, b = getattr(plain.tree.arrays, name), getattr(fused.tree.arrays, name)
        np.testing.assert_array_equal(a, b, err_msg=name)
    for a, b in zip(plain.results(), fused_tree.results(), strict=True):
        np.testing.assert_array_equal(a.visit_counts, b.visit_counts)
        np.testing.assert_array_equal(a.target_policy, b.target_policy)
        assert (a.value, a.choice) == (b.value, b.choice)


# ---- with a network ------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_a_networks_roots_in_float64(policy, make_policy, randomise, scalar_of):
    """Rounding apart, plain and fused are one search: the same visits, values to ten digits."""
    simulations, actions, batch = 30, 8, 5  # as many roots as `begin` makes
    model = randomise(make_policy().network, seed=3).double()
    generator = torch.Generator().manual_seed(0)
    contexts = read_contexts(
        model,
        torch.randn(batch, 3, 6, generator=generator, dtype=torch.float64),
        torch.randint(actions, (batch, 3), generator=generator),
        torch.tensor([1 + row % 3 for row in range(batch)]),
    )
    game = Game(1, actions, coarse=False)
    plain, fused = (begin(policy, game, simulations, noisy=True) for _ in range(2))

    memory = SearchMemory(model, simulations)
    memory.begin(contexts)
    results = simulate(plain, memory, simulations, actions, scalar_of, "cpu")
    rule = load("priorzero.search.root_policies", policy).fused(fused)
    clamped = CpuSimulations(model, simulations).run(contexts, fused, rule, actions)

    assert clamped == memory.positions_clamped
    for a, b in zip(results, fused.results(), strict=True):
        np.testing.assert_array_equal(a.visit_counts, b.visit_counts)
        np.testing.assert_allclose(a.target_policy, b.target_policy, atol=1e-8)
        assert b.value == pytest.approx(a.value, abs=1e-9)
    assert plain.tree.arrays.low.std() > 0.01


@pytest.mark.parametrize("policy", POLICIES)
def test_the_policy_plans_alike_with_both(policy, make_policy, randomise):
    """In float32, through the planner, with noise: values to four digits, and so the same visits
    but where two scores are that close."""
    roots = random_roots(24, 3, 8, seed=5)
    plans = {}
    for backend in ("plain", "auto"):
        made = make_policy(root_policy=policy, search_backend=backend, num_simulations=24)
        randomise(made.network, seed=4)
        outputs = made.collect_mode.forward(roots, 1.0, 0)
        plans[backend] = outputs, made.positions_clamped

    (plain, clamped), (fused, fused_clamped) = plans["plain"], plans["auto"]
    equal = [
        np.array_equal(a.visit_counts, b.visit_counts) for a, b in zip(plain, fused, strict=True)
    ]
    assert np.mean(equal) > 0.9 and fused_clamped == pytest.approx(clamped, rel=0.05)
    for a, b, same in zip(plain, fused, equal, strict=True):
        assert b.predicted_value == a.predicted_value
        if same:
            assert b.root_value == pytest.approx(a.root_value, abs=2e-3)
            np.testing.assert_allclose(a.target_policy, b.target_policy, atol=2e-2)


def test_updates_of_the_network_reach_the_next_search(make_policy, randomise):
    made, roots = make_policy(num_simulations=8), random_roots(4, 3, 8, seed=6)
    randomise(made.network, seed=4)
    first = made.eval_mode.forward(roots, 0)
    with torch.no_grad():
        head = made.network.world_model.head_rewards.head_module[2]
        head.bias += torch.linspace(0.0, 3.0, len(head.bias))  # rewards alone: roots look alike
    second = made.eval_mode.forward(roots, 0)
    for a, b in zip(first, second, strict=True):
        assert a.predicted_value == b.predicted_value and b.root_value > a.root_value + 0.1


# ---- who searches --------------------------------------------------------------------------------


def test_a_root_policy_without_a_fused_form_says_so(make_policy, caplog):
    with pytest.raises(PriorZeroError, match="'lightzero' has no fused form: take search_backend"):
        make_policy(root_policy="lightzero", search_backend="fused")

    with caplog.at_level(logging.INFO, logger="priorzero.search.planner"):
        made = make_policy(root_policy="lightzero")
        for _ in range(2):
            made.eval_mode.forward(random_roots(2, 3, 8, seed=1), 0)
    said = [r.message for r in caplog.records if "fused" in r.message]
    assert said == ["root policy lightzero has no fused form: plain search"]
