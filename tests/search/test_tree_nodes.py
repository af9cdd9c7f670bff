"""The tree that is handed out, against its own search replayed move by move."""

from __future__ import annotations

import numpy as np
import pytest

from priorzero.plugins import load
from priorzero.search.root_prior import RootPrior, log_softmax
from priorzero.search.roots import Root
from priorzero.settings.policy import PolicySettings

SIMULATIONS, WIDTH, DISCOUNT = 24, 5, 0.9


@pytest.mark.parametrize("root_policy", ["puct", "gumbel"])
def test_the_nodes_are_those_of_the_search(root_policy):
    rng = np.random.default_rng(3)
    settings = PolicySettings(num_simulations=SIMULATIONS, discount_factor=DISCOUNT)
    valid = [np.array([0, 2, 4]), np.array([1, 3])]
    roots = [Root(np.zeros((1, 2), np.float32), np.zeros(0, np.int64), ids) for ids in valid]
    logs = [log_softmax(rng.normal(size=len(ids))) for ids in valid]
    priors = [RootPrior(log, log, None, 0.0) for log in logs]
    values = rng.normal(size=2)
    begin = load("priorzero.search.root_policies", root_policy).begin
    tree = begin(roots, priors, values, WIDTH, settings, None)

    told = []  # per simulation: parents, actions, rewards, values, probabilities
    for _ in range(SIMULATIONS):
        parents, actions = (a.copy() for a in tree.select())
        rewards, leaf, logits = rng.normal(size=2), rng.normal(size=2), rng.normal(size=(2, WIDTH))
        tree.expand(rewards, leaf, logits)
        p = np.exp(logits)
        told.append((parents, actions, rewards, leaf, p / p.sum(axis=1, keepdims=True)))

    results = tree.results()
    for row in range(2):
        nodes = tree.nodes(row)
        parent = [-1, *(t[0][row] for t in told)]
        action = [-1, *(t[1][row] for t in told)]
        reward = [0.0, *(t[2][row] for t in told)]
        value = [values[row], *(t[3][row] for t in told)]
        policy = [None, *(t[4][row] for t in told)]

        # Each node's value goes up its own path, a return at every step of it.
        returns: list[list[float]] = [[] for _ in parent]
        for leaf in range(1, SIMULATIONS + 1):
            node, gain = leaf, value[leaf]
            while node:
                gain = reward[node] + DISCOUNT * gain
                returns[node].append(gain)
                node = parent[node]
            returns[0].append(gain)

        assert nodes.parent.tolist() == parent and nodes.action.tolist() == action
        assert nodes.visits.tolist() == [len(r) for r in returns]
        np.testing.assert_allclose(nodes.q[1:], [np.mean(r) for r in returns[1:]])
        assert nodes.q[0] == pytest.approx(np.mean([values[row], *returns[0]]))
        assert nodes.q[0] == pytest.approx(results[row].value)
        np.testing.assert_allclose(nodes.value, value)
        np.testing.assert_allclose(nodes.reward, reward)
        expected = [
            1.0,
            *(
                np.exp(logs[row])[valid[row].tolist().index(action[n])]
                if parent[n] == 0
                else policy[parent[n]][action[n]]
                for n in range(1, SIMULATIONS + 1)
            ),
        ]
        np.testing.assert_allclose(nodes.prior, expected)


def test_a_fused_search_shows_the_tree_of_the_plain_one(make_policy, randomise, encoder):
    trees = []
    for backend in ("plain", "fused"):
        policy = make_policy(search_backend=backend, num_simulations=12)
        randomise(policy.network)
        texts = encoder.encode(["a", "b", "c"])
        roots = [
            Root(texts[:1], np.zeros(0, np.int64), np.array([0, 3, 5]), keep_tree=True),
            Root(texts[:2], np.array([3]), np.array([1, 2]), keep_tree=False),
            Root(texts, np.array([3, 1]), np.array([2, 6, 7]), keep_tree=True),
        ]
        plans = policy.eval_mode.forward(roots, 0)
        assert [plan.tree is not None for plan in plans] == [True, False, True]
        trees.append([plan.tree for plan in plans if plan.tree is not None])
    for plain, fused in zip(*trees, strict=True):
        for name in ("parent", "action", "visits"):
            np.testing.assert_array_equal(getattr(plain, name), getattr(fused, name))
        for name in ("q", "prior", "reward", "value"):
            np.testing.assert_allclose(getattr(plain, name), getattr(fused, name), atol=2e-3)
