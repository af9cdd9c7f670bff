"""PUCT at the root and below it (MuZero, arXiv:1911.08265), Dirichlet noise in the root's prior.

Letters: `B` roots, `A` valid actions of a root, `K` action ids nodes branch over.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from priorzero.search.fused.rule import FusedRule, puct_rule
from priorzero.search.root_prior import RootPrior
from priorzero.search.roots import Root, SearchResult, TreeNodes, ValidActions
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
    actions = ValidActions(roots)
    clean = np.exp(np.concatenate([prior.log_mixed for prior in priors]))
    assert clean.min() > 0, "the mixture is floored"
    start = clean
    if noise is not None:
        share = settings.root_noise_weight
        drawn = dirichlet(noise, settings.root_dirichlet_alpha, actions)
        start = (1.0 - share) * clean + share * drawn

    probabilities = actions.spread(start, inner_actions)
    valid = actions.spread(np.ones(len(clean), dtype=bool), inner_actions)
    nodes = settings.num_simulations + 1
    tree = Tree(probabilities, valid, values, nodes, settings.discount_factor)
    return PuctSearch(tree, actions, clean, settings.policy_target)


def dirichlet(noise: np.random.Generator, alpha: float, actions: ValidActions) -> np.ndarray:
    """`[M]` a symmetric Dirichlet draw for each root: to the last bit what `noise.dirichlet` gives
    when it is asked root after root.

    A Dirichlet draw is gamma draws over their sum. numpy does the same from 0.1 on; below, all
    gammas of a root may be 0, and it breaks sticks instead.
    """
    if alpha < 0.1:
        return np.concatenate([noise.dirichlet([alpha] * n) for n in actions.sizes])
    draws = noise.standard_gamma(alpha, size=len(actions.ids))
    # bincount adds one after the other, as numpy's Dirichlet does; a plain sum adds in pairs.
    return draws * (1.0 / np.bincount(actions.rows, weights=draws))[actions.rows]


def fused(search: PuctSearch) -> FusedRule:
    """See `priorzero/search/fused/rule.py`."""
    batch, nodes, actions = search.tree.arrays.child.shape
    return puct_rule(batch, actions, nodes - 1)


def targets(search: PuctSearch, priors: Sequence[np.ndarray]) -> list[np.ndarray]:
    """See the package. Of the search stay: Q on the scale it was compared on (the node's mean value
    where an action was not tried), `N` and `c`.
    """
    return search.improve(np.concatenate(priors))


class PuctSearch:
    """The tree under the PUCT rule.

    Args:
        tree: begun, with noise in its roots' priors or without.
        actions: valid ones of the roots.
        prior: `[M]` of these, without noise.
        target: "regularised" or "visits", see `priorzero/search/targets.py`.
    """

    def __init__(self, tree: Tree, actions: ValidActions, prior: np.ndarray, target: str) -> None:
        self.tree = tree
        self._actions, self._prior, self._target = actions, prior, target

    def select(self) -> tuple[np.ndarray, np.ndarray]:
        return self.tree.select(puct, puct)

    def expand(self, rewards: np.ndarray, values: np.ndarray, logits: np.ndarray) -> None:
        self.tree.expand(rewards, values, softmax(logits))

    def nodes(self, row: int) -> TreeNodes:
        return self.tree.nodes(row)

    def results(self) -> list[SearchResult]:
        root = self.tree.root_statistics()
        actions = self._actions
        visits = actions.split(actions.gather(root.visits))

        if self._target == "visits":
            policies = [visit_shares(counts) for counts in visits]
        else:
            policies = self.improve(self._prior)
        return [
            SearchResult(counts, value, policy)
            for counts, value, policy in zip(visits, root.value.tolist(), policies, strict=True)
        ]

    def improve(self, prior: np.ndarray) -> list[np.ndarray]:
        """The regularised policy `[A]` of each root, from a `prior` `[M]` of all of them."""
        assert self._target == "regularised", "visits are no function of a prior"
        root, actions = self.tree.root_statistics(), self._actions
        q = actions.pad(actions.gather(normalised_q(root)))
        factor = exploration_factor(root.total)
        policies = regularised(actions.pad(prior), q, root.total - 1.0, factor)
        return [policy[:n] for policy, n in zip(policies, actions.sizes, strict=True)]
