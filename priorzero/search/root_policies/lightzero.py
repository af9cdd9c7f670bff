"""LightZero's C++ tree, for comparison: not reproducible, and the prior counts late
(docs/LIGHTZERO.md).

Its training target is the roots' visit shares, noise included.

Letters: `B` roots, `A` valid actions of a root, `K` action ids nodes branch over.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from priorzero.quiet import quiet_base
from priorzero.search.root_prior import RootPrior
from priorzero.search.roots import Root, SearchResult
from priorzero.search.rules import C_BASE, C_INIT, SMALLEST_RANGE
from priorzero.search.targets import visit_shares
from priorzero.settings.policy import PolicySettings

with quiet_base():
    from lzero.mcts.ctree.ctree_muzero import mz_tree


def begin(
    roots: Sequence[Root],
    priors: Sequence[RootPrior],
    values: np.ndarray,
    inner_actions: int,
    settings: PolicySettings,
    noise: np.random.Generator | None,
) -> LightZeroSearch:
    """See the package. This tree starts its roots with the value 0 and has no use for `values`."""
    valid_ids = [root.valid_ids.tolist() for root in roots]
    width = max(inner_actions, 1 + max(max(ids) for ids in valid_ids))
    logits = np.zeros((len(roots), width), dtype=np.float32)
    for row, (ids, prior) in enumerate(zip(valid_ids, priors, strict=True)):
        logits[row, ids] = prior.log_mixed

    tree = mz_tree.Roots(len(roots), valid_ids)
    rewards, players = [0.0] * len(roots), [-1] * len(roots)
    if noise is None:
        tree.prepare_no_noise(rewards, logits.tolist(), players)
    else:
        alpha = settings.root_dirichlet_alpha
        draws = [noise.dirichlet([alpha] * len(ids)).astype(np.float32) for ids in valid_ids]
        tree.prepare(
            settings.root_noise_weight,
            [draw.tolist() for draw in draws],
            rewards,
            logits.tolist(),
            players,
        )
    return LightZeroSearch(tree, players, settings.discount_factor)


class LightZeroSearch:
    """The C++ tree behind the three calls of a search."""

    def __init__(self, tree, players: list[int], discount: float) -> None:
        self._tree, self._players, self._discount = tree, players, discount
        self._simulation = 0
        self._bounds = mz_tree.MinMaxStatsList(len(players))
        self._bounds.set_delta(SMALLEST_RANGE)

    def select(self) -> tuple[np.ndarray, np.ndarray]:
        self._walk = mz_tree.ResultsWrapper(num=len(self._players))
        parents, _, actions, self._virtual = mz_tree.batch_traverse(
            self._tree,
            C_BASE,
            C_INIT,
            self._discount,
            self._bounds,
            self._walk,
            list(self._players),
        )
        return np.asarray(parents), np.asarray(actions)

    def expand(self, rewards: np.ndarray, values: np.ndarray, logits: np.ndarray) -> None:
        self._simulation += 1
        mz_tree.batch_backpropagate(
            self._simulation,
            self._discount,
            rewards.tolist(),
            values.tolist(),
            logits.tolist(),
            self._bounds,
            self._walk,
            self._virtual,
        )

    def nodes(self, row: int) -> None:
        """The C++ tree does not show its nodes."""

    def results(self) -> list[SearchResult]:
        visits = [np.asarray(v, dtype=np.float64) for v in self._tree.get_distributions()]
        return [
            SearchResult(counts, float(value), visit_shares(counts))
            for counts, value in zip(visits, self._tree.get_values(), strict=True)
        ]
