"""Selection rules: scores of a node's actions as pure functions of its statistics; and the policy
that enters a new node.

The rule is that of mctx, in which a node's own expansion counts as a visit, so that the prior
decides from the first one on (LightZero's tree does not, see docs/LIGHTZERO.md).

Letters: `B` roots, `K` action ids.
"""

from __future__ import annotations

import numpy as np

from priorzero.search.tree import NodeStatistics

# Constants of MuZero (arXiv:1911.08265, appendix B); the smallest range of Q that is scaled up to 1
# is LightZero's.
C_INIT, C_BASE, SMALLEST_RANGE = 1.25, 19652, 0.01


def exploration_factor(total: np.ndarray) -> np.ndarray:
    """c(N) = c_init + log((N + c_base + 1) / c_base) for `total` visits N of a node."""
    return C_INIT + np.log((total + C_BASE + 1.0) / C_BASE)


def normalised_q(node: NodeStatistics) -> np.ndarray:
    """`[B, K]` Q scaled by the smallest and largest Q of the root's tree (MuZero, appendix B).

    An action not yet tried has the node's mean value. Before any Q is known, all are 0.
    """
    q = np.where(node.visits > 0, node.q, node.value[:, None])
    known = node.high >= node.low
    low = np.where(known, node.low, 0.0)
    span = np.maximum(np.where(known, node.high - node.low, 0.0), SMALLEST_RANGE)
    return np.where(known[:, None], (q - low[:, None]) / span[:, None], 0.0)


def puct(node: NodeStatistics) -> np.ndarray:
    """`[B, K]` PUCT scores:

    Qn(s,a) + P(s,a) * c(N(s)) * sqrt(N(s)) / (1 + N(s,a)),   N(s) = 1 + sum_a N(s,a)
    """
    exploration = exploration_factor(node.total) * np.sqrt(node.total)
    return normalised_q(node) + exploration[:, None] * node.prior / (1.0 + node.visits)


def softmax(logits: np.ndarray) -> np.ndarray:
    """The network's policy `[B, K]` from its logits, in their precision."""
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)
