"""Training targets from a finished search: pure functions of a root's statistics.

Letters: `A` valid actions of the root.
"""

from __future__ import annotations

import numpy as np


def visit_shares(visit_counts: np.ndarray) -> np.ndarray:
    """Visit counts `[A]` -> shares `[A]`, which sum to one (AlphaZero, arXiv:1712.01815)."""
    total = visit_counts.sum()
    assert total > 0, "a search of no simulations has no target"
    return visit_counts / total


def regularised(
    prior: np.ndarray, q: np.ndarray, simulations: float, exploration: float
) -> np.ndarray:
    """The policy that visit counts follow, without their rounding and without the root's noise:
    "Monte-Carlo tree search as regularized policy optimization" (Grill et al. 2020,
    arXiv:2007.12509, equations 6 and 11, proposition 1).

        pi = argmax_pi  q . pi - lambda KL(prior || pi)
        pi(a) = lambda prior(a) / (alpha - q(a)),   lambda = c sqrt(N) / (A + N)

    with alpha such that pi sums to one. At 60 actions and 16 simulations visit counts are mostly
    zeros and ones; this uses every Q that was found, and gives the prior where none says anything.

    Args:
        prior: `[A]` probabilities, before noise was mixed in.
        q: `[A]` values of the actions, on the scale the search compared them on; for an action not
            tried, what the search took in its place.
        simulations: `N`.
        exploration: `c`, the search's exploration factor.

    Returns:
        `[A]`, sums to one.
    """
    assert prior.shape == q.shape and prior.min() > 0 and abs(prior.sum() - 1) < 1e-6
    assert simulations > 0 and exploration > 0
    weight = exploration * np.sqrt(simulations) / (len(q) + simulations)

    # The sum falls with alpha. It is >= 1 at the lower bound, where the largest of its terms alone
    # is 1, and <= 1 at the upper one, where each is <= prior(a).
    low, high = np.max(q + weight * prior), np.max(q) + weight
    for _ in range(64):
        alpha = 0.5 * (low + high)
        if (weight * prior / (alpha - q)).sum() > 1.0:
            low = alpha
        else:
            high = alpha
    policy = weight * prior / (high - q)
    return policy / policy.sum()
