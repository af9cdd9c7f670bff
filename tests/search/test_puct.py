"""The tree under the PUCT rule against a slow recursive reference written from the formula, and by
hand; and that it is reproducible.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from priorzero.search.rules import puct
from priorzero.search.tree import Tree

DISCOUNT, C_INIT, C_BASE, DELTA = 0.9, 1.25, 19652.0, 0.01


class Network:
    """Outputs that depend on the path of actions alone: reward, value, policy `[K]`."""

    def __init__(self, seed: int, actions: int) -> None:
        self.seed, self.actions = seed, actions

    def __call__(self, row: int, path: tuple[int, ...]):
        rng = np.random.default_rng([self.seed, row, *(a + 1 for a in path)])
        return rng.normal(), rng.normal(), rng.dirichlet(np.full(self.actions, 0.5))


class SlowNode:
    """A node as a textbook would write it."""

    def __init__(self, value: float, prior, reward: float = 0.0, allowed=None) -> None:
        self.value, self.prior, self.reward = value, prior, reward
        self.allowed = range(len(prior)) if allowed is None else allowed
        self.children: dict[int, SlowNode] = {}
        self.returns: dict[int, list[float]] = {}

    def mean(self) -> float:
        every = [self.value] + [g for gains in self.returns.values() for g in gains]
        return sum(every) / len(every)

    def visits(self) -> int:
        return 1 + sum(len(gains) for gains in self.returns.values())


def slow_search(network: Network, row: int, prior, allowed, simulations: int):
    """(visits per action, root value) of one root."""
    _, value, _ = network(row, ())
    root, bounds = SlowNode(value, prior, allowed=allowed), [math.inf, -math.inf]

    def best(node: SlowNode) -> int:
        n = node.visits()
        c = (C_INIT + math.log((n + C_BASE + 1) / C_BASE)) * math.sqrt(n)

        def score(a: int) -> float:
            gains = node.returns.get(a, [])
            q = sum(gains) / len(gains) if gains else node.mean()
            scaled = (
                (q - bounds[0]) / max(bounds[1] - bounds[0], DELTA)
                if bounds[1] >= bounds[0]
                else 0.0
            )
            return scaled + c * node.prior[a] / (1 + len(gains))

        return max(node.allowed, key=lambda a: (score(a), -a))

    def simulate(node: SlowNode, path: tuple[int, ...]) -> float:
        action = best(node)
        path = (*path, action)
        if action in node.children:
            gain = simulate(node.children[action], path)
        else:
            reward, gain, policy = network(row, path)
            node.children[action] = SlowNode(gain, policy, reward)
        gain = node.children[action].reward + DISCOUNT * gain
        node.returns.setdefault(action, []).append(gain)
        q = sum(node.returns[action]) / len(node.returns[action])
        bounds[0], bounds[1] = min(bounds[0], q), max(bounds[1], q)
        return gain

    for _ in range(simulations):
        simulate(root, ())
    return [len(root.returns.get(a, [])) for a in range(network.actions)], root.mean()


def fast_search(network: Network, priors, valid, simulations: int):
    """The same with `Tree`, all roots at once; also the paths that were expanded."""
    batch = len(priors)
    values = np.array([network(row, ())[1] for row in range(batch)])
    tree = Tree(priors, valid, values, simulations + 1, DISCOUNT)
    paths = [[()] for _ in range(batch)]
    for _ in range(simulations):
        parents, actions = tree.select(puct, puct)
        for row in range(batch):
            paths[row].append((*paths[row][parents[row]], int(actions[row])))
        outputs = [network(row, paths[row][-1]) for row in range(batch)]
        tree.expand(
            np.array([o[0] for o in outputs]),
            np.array([o[1] for o in outputs]),
            np.array([o[2] for o in outputs]),
        )
    return tree.root_statistics().visits, tree.root_statistics().value, paths


@pytest.mark.parametrize("seed", range(6))
def test_equals_the_slow_reference(seed):
    rng = np.random.default_rng(seed)
    network, batch, actions = Network(seed, 5), 3, 5
    valid = rng.random((batch, actions)) < 0.7
    valid[:, 0] = True
    priors = np.where(valid, rng.random((batch, actions)), 0.0)
    priors /= priors.sum(axis=1, keepdims=True)
    visits, values, paths = fast_search(network, priors, valid, 60)
    for row in range(batch):
        expected, value = slow_search(
            network, row, priors[row], np.flatnonzero(valid[row]).tolist(), 60
        )
        np.testing.assert_array_equal(visits[row], expected)
        assert values[row] == pytest.approx(value)
    assert max(len(p) for row in paths for p in row) > 3
    assert not visits[~valid].any()


def test_two_simulations_by_hand():
    """Priors 0.2 and 0.8; the first goes to 0.8 (all Q unknown), the second weighs what it found.

    First: reward 1, value 2 -> Q = 1 + 0.9 * 2 = 2.8; root mean = (0 + 2.8) / 2 = 1.4; only one Q
    is known, so the range is delta = 0.01. Second: scaled Q of action 1 is 0, of action 0 (1.4 -
    2.8) / 0.01 = -140: action 1 again.
    """
    tree = Tree(np.array([[0.2, 0.8]]), np.ones((1, 2), dtype=bool), np.array([0.0]), 3, 0.9)
    parents, actions = tree.select(puct, puct)
    assert (parents[0], actions[0]) == (0, 1)
    tree.expand(np.array([1.0]), np.array([2.0]), np.array([[0.3, 0.7]]))
    assert tree.root_statistics().value[0] == pytest.approx(1.4)
    parents, actions = tree.select(puct, puct)
    assert (parents[0], actions[0]) == (
        1,
        1,
    )  # below action 1, the network's policy prefers action 1
    tree.expand(np.array([0.0]), np.array([-1.0]), np.array([[0.5, 0.5]]))
    # return of the path: 1 + 0.9 * (0 + 0.9 * -1) = 0.19
    assert tree.root_statistics().value[0] == pytest.approx((0.0 + 2.8 + 0.19) / 3)
    np.testing.assert_array_equal(tree.root_statistics().visits, [[0, 2]])


def test_the_first_simulation_follows_the_prior():
    rng = np.random.default_rng(0)
    priors = rng.dirichlet(np.ones(12), size=8)
    tree = Tree(priors, np.ones((8, 12), dtype=bool), np.zeros(8), 2, 0.99)
    np.testing.assert_array_equal(tree.select(puct, puct)[1], priors.argmax(axis=1))


def test_reproducible():
    priors = np.full((2, 4), 0.25)
    runs = [fast_search(Network(3, 4), priors, np.ones((2, 4), dtype=bool), 30) for _ in range(3)]
    for visits, values, paths in runs[1:]:
        np.testing.assert_array_equal(visits, runs[0][0])
        np.testing.assert_array_equal(values, runs[0][1])
        assert paths == runs[0][2]


def test_visits_move_to_the_better_action():
    """Same priors, action 2 earns 1 at once: most visits are its."""
    tree = Tree(np.full((1, 3), 1 / 3), np.ones((1, 3), dtype=bool), np.zeros(1), 41, 0.9)
    reward_of = {}
    for node in range(1, 41):
        parents, actions = tree.select(puct, puct)
        reward_of[node] = 1.0 if parents[0] == 0 and actions[0] == 2 else 0.0
        tree.expand(np.array([reward_of[node]]), np.zeros(1), np.full((1, 3), 1 / 3))
    assert tree.root_statistics().visits[0, 2] > 25


def test_root_and_inner_nodes_have_rules_of_their_own():
    """The root's rule wants action 0, the other one action 2."""

    def wants(action):
        return lambda node: np.eye(3)[[action] * len(node.total)]

    tree = Tree(np.full((2, 3), 1 / 3), np.ones((2, 3), dtype=bool), np.zeros(2), 4, 0.9)
    walks = []
    for _ in range(3):
        parents, actions = tree.select(wants(0), wants(2))
        walks.append((parents.tolist(), actions.tolist()))
        tree.expand(np.zeros(2), np.zeros(2), np.full((2, 3), 1 / 3))
    assert walks == [([0, 0], [0, 0]), ([1, 1], [2, 2]), ([2, 2], [2, 2])]


def test_a_rule_cannot_choose_what_is_not_valid_at_the_root():
    valid = np.array([[False, True, False]])
    tree = Tree(np.array([[0.9, 0.1, 0.0]]), valid, np.zeros(1), 3, 0.9)
    for expected in ((0, 1), (1, 0)):  # below the root anything may be taken
        parents, actions = tree.select(lambda n: np.array([[3.0, 2.0, 1.0]]), puct)
        assert (parents[0], actions[0]) == expected
        tree.expand(np.zeros(1), np.zeros(1), np.array([[0.9, 0.1, 0.0]]))
