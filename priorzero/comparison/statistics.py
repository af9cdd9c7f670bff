"""Few runs, told honestly: interquartile means with bootstrap intervals.

After Agarwal et al., Deep Reinforcement Learning at the Edge of the Statistical Precipice
(arXiv:2108.13264), whose library is rliable. One game has one task, so runs are resampled without
strata.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_RESAMPLES = 10_000
_CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A number with its percentile interval; no interval where there is one run only."""

    value: float
    low: float | None = None
    high: float | None = None


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """Mean of the middle half: floor(N / 4) values are left out at each end, so with three runs or
    fewer it is the mean.

    Args:
        values: [..., N], N at least 1.

    Returns:
        [...].
    """
    count = values.shape[-1]
    cut = count // 4
    return np.sort(values, axis=-1)[..., cut : count - cut].mean(axis=-1)


def estimate(values: Sequence[float]) -> Estimate:
    """Interquartile mean of one number per run, and its 95 % percentile bootstrap interval.

    Args:
        values: [N], N at least 1.
    """
    runs = np.asarray(values, dtype=np.float64)
    value = float(interquartile_mean(runs))
    if len(runs) < 2:
        return Estimate(value)
    return _with_interval(value, interquartile_mean(runs[_resamples(len(runs))]))


def probability_of_improvement(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """P(a run of ours is above a run of theirs), ties counting half: the mean over all pairs. The
    runs of both groups are resampled for its interval.

    Args:
        ours, theirs: [N] and [M], one number per run.
    """
    left, right = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    wins = (left[:, None] > right) + 0.5 * (left[:, None] == right)  # [N, M]
    value = float(wins.mean())
    if min(wins.shape) < 2:
        return Estimate(value)

    rows, columns = _resamples(len(left)), _resamples(len(right), seed=1)
    return _with_interval(value, wins[rows[:, :, None], columns[:, None, :]].mean(axis=(1, 2)))


def _resamples(count: int, seed: int = 0) -> np.ndarray:
    """Runs drawn with replacement, [R, N]; the same in every call, so that a page can be made
    again.
    """
    return np.random.default_rng(seed).integers(count, size=(_RESAMPLES, count))


def _with_interval(value: float, resampled: np.ndarray) -> Estimate:
    tail = 50 * (1 - _CONFIDENCE)
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return Estimate(value, float(low), float(high))
