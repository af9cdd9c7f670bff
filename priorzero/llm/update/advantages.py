"""Advantages of a phase brought to a common scale."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from priorzero.settings.llm import GROUP_ADVANTAGES

_MEMORY = 1024  # decisions `running` remembers, about
_TINY = 1e-6
_FURTHEST = 5.0  # robust: in spreads
_IQR_OF_NORMAL = 1.349  # interquartile range of a normal distribution, in standard deviations


class Advantages:
    """Normalises `[N]` raw advantages A of a phase (n-step return - predicted value).

        raw      A
        batch    (A - mean) / (std + tiny), of the phase; a single decision keeps A
        running  the same with mean and std of about the last 1024 decisions, these included
        robust   (A - median) / (IQR / 1.349 + tiny), of the phase, cut at +-5; where the IQR is 0,
                 std takes its place

    Those of groups (`GROUP_ADVANTAGES`) come on their group's own scale and stay as they are.

    `batch` calls half of every phase bad, however good it was; `running` does not, because what is
    usual is remembered. `robust` is for rare large rewards, which make all else vanish in a
    standard deviation.

    Args:
        kind: one of these.
    """

    KINDS = ("raw", "batch", "running", "robust", *GROUP_ADVANTAGES)

    def __init__(self, kind: str) -> None:
        assert kind in self.KINDS, kind
        self._kind = kind
        self._count, self._mean, self._variance = 0.0, 0.0, 0.0

    def __call__(self, raw: np.ndarray) -> np.ndarray:
        """`[N]` normalised, N >= 1; `running` learns from them first."""
        if self._kind in ("raw", *GROUP_ADVANTAGES):
            return raw
        if self._kind == "running":
            self._remember(raw)
            return (raw - self._mean) / (math.sqrt(self._variance) + _TINY)
        if len(raw) == 1:
            return raw
        if self._kind == "batch":
            return (raw - raw.mean()) / (raw.std() + _TINY)

        low, median, high = np.quantile(raw, [0.25, 0.5, 0.75])
        spread = (high - low) / _IQR_OF_NORMAL or raw.std()
        return ((raw - median) / (spread + _TINY)).clip(-_FURTHEST, _FURTHEST)

    def _remember(self, raw: np.ndarray) -> None:
        """Two groups' moments as those of one (Chan et al. 1979); the older one's size is bounded,
        so that it fades.
        """
        old, new = min(self._count, _MEMORY), len(raw)
        share, gap = new / (old + new), raw.mean() - self._mean
        self._variance = float(
            (1 - share) * self._variance + share * raw.var() + share * (1 - share) * gap**2
        )
        self._mean = float(self._mean + share * gap)
        self._count = float(old + new)

    def state_dict(self) -> dict[str, float]:
        """What `running` remembers."""
        return {"count": self._count, "mean": self._mean, "variance": self._variance}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Undo `state_dict`."""
        self._count, self._mean, self._variance = (
            state[name] for name in ("count", "mean", "variance")
        )
