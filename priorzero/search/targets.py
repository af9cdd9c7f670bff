"""Training targets from a finished search: pure functions of the root's statistics."""

from __future__ import annotations

import numpy as np


def visit_shares(visit_counts: np.ndarray) -> np.ndarray:
    """`[A]` visit counts -> `[A]` shares, which sum to one (AlphaZero, arXiv:1712.01815)."""
    total = visit_counts.sum()
    assert total > 0, "a search of no simulations has no target"
    return visit_counts / total
