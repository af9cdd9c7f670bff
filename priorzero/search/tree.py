"""The search tree: arrays, walking and backup for `B` roots at once, in numpy.

Which child a walk takes is not decided here: `select` is handed one rule for the roots and one for
the nodes below them (`rules.py`), as in mctx. A node's own expansion counts as one of its visits.

Letters: `B` roots, `N` nodes per root, `K` action ids that nodes branch over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from priorzero.search.roots import TreeNodes


class NodeStatistics(NamedTuple):
    """What a rule may know of one node per root.

    Attributes:
        visits: `[B, K]` how often each action was taken there.
        q: `[B, K]` mean of reward + discount * return below; 0 where an action was not tried.
        prior: `[B, K]` probabilities.
        total: `[B]` visits of the node, its own expansion included: 1 + sum of `visits`.
        value: `[B]` mean return of the node, its own network value included.
        low, high: `[B]` smallest and largest q seen in this root's tree; inf and -inf before the
            first.
    """

    visits: np.ndarray
    q: np.ndarray
    prior: np.ndarray
    total: np.ndarray
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


# Scores `[B, K]` of the actions of one node per root; the largest is taken, ties go to the lower
# id.
SelectionRule = Callable[[NodeStatistics], np.ndarray]


@dataclass(frozen=True, eq=False)
class TreeArrays:
    """All there is to know of a search's trees. A compiled search (`fused/`) works on the same.

    Attributes:
        child: `[B, N, K]` int64, the node an action leads to, 0 for none: no action leads to the
            root.
        visits, returns, prior: `[B, N, K]` of every action: how often it was taken, the sum of the
            returns, its probability.
        rewards: `[B, N]` of the step into a node.
        node_visits, node_returns: `[B, N]`, the node's own expansion and network value included.
        low, high: `[B]` smallest and largest q seen; inf and -inf before the first.
        valid: `[B, K]` bool, what may be taken at the roots.
    """

    child: np.ndarray
    visits: np.ndarray
    returns: np.ndarray
    prior: np.ndarray
    rewards: np.ndarray
    node_visits: np.ndarray
    node_returns: np.ndarray
    low: np.ndarray
    high: np.ndarray
    valid: np.ndarray


class Tree:
    """One search. Its state is `arrays`; `discount` is as given.

    Args:
        priors: `[B, K]` probabilities at the roots, 0 for what is not valid.
        valid: `[B, K]` bool, what may be taken at the roots. Below them anything may: only the root
            knows which actions are valid, further down the network's policy has to.
        values: `[B]` the network's values of the roots.
        nodes: `N`, most nodes per root (simulations + 1).
        discount: per step.
    """

    def __init__(
        self,
        priors: np.ndarray,
        valid: np.ndarray,
        values: np.ndarray,
        nodes: int,
        discount: float,
    ) -> None:
        batch, actions = priors.shape
        assert valid.shape == (batch, actions) and values.shape == (batch,)
        assert valid.any(axis=1).all(), "a root without a valid action"

        self.discount = discount
        self.arrays = TreeArrays(
            child=np.zeros((batch, nodes, actions), dtype=np.int64),
            visits=np.zeros((batch, nodes, actions)),
            returns=np.zeros((batch, nodes, actions)),
            prior=np.zeros((batch, nodes, actions)),
            rewards=np.zeros((batch, nodes)),
            node_visits=np.zeros((batch, nodes)),
            node_returns=np.zeros((batch, nodes)),
            low=np.full(batch, np.inf),
            high=np.full(batch, -np.inf),
            valid=valid,
        )
        self.arrays.prior[:, 0] = priors
        self.arrays.node_visits[:, 0], self.arrays.node_returns[:, 0] = 1.0, values
        self._rows = np.arange(batch)
        self._size = 1
        self._path: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def select(
        self, root_rule: SelectionRule, inner_rule: SelectionRule
    ) -> tuple[np.ndarray, np.ndarray]:
        """Walk down from every root to an action not yet expanded.

        Returns:
            parent nodes `[B]` and action ids `[B]`.
        """
        t, node = self.arrays, np.zeros(len(self._rows), dtype=np.int64)
        walking = np.ones(len(self._rows), dtype=bool)
        action = np.where(t.valid, root_rule(self.statistics(node)), -np.inf).argmax(axis=1)
        # One entry per depth: nodes, actions, rows still walking. A row that stopped earlier
        # repeats its last node and action.
        self._path = [(node, action, walking)]

        while True:
            following = t.child[self._rows, node, action]
            walking = walking & (following > 0)
            if not walking.any():
                return node, action
            node = np.where(walking, following, node)
            best = inner_rule(self.statistics(node)).argmax(axis=1)
            action = np.where(walking, best, action)
            self._path.append((node, action, walking))

    def expand(self, rewards: np.ndarray, values: np.ndarray, priors: np.ndarray) -> None:
        """Add the selected nodes and back their values up.

        Args:
            rewards: `[B]` of the steps into the new nodes.
            values: `[B]` the network's values there.
            priors: `[B, K]` the network's policy there, probabilities.
        """
        assert self._path, "select comes first"
        t, (parent, action, _) = self.arrays, self._path[-1]
        new = self._size
        t.child[self._rows, parent, action] = new
        t.rewards[:, new] = rewards
        t.prior[:, new] = priors
        t.node_visits[:, new], t.node_returns[:, new] = 1.0, values
        self._size += 1

        # From the leaves up: the return of a step is its reward and the discounted return below.
        gain = values.astype(np.float64)
        for nodes, actions, walked in reversed(self._path):
            rows = self._rows[walked]
            n, a = nodes[walked], actions[walked]
            reward = t.rewards[rows, t.child[rows, n, a]]
            gain[walked] = reward + self.discount * gain[walked]

            t.visits[rows, n, a] += 1.0
            t.returns[rows, n, a] += gain[walked]
            t.node_visits[rows, n] += 1.0
            t.node_returns[rows, n] += gain[walked]

            q = t.returns[rows, n, a] / t.visits[rows, n, a]
            t.low[rows] = np.minimum(t.low[rows], q)
            t.high[rows] = np.maximum(t.high[rows], q)
        self._path = []

    def statistics(self, node: np.ndarray) -> NodeStatistics:
        """Statistics of node `node[b]` of every root b; `[B]` int64."""
        at = self._rows, node
        t = self.arrays
        visits, total = t.visits[at], t.node_visits[at]
        return NodeStatistics(
            visits=visits,
            q=t.returns[at] / np.maximum(visits, 1.0),
            prior=t.prior[at],
            total=total,
            value=t.node_returns[at] / total,
            low=t.low,
            high=t.high,
        )

    def nodes(self, row: int) -> TreeNodes:
        """The whole tree of one root, for whoever shows it."""
        t = self.arrays
        parents, actions = np.nonzero(t.child[row])
        made = t.child[row, parents, actions]  # the nodes these edges lead to
        size = len(made) + 1
        visits, returns = (a[row, parents, actions] for a in (t.visits, t.returns))

        # What a node holds beside the returns of its edges is the network's own value.
        own = t.node_returns[row, :size].copy()
        np.subtract.at(own, parents, returns)

        def over_nodes(root: float, edges: np.ndarray) -> np.ndarray:
            column = np.full(size, root, dtype=edges.dtype)
            column[made] = edges
            return column

        total = t.node_visits[row, 0]
        return TreeNodes(
            parent=over_nodes(-1, parents),
            action=over_nodes(-1, actions),
            visits=over_nodes(total - 1.0, visits),
            q=over_nodes(t.node_returns[row, 0] / total, returns / visits),
            prior=over_nodes(1.0, t.prior[row, parents, actions]),
            reward=t.rewards[row, :size].copy(),
            value=own,
        )

    def root_statistics(self) -> NodeStatistics:
        """Statistics of the roots."""
        return self.statistics(np.zeros(len(self._rows), dtype=np.int64))
