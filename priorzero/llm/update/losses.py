"""Losses that train the LLM: pure functions of the numbers of one decision, in natural logs.

Letters: `A` valid actions of the state, `U` units of a decision that have a ratio of their own
(`priorzero/llm/update/objectives`). `totals` [A] are the summed (or mean) token log-probabilities
of the actions; the policy over the valid actions is their softmax, as in the root prior.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


def sft_action_loss(
    totals: torch.Tensor, target: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """Cross-entropy -sum_a target_a log softmax(totals / temperature)_a (scalar); its minimum is
    the entropy of `target` [A].
    """
    return -(target * (totals / temperature).log_softmax(-1)).sum()


def sft_token_loss(sums: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Expected negative log-likelihood -sum_a target_a log P(tokens of a) (scalar): language
    modelling of the searched actions. Unlike `sft_action_loss` it also pulls probability away from
    texts that are no valid action.
    """
    return -(target * sums).sum()


def entropy(log_policy: torch.Tensor) -> torch.Tensor:
    """Entropy of a distribution given as log-probabilities [A]."""
    return -(log_policy.exp() * log_policy).sum()


def entropy_of(probabilities: torch.Tensor) -> torch.Tensor:
    """Entropy of a distribution that may hold zeros [A]."""
    return torch.special.entr(probabilities).sum()


def kl_divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) = sum_a p_a (log p_a - log q_a) of two log-distributions [A] (scalar)."""
    return (log_p.exp() * (log_p - log_q)).sum()


class Surrogate(NamedTuple):
    """`[U]` each: what is maximised, the ratio new / old, and whether the clip cut the gradient."""

    value: torch.Tensor
    ratio: torch.Tensor
    clipped: torch.Tensor


def clipped_surrogate(
    log_ratio: torch.Tensor,
    advantage: torch.Tensor,
    *,
    low: float,
    high: float,
    dual: float = 0.0,
) -> Surrogate:
    """Clipped surrogate of units with `log_ratio` [U] = log pi - log pi_old and `advantage` [U].

        r = exp(log_ratio)
        value = min(r * A, clip(r, 1 - low, 1 + high) * A)          PPO, arXiv:1707.06347, eq. 7
        value = max(value, dual * A) where A < 0, if dual > 1        dual clip, arXiv:1912.09729

    `high` > `low` lets unlikely actions grow more (clip-higher, DAPO, arXiv:2503.14476). Without
    the dual clip a bad action whose probability has grown a lot is punished without bound.
    """
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1 - low, 1 + high) * advantage
    value = torch.minimum(ratio * advantage, bounded)
    clipped = bounded < ratio * advantage
    if dual > 1:
        floor = dual * advantage
        below = (advantage < 0) & (value < floor)
        value, clipped = torch.where(below, floor, value), clipped | below
    return Surrogate(value, ratio, clipped)


def reinforce_surrogate(
    value: torch.Tensor, log_ratio: torch.Tensor, advantage: torch.Tensor
) -> Surrogate:
    """REINFORCE with a baseline (Williams 1992): `advantage` [U] * `value` [U], which is log pi.

    Its gradient is that of the clipped surrogate where the policy is still the old one. The ratio
    is told, and plays no part.
    """
    return Surrogate(advantage * value, log_ratio.exp(), torch.zeros_like(value, dtype=torch.bool))


def approx_kl(log_ratio: torch.Tensor) -> torch.Tensor:
    """KL(old || new) from actions of the old policy: exp(log_ratio) - 1 - log_ratio (k3)."""
    return log_ratio.exp() - 1 - log_ratio


def kl_estimate(log_p: torch.Tensor, log_q: torch.Tensor, estimator: str) -> torch.Tensor:
    """Estimates of KL(p || q) from what was drawn from p (http://joschu.net/blog/kl-approx.html).

        d = log q - log p         k1 = -d         k2 = d^2 / 2         k3 = exp(d) - 1 - d

    As a loss over p's own draws, k2 has the gradient of KL(p || q) and k3 that of KL(q || p); k1's
    is zero in the mean, so it belongs into the reward (arXiv:2506.09477), see `RFT`.
    """
    difference = log_q - log_p
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference.square() / 2
    assert estimator == "k3", estimator
    return difference.exp() - 1 - difference
