"""Gumbel MuZero (Danihelka et al., ICLR 2022, "Policy improvement by planning with Gumbel"): a root
that improves on its prior with a handful of simulations. mctx is the reference implementation
(tests/search/gumbel_cases.json holds its output).

PUCT's visit counts need many simulations before they say more than the prior did. Here

* the root draws m actions without replacement from the prior (the m largest g(a) + log p(a), with
  Gumbel noise g) and spends its simulations on them by sequential halving: every action of a round
  is visited equally often, the better half by g + log p + sigma(q) goes on;
* the training target is the improved policy over ALL actions, whatever was visited:

      pi'(a) = softmax(log p(a) + sigma(q^(a))),    sigma(q) = (c_visit + max_b N(b)) * c_scale * q

  q^ is the completed Q: the mean return where an action was tried, elsewhere the mixed value

      v_mix = (v + N * sum_{tried} p(a) q(a) / sum_{tried} p(a)) / (1 + N),   N = sum_b N(b),

  scaled to 0..1 by the node's smallest and largest completed Q. Without a value signal q^ is
  constant and pi' is the prior: few simulations do not turn noise into conviction;
* below the root selection is deterministic: argmax_a pi'(a) - N(a) / (1 + sum_b N(b)).

Letters: `B` roots, `A` valid actions of a root, `K` action ids nodes branch over, `m` considered
actions, `n` simulations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np

from priorzero.search.fused.rule import FusedRule, halving_rule
from priorzero.search.root_prior import RootPrior
from priorzero.search.roots import Root, SearchResult, TreeNodes, ValidActions
from priorzero.search.rules import softmax
from priorzero.search.tree import NodeStatistics, Tree
from priorzero.settings.policy import GumbelSettings, PolicySettings

_NOTHING = -1e9  # log-probability of what the prior leaves no room for; finite, as in mctx


def begin(
    roots: Sequence[Root],
    priors: Sequence[RootPrior],
    values: np.ndarray,
    inner_actions: int,
    settings: PolicySettings,
    noise: np.random.Generator | None,
) -> GumbelSearch:
    """See the package. Without `noise` (evaluation) the root takes the m likeliest actions."""
    actions = ValidActions(roots)
    prior = np.exp(np.concatenate([p.log_mixed for p in priors]))
    draws = np.zeros(len(prior)) if noise is None else noise.gumbel(size=len(prior))
    probabilities, gumbel = (actions.spread(x, inner_actions) for x in (prior, draws))
    valid = actions.spread(np.ones(len(prior), dtype=bool), inner_actions)

    nodes = settings.num_simulations + 1
    tree = Tree(probabilities, valid, values, nodes, settings.discount_factor)
    return GumbelSearch(tree, actions, valid, gumbel, settings.num_simulations, settings.gumbel)


def fused(search: GumbelSearch) -> FusedRule:
    """See `priorzero/search/fused/rule.py`."""
    return halving_rule(search.gumbel, search.schedule, search.settings)


def targets(search: GumbelSearch, priors: Sequence[np.ndarray]) -> list[np.ndarray]:
    """See the package. Of the search stays sigma(q^) as a whole, the mixed value in it, which
    weighs what was tried by the prior that the search drew it from: that is evidence, whoever
    learns from it. Exchanged is log p alone.
    """
    return search.improve(np.concatenate(priors))


class GumbelSearch:
    """The tree under sequential halving at the roots and the improved policy below them.

    Args:
        tree: fresh.
        actions: valid ones of the roots.
        valid: `[B, K]` bool, the same.
        gumbel: `[B, K]` noise, zeros for none.
        simulations: `n`.
        settings: of the method.
    """

    def __init__(
        self,
        tree: Tree,
        actions: ValidActions,
        valid: np.ndarray,
        gumbel: np.ndarray,
        simulations: int,
        settings: GumbelSettings,
    ) -> None:
        self.tree, self._actions, self._valid = tree, actions, valid
        self.gumbel, self.settings = gumbel, settings

        # What each simulation visits depends on the number of considered actions alone.
        considered = np.minimum(settings.max_considered_actions, valid.sum(axis=1))
        self.schedule = np.array([considered_visits(int(m), simulations) for m in considered])

    def select(self) -> tuple[np.ndarray, np.ndarray]:
        return self.tree.select(self._root_rule, self._inner_rule)

    def expand(self, rewards: np.ndarray, values: np.ndarray, logits: np.ndarray) -> None:
        self.tree.expand(rewards, values, softmax(logits))

    def nodes(self, row: int) -> TreeNodes:
        return self.tree.nodes(row)

    def results(self) -> list[SearchResult]:
        root, actions = self.tree.root_statistics(), self._actions
        improved = improved_policy(root, self.settings, self._valid)

        # The most visited of the considered actions, ties by g + log p + sigma(q).
        most = root.visits.max(axis=1)
        chosen = self._scores(root, most).argmax(axis=1)
        position = np.flatnonzero(actions.ids == chosen[actions.rows]) - actions.starts
        return [
            SearchResult(visits, value, target_policy=policy / policy.sum(), choice=choice)
            for visits, value, policy, choice in zip(
                actions.split(actions.gather(root.visits)),
                root.value.tolist(),
                actions.split(actions.gather(improved)),
                position.tolist(),
                strict=True,
            )
        ]

    def improve(self, prior: np.ndarray) -> list[np.ndarray]:
        """The improved policy `[A]` of each root, from a `prior` `[M]` of all of them."""
        root, actions = self.tree.root_statistics(), self._actions
        logs = actions.spread(np.log(prior), root.prior.shape[1])
        policy = _softmax(logs + sigma(root, self.settings, self._valid), self._valid)
        return [p / p.sum() for p in actions.split(actions.gather(policy))]

    def _root_rule(self, node: NodeStatistics) -> np.ndarray:
        done = (node.total - 1).astype(np.int64)  # a node's own expansion is its first visit
        return self._scores(node, self.schedule[np.arange(len(done)), done])

    def _scores(self, node: NodeStatistics, visits: np.ndarray) -> np.ndarray:
        """`[B, K]` g + log p + sigma(q), -inf for actions not visited exactly `visits` `[B]` times
        and for those that are not valid.
        """
        value = self.gumbel + log_prior(node) + sigma(node, self.settings, self._valid)
        open_ = self._valid & (node.visits == visits[:, None])
        return np.where(open_, np.maximum(value, _NOTHING), -np.inf)

    def _inner_rule(self, node: NodeStatistics) -> np.ndarray:
        everything = np.ones_like(node.prior, dtype=bool)
        improved = improved_policy(node, self.settings, everything)
        return improved - node.visits / node.total[:, None]


@cache
def considered_visits(considered: int, simulations: int) -> tuple[int, ...]:
    """Sequential halving as a schedule: simulation i goes to an action that has been visited
    exactly `considered_visits[i]` times (Karnin et al., 2013; as mctx's table).

    Args:
        considered: `m`, actions in the first round. simulations: `n`.
    """
    if considered <= 1:
        return tuple(range(simulations))
    rounds = math.ceil(math.log2(considered))
    schedule: list[int] = []
    left, visited = considered, 0
    while len(schedule) < simulations:
        # An equal share of the budget per round, but at least one visit for each that is left.
        share = max(1, simulations // (rounds * left))
        for count in range(visited, visited + share):
            schedule += [count] * left
        visited += share
        left = max(2, left // 2)
    return tuple(schedule[:simulations])


def completed_q(node: NodeStatistics, valid: np.ndarray, smallest_range: float) -> np.ndarray:
    """`[B, K]` Q with the mixed value where an action was not tried, scaled to 0..1 over `valid`.

    Args:
        valid: `[B, K]` actions that count for the range.
        smallest_range: q that differ by less are not scaled up to 1: what an untrained network
            says of its actions is noise.
    """
    tried = node.visits > 0
    count = node.visits.sum(axis=1)
    # The node's value holds the network's own and every return below it.
    own = node.value * node.total - (node.visits * node.q).sum(axis=1)

    prior = np.maximum(node.prior, np.finfo(np.float32).tiny)
    mass = np.where(tried, prior, 0.0).sum(axis=1)
    weighted = np.where(tried, prior * node.q, 0.0).sum(axis=1) / np.where(mass > 0, mass, 1.0)
    mixed = (own + count * weighted) / (count + 1.0)

    q = np.where(tried, node.q, mixed[:, None])
    low = np.where(valid, q, np.inf).min(axis=1, keepdims=True)
    high = np.where(valid, q, -np.inf).max(axis=1, keepdims=True)
    return (q - low) / np.maximum(high - low, smallest_range)


def sigma(node: NodeStatistics, settings: GumbelSettings, valid: np.ndarray) -> np.ndarray:
    """`[B, K]` (c_visit + max_b N(b)) * c_scale * completed Q, in nats."""
    scale = (settings.visit_constant + node.visits.max(axis=1)) * settings.value_scale
    return scale[:, None] * completed_q(node, valid, settings.smallest_range)


def log_prior(node: NodeStatistics) -> np.ndarray:
    """`[B, K]` natural logs, `_NOTHING` where the prior is 0."""
    safe = np.maximum(node.prior, 1e-300)
    return np.where(node.prior > 0, np.log(safe), _NOTHING)


def improved_policy(
    node: NodeStatistics, settings: GumbelSettings, valid: np.ndarray
) -> np.ndarray:
    """`[B, K]` softmax(log prior + sigma(completed Q)) over `valid`; 0 elsewhere."""
    return _softmax(log_prior(node) + sigma(node, settings, valid), valid)


def _softmax(logits: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """`[B, K]` over `valid`; 0 elsewhere."""
    logits = np.where(valid, logits, -np.inf)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)
