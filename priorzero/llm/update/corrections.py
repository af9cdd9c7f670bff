"""Weights for decisions that were not drawn from the policy that learns.

Three things stand between the two: the search chose the action, another program computed the LLM
(engine against trainer), and the weights have changed since. The first two are weights, given here;
decisions that are too old are left out by `priorzero/llm/update/phase.py`.
"""

from __future__ import annotations

import torch


def search_weight(chosen: float, drawn: float, limit: float) -> float:
    """Truncated importance sampling, as in IMPALA (arXiv:1802.01561): min(limit, pi / mu).

    Args:
        chosen: pi, what the LLM gave to the action before the phase.
        drawn: mu, the probability with which the search's distribution gave it; positive.
        limit: 0 switches the correction off: weight 1.
    """
    return min(limit, chosen / drawn) if limit > 0 else 1.0


def mismatch_weight(
    kind: str, drawn_gap: torch.Tensor, value_gap: torch.Tensor, low: float, high: float
) -> torch.Tensor:
    """Weights `[U]` for units that the engine drew and the trainer computes differently.

        k = exp(log pi_trainer - log pi_engine), both before the phase

        off        1
        truncate   min(high, k)                            token-level truncated importance sampling
        mask       k where low <= k <= high, else 0        IcePop, arXiv:2510.18855

    Args:
        drawn_gap: `[U]` log k of that part of each unit which the engine itself drew: it is what is
            weighted.
        value_gap: `[U]` log k of the whole unit: it is what is masked.
    """
    if kind == "off":
        return torch.ones_like(value_gap)
    if kind == "truncate":
        return drawn_gap.exp().clamp(max=high)
    assert kind == "mask", kind
    ratio = value_gap.exp()
    return torch.where((ratio >= low) & (ratio <= high), drawn_gap.exp(), 0.0)


def effective_share(weights: torch.Tensor) -> float:
    """Effective sample size of weights `[N]` as a share of N: (sum w)^2 / (N sum w^2), 0 if all
    are 0 (Kish 1965).
    """
    squares = float(weights.square().sum())
    return float(weights.sum()) ** 2 / (len(weights) * squares) if squares else 0.0
