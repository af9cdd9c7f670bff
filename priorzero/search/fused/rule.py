"""Which child a walk takes, as numbers: what a root policy hands to the compiled kernels.

A root policy that has a fused form offers

    def fused(search) -> FusedRule

in its file, where `search` is what its `begin` returned, a `FusibleSearch`: the kernels grow its
tree's arrays, and its `results` reads them at the end. There are two rules; a root policy with
another one runs plain.

Letters: `B` roots, `K` action ids, `n` simulations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from priorzero.search.roots import SearchResult
from priorzero.search.rules import SMALLEST_RANGE, exploration_factor
from priorzero.search.tree import Tree
from priorzero.settings.policy import GumbelSettings


class FusibleSearch(Protocol):
    """What `begin` of a root policy with a fused form returns."""

    tree: Tree

    def results(self) -> list[SearchResult]:
        """One per root, from the tree as it is."""


@dataclass(frozen=True, eq=False)
class FusedRule:
    """A selection rule.

    Attributes:
        halving: False: PUCT everywhere (`puct`, `search/rules.py`); True: sequential halving at the
            roots and the improved policy below them (`search/root_policies/gumbel.py`).
        exploration: `[n + 2]` PUCT's factor of the prior, by the node's visits.
        gumbel: `[B, K]` noise at the roots.
        schedule: `[B, n]` int64, which number of visits simulation i's action has.
        visit_constant, value_scale: of the improved policy, see `GumbelSettings`.
        smallest_range: Q that differ by less are not scaled up to 1.
    """

    halving: bool
    exploration: np.ndarray
    gumbel: np.ndarray
    schedule: np.ndarray
    visit_constant: float
    value_scale: float
    smallest_range: float


def puct_rule(batch: int, actions: int, simulations: int) -> FusedRule:
    """PUCT at the roots and below them."""
    total = np.arange(simulations + 2, dtype=np.float64)
    return FusedRule(
        halving=False,
        exploration=exploration_factor(total) * np.sqrt(total),
        gumbel=np.zeros((batch, actions)),
        schedule=np.zeros((batch, simulations), dtype=np.int64),
        visit_constant=0.0,
        value_scale=0.0,
        smallest_range=SMALLEST_RANGE,
    )


def halving_rule(gumbel: np.ndarray, schedule: np.ndarray, settings: GumbelSettings) -> FusedRule:
    """Sequential halving by `gumbel` `[B, K]` and `schedule` `[B, n]`, as in `FusedRule`."""
    return FusedRule(
        halving=True,
        exploration=np.zeros(schedule.shape[1] + 2),
        gumbel=gumbel,
        schedule=schedule,
        visit_constant=settings.visit_constant,
        value_scale=settings.value_scale,
        smallest_range=settings.smallest_range,
    )
