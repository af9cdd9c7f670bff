"""The search tree: PUCT selection and backup for `B` roots at once, in numpy.

LightZero's C++ tree weighs priors with sqrt(visits - 1). In a node that has been visited once,
every child then scores alike, whatever its prior, and the tie is broken by `rand()` seeded from the
clock: the first simulation at the root ignores the LLM, every first step below a new node is a
random action, and no seed reproduces a run (tests/test_stock_defects.py). With the 16 to 50
simulations of a text game most of the budget is spent in such nodes. So the rule here is that of
mctx, in which a node's own expansion counts as a visit:

    a* = argmax_a  Qn(s,a) + P(s,a) * sqrt(N(s)) / (1 + N(s,a)) * (c_init + log((N(s) + c_base + 1)
    / c_base))

N(s) = 1 + sum_a N(s,a); Q(s,a) = mean of reward + discount * return below; Qn = Q scaled by the
smallest and largest Q of this root's tree (MuZero, arXiv:1911.08265, appendix B); an action not yet
tried has the node's mean value as its Q. Ties go to the lower id. LightZero's tree stays available
(`SearchSettings.tree`).

Letters: `B` roots, `N` nodes per root, `K` action ids that inner nodes branch over.
"""

from __future__ import annotations

import numpy as np


class PuctTree:
    """One search.

    Args:
        priors: `[B, K]` probabilities at the roots, 0 for what is not valid.
        valid: `[B, K]` bool.
        values: `[B]` the network's values of the roots.
        nodes: most nodes per root (simulations + 1).
        discount, c_init, c_base, delta: see the module; delta is the smallest range of Q that is
            scaled up to 1.
    """

    def __init__(
        self,
        priors: np.ndarray,
        valid: np.ndarray,
        values: np.ndarray,
        nodes: int,
        discount: float,
        c_init: float = 1.25,
        c_base: float = 19652.0,
        delta: float = 0.01,
    ) -> None:
        batch, actions = priors.shape
        self._discount, self._c_init, self._c_base, self._delta = discount, c_init, c_base, delta
        self._rows = np.arange(batch)
        self._child = np.full((batch, nodes, actions), -1, dtype=np.int64)
        self._visits = np.zeros((batch, nodes, actions))
        self._returns = np.zeros((batch, nodes, actions))  # sums
        self._rewards = np.zeros((batch, nodes))  # of the step into a node
        self._prior = np.zeros((batch, nodes, actions))
        self._prior[:, 0] = priors
        self._allowed = valid
        self._node_visits = np.zeros((batch, nodes))
        self._node_returns = np.zeros(
            (batch, nodes)
        )  # sums; the node's own network value is its first
        self._node_visits[:, 0], self._node_returns[:, 0] = 1.0, values
        self._low, self._high = np.full(batch, np.inf), np.full(batch, -np.inf)
        self._size = 1

    def select(self) -> tuple[np.ndarray, np.ndarray]:
        """Walk down from every root to an action not yet expanded; returns parent nodes `[B]` and
        action ids `[B]`.
        """
        node = np.zeros(len(self._rows), dtype=np.int64)
        self._path: list[
            tuple[np.ndarray, np.ndarray, np.ndarray]
        ] = []  # nodes, actions, rows still walking
        walking = np.ones(len(self._rows), dtype=bool)
        action = np.zeros(len(self._rows), dtype=np.int64)
        while walking.any():
            best = self._scores(node).argmax(axis=1)
            action = np.where(walking, best, action)
            self._path.append((node.copy(), action.copy(), walking.copy()))
            following = self._child[self._rows, node, action]
            walking = walking & (following >= 0)
            node = np.where(walking, following, node)
        return node, action

    def _scores(self, node: np.ndarray) -> np.ndarray:
        """`[B, K]` PUCT scores of the children of one node per root; -inf where not allowed."""
        rows = self._rows
        visits, total = self._visits[rows, node], self._node_visits[rows, node]
        mean = self._node_returns[rows, node] / total
        q = np.where(visits > 0, self._returns[rows, node] / np.maximum(visits, 1.0), mean[:, None])
        known = self._high >= self._low
        low = np.where(known, self._low, 0.0)
        span = np.maximum(np.where(known, self._high - self._low, 0.0), self._delta)
        scaled = np.where(known[:, None], (q - low[:, None]) / span[:, None], 0.0)
        exploration = (
            self._c_init + np.log((total + self._c_base + 1.0) / self._c_base)
        ) * np.sqrt(total)
        scores = scaled + exploration[:, None] * self._prior[rows, node] / (1.0 + visits)
        # Only the root knows which actions are valid; below it the network's policy has to.
        return np.where(self._allowed | (node != 0)[:, None], scores, -np.inf)

    def expand(self, rewards: np.ndarray, values: np.ndarray, priors: np.ndarray) -> None:
        """Add the selected nodes and back their values up.

        Args:
            rewards, values: `[B]` of the new nodes. priors: `[B, K]` the network's policy there,
                probabilities.
        """
        parent, action, _ = self._path[-1]
        new = self._size
        # A row that stopped earlier repeats its last node and action in the path, so the last entry
        # holds for all.
        self._child[self._rows, parent, action] = new
        self._rewards[:, new] = rewards
        self._prior[:, new] = priors
        self._node_visits[:, new], self._node_returns[:, new] = 1.0, values
        self._size += 1
        gain = values.astype(np.float64)
        for nodes, actions, walked in reversed(self._path):
            rows = self._rows[walked]
            n, a = nodes[walked], actions[walked]
            gain[walked] = (
                self._rewards[rows, self._child[rows, n, a]] + self._discount * gain[walked]
            )
            self._visits[rows, n, a] += 1.0
            self._returns[rows, n, a] += gain[walked]
            self._node_visits[rows, n] += 1.0
            self._node_returns[rows, n] += gain[walked]
            q = self._returns[rows, n, a] / self._visits[rows, n, a]
            self._low[rows], self._high[rows] = (
                np.minimum(self._low[rows], q),
                np.maximum(self._high[rows], q),
            )

    @property
    def root_visits(self) -> np.ndarray:
        """`[B, K]` visit counts of the roots' actions."""
        return self._visits[:, 0].copy()

    @property
    def root_values(self) -> np.ndarray:
        """`[B]` mean return seen from each root, the network's own estimate included."""
        return self._node_returns[:, 0] / self._node_visits[:, 0]
