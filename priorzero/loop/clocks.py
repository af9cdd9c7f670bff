"""Clocks: what is due when. They count nothing themselves, so a resumed run needs no state of
theirs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Every:
    """Due at steps `phase`, `phase + n`, `phase + 2 n`, ...

    Args:
        n: the distance; 0 is never.
        phase: the first step that is due.
    """

    n: int
    phase: int = 0

    def __call__(self, step: int) -> bool:
        return self.n > 0 and step >= self.phase and (step - self.phase) % self.n == 0


@dataclass(frozen=True)
class Ratio:
    """How many updates so many new transitions call for, rounded up.

    Args:
        r: updates per transition.
    """

    r: float

    def __call__(self, transitions: int) -> int:
        return math.ceil(self.r * transitions)
