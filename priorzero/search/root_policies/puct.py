"""PUCT at the root and below it (MuZero, arXiv:1911.08265), Dirichlet noise in the root's prior.

Letters: `B` roots, `A` valid actions of a root, `K` action ids nodes branch over.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from priorzero.search.fused.rule import FusedRule, puct_rule
from priorzero.search.root_prior import RootPrior
from priorzero.search.roots import Root, SearchResult, TreeNodes, spread
from priorzero.search.rules import exploration_factor, normalised_q, puct, softmax
from priorzero.search.targets import regularised, visit_shares
from priorzero.search.tree import Tree
from priorzero.settings.policy import PolicySettings


def begin(
    roots: Sequence[Root],
    priors: Sequence[RootPrior],
    values: np.ndarray,
    inner_actions: int,
    settings: PolicySettings,
    noise: np.random.Generator | None,
) -> PuctSearch:
    """See the package; the noise is mixed into the prior as in AlphaZero (arXiv:1712.01815)."""
    clean = [np.exp(prior.log_mixed) for prior in priors]
    start = clean
    if noise is not None:
        alpha, share = settings.root_dirichlet_alpha, settings.root_noise_weight
        start = [(1.0 - share) * p + share * noise.dirichlet([alpha] * len(p)) for p in clean]

    probabilities = spread(start, roots, inner_actions)
    valid = spread([np.ones(len(p)) for p in clean], roots, inner_actions) > 0
    nodes = settings.num_simulations + 1
    tree = Tree(probabilities, valid, values, nodes, settings.discount_factor)
    valid_ids = [root.valid_ids for root in roots]
    return PuctSearch(tree, valid_ids, clean, settings.policy_target)


def fused(search: PuctSearch) -> FusedRule:
    """See `priorzero/search/fused/rule.py`."""
    batch, nodes, actions = search.tree.arrays.child.shape
    return puct_rule(batch, actions, nodes - 1)


class PuctSearch:
    """The tree under the PUCT rule.

    Args:
        tree: begun, with noise in its roots' priors or without.
        valid_ids: `[A]` per root.
        priors: `[A]` per root, without noise.
        target: "regularised" or "visits", see `priorzero/search/targets.py`.
    """

    def __init__(
        self, tree: Tree, valid_ids: list[np.ndarray], priors: list[np.ndarray], target: str
    ) -> None:
        self.tree = tree
        self._valid_ids, self._priors, self._target = valid_ids, priors, target

    def select(self) -> tuple[np.ndarray, np.ndarray]:
        return self.tree.select(puct, puct)

    def expand(self, rewards: np.ndarray, values: np.ndarray, logits: np.ndarray) -> None:
        self.tree.expand(rewards, values, softmax(logits))

    def nodes(self, row: int) -> TreeNodes:
        return self.tree.nodes(row)

    def results(self) -> list[SearchResult]:
        root = self.tree.root_statistics()
        q, factor = normalised_q(root), exploration_factor(root.total)

        results = []
        for row, (ids, prior) in enumerate(zip(self._valid_ids, self._priors, strict=True)):
            visits = root.visits[row, ids]
            if self._target == "visits":
                target = visit_shares(visits)
            else:
                target = regularised(prior, q[row, ids], visits.sum(), factor[row])
            results.append(SearchResult(visits, float(root.value[row]), target))
        return results
