"""Training targets from a finished search: pure functions of a root's statistics.

Letters: `A` valid actions of the root.
"""

from __future__ import annotations

import numpy as np

# Steps of Newton's method, of which a dozen suffice; and the one, as a share of where it starts
# from, that is rounding.
_MOST_STEPS, _SMALLEST_STEP = 64, 1e-15


def visit_shares(visit_counts: np.ndarray) -> np.ndarray:
    """Visit counts `[A]` -> shares `[A]`, which sum to one (AlphaZero, arXiv:1712.01815)."""
    total = visit_counts.sum()
    assert total > 0, "a search of no simulations has no target"
    return visit_counts / total


def regularised(
    prior: np.ndarray,
    q: np.ndarray,
    simulations: float | np.ndarray,
    exploration: float | np.ndarray,
) -> np.ndarray:
    """The policy that visit counts follow, without their rounding and without the root's noise:
    "Monte-Carlo tree search as regularized policy optimization" (Grill et al. 2020,
    arXiv:2007.12509, equations 6 and 11, proposition 1).

        pi = argmax_pi  q . pi - lambda KL(prior || pi)
        pi(a) = lambda prior(a) / (alpha - q(a)),   lambda = c sqrt(N) / (A + N)

    with alpha such that pi sums to one. At 60 actions and 16 simulations visit counts are mostly
    zeros and ones; this uses every Q that was found, and gives the prior where none says anything.

    Args:
        prior: `[..., A]` probabilities, before noise was mixed in. 0 where a root has no such
            action: roots of fewer actions than A are padded, which changes nothing of theirs.
        q: `[..., A]` values of the actions, on the scale the search compared them on; for an action
            not tried, what the search took in its place; anything where the prior is 0.
        simulations: `[...]` `N`.
        exploration: `[...]` `c`, the search's exploration factor.

    Returns:
        `[..., A]`, sums to one; 0 where the prior is.
    """
    real = prior > 0
    assert prior.shape == q.shape and prior.min() >= 0
    assert np.abs(prior.sum(axis=-1) - 1).max() < 1e-6
    assert np.min(simulations) > 0 and np.min(exploration) > 0
    factor = exploration * np.sqrt(simulations) / (real.sum(axis=-1) + simulations)
    weighted = np.expand_dims(factor, -1) * prior

    # alpha = max q + x. Taken from there, an x far smaller than q keeps all its digits.
    best = np.where(real, q, -np.inf).max(axis=-1, keepdims=True)
    gap = np.where(real, best - q, np.inf)
    x = _norming_shift(weighted, gap)
    policy = weighted / (x + gap)
    return policy / _sum(policy)


def _norming_shift(weighted: np.ndarray, gap: np.ndarray) -> np.ndarray:
    """`[..., 1]` the x > 0 with S(x) = sum_a weighted(a) / (x + gap(a)) = 1, for `[..., A]`.

    Newton's method on 1 / S(x), which is concave and rises: from a start at the left of the
    solution every step goes right, and none goes beyond.
    """
    # Here the largest of the terms alone is 1.
    x = (weighted - gap).max(axis=-1, keepdims=True)
    for _ in range(_MOST_STEPS):
        terms = weighted / (x + gap)
        total = _sum(terms)
        step = total * (total - 1.0) / _sum(terms / (x + gap))
        # A row that has arrived stays where it is, whatever rows beside it still need.
        step = np.where(step > _SMALLEST_STEP * x, step, 0.0)
        if not step.any():
            return x
        x = x + step
    raise AssertionError(f"no policy after {_MOST_STEPS} steps: {weighted}, {gap}")


def _sum(numbers: np.ndarray) -> np.ndarray:
    """`[..., A]` -> `[..., 1]`, added one after the other: so zeros at the end change no digit."""
    return np.cumsum(numbers, axis=-1)[..., -1:]
