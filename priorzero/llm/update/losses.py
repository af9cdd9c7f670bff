"""Losses that train the LLM: pure functions of one state's action totals, in natural logs.

Letters: `A` valid actions of the state. ``totals`` [A] are the summed (or mean) token
log-probabilities of the actions; the policy over the valid actions is their softmax, as in the root
prior.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


def sft_action_loss(totals: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy -sum_a target_a log softmax(totals)_a (scalar); its minimum is the entropy of
    ``target`` [A].
    """
    return -(target * totals.log_softmax(-1)).sum()


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


@dataclass(frozen=True)
class PolicyGradientTerms:
    """The parts of the RFT loss of one state; scalars with gradients where they have any."""

    loss: torch.Tensor
    policy_loss: torch.Tensor
    ratio: torch.Tensor
    approx_kl: torch.Tensor
    clipped: bool
    entropy: torch.Tensor
    kl_reference: torch.Tensor


def rft_loss(
    totals: torch.Tensor,
    action: int,
    advantage: float,
    old_logprob: float,
    *,
    weight: float = 1.0,
    clip_epsilon: float = 0.2,
    reference: torch.Tensor | None = None,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
) -> PolicyGradientTerms:
    """Clipped policy-gradient loss (PPO, arXiv:1707.06347, eq. 7) on the policy over the valid
    actions.

        r = exp(log pi(action) - old_logprob)
        loss = weight * -min(r * advantage, clip(r, 1 - eps, 1 + eps) * advantage)
               + kl_coef * KL(pi || reference) - entropy_coef * H(pi)

    ``weight`` corrects for a behaviour policy (search) other than the one ``old_logprob`` speaks
    of. ``reference`` [A] are stored log-probabilities of a reference policy over the same actions.
    KL and entropy are exact, not sampled; ``approx_kl`` of old from new policy is (estimator k3,
    http://joschu.net/blog/kl-approx.html).
    """
    log_policy = totals.log_softmax(-1)
    log_ratio = log_policy[action] - old_logprob
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1 - clip_epsilon, 1 + clip_epsilon)
    policy_loss = -weight * torch.minimum(ratio * advantage, bounded * advantage)
    spread = entropy(log_policy)
    kl = kl_divergence(log_policy, reference) if reference is not None else torch.zeros_like(spread)
    loss = policy_loss + kl_coef * kl - entropy_coef * spread
    clipped = bool(bounded.detach() * advantage < ratio.detach() * advantage)
    approx_kl = ratio - 1 - log_ratio
    return PolicyGradientTerms(loss, policy_loss, ratio, approx_kl, clipped, spread, kl)
