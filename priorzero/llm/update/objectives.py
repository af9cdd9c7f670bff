"""What the LLM is trained for: small classes over the same samples.

An objective first prepares a phase (what has to be known before the first step), then gives the
loss of one decision after the other. It knows nothing of batches, optimisers or models.

Letters: `A` valid actions of a state, `K` tokens of all its actions one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from priorzero.llm.scoring.logits import action_totals
from priorzero.llm.update.losses import entropy_of, rft_loss, sft_action_loss, sft_token_loss
from priorzero.llm.update.samples import LLMSample
from priorzero.types import ActionScores, TokenisedRequest

if TYPE_CHECKING:
    from priorzero.settings.llm import LLMSettings

Score = Callable[[Sequence[TokenisedRequest]], list[ActionScores]]
Metrics = dict[str, Any]


class Objective(Protocol):
    """One way to learn from decisions."""

    def prepare(self, samples: Sequence[LLMSample], score: Score) -> tuple[list[Any], Metrics]:
        """Before the first step of a phase.

        Args:
            samples: All decisions of the phase, at least one.
            score: Scores requests with the weights as they are before the phase.

        Returns:
            What `loss` needs of each sample, and metrics of the whole phase.
        """
        ...

    def loss(
        self, logprobs: torch.Tensor, request: TokenisedRequest, prepared: Any
    ) -> tuple[torch.Tensor, Metrics]:
        """Loss of one decision, and metrics that are averaged over the decisions of a phase.

        Args:
            logprobs: `[K]` token log-probabilities with gradients.
            request: The decision's token ids.
            prepared: What `prepare` gave for it.
        """
        ...


def make_objectives(settings: LLMSettings, reduction: str) -> dict[str, Objective]:
    """The objectives that are switched on, by name, in the order in which they are trained.

    Args:
        reduction: How token log-probabilities become one number per action, "sum" or "mean"; the
            same as the root prior's.
    """
    objectives: dict[str, Objective] = {}
    if settings.sft.enable:
        objectives["sft"] = SFT(settings.train.objective, reduction)
    if settings.rft.enable:
        objectives["rft"] = RFT(
            reduction,
            clip_epsilon=settings.train.clip_epsilon,
            kl_coef=settings.train.kl_coef,
            entropy_coef=settings.train.entropy_coef,
            max_importance=settings.rft.max_importance,
        )
    return objectives


class SFT:
    """Towards the search's policy over the valid actions.

    Metrics: cross_entropy (what is minimised), target_entropy (its floor: how undecided the search
    is, which no training of the LLM changes), loss (cross_entropy - target_entropy, 0 where the LLM
    has become the search), kl (KL(target || policy), equal to loss unless the loss is over tokens),
    accuracy (an argmax of the policy is an argmax of the target).

    Args:
        over: "actions": cross-entropy over the valid actions; "tokens": over their texts' tokens.
        reduction: See `make_objectives`.
    """

    def __init__(self, over: str, reduction: str) -> None:
        assert over in ("actions", "tokens"), over
        self._over, self._reduction = over, reduction

    def prepare(
        self, samples: Sequence[LLMSample], score: Score
    ) -> tuple[list[tuple[float, ...]], Metrics]:
        return [s.target_policy for s in samples], {}

    def loss(
        self, logprobs: torch.Tensor, request: TokenisedRequest, prepared: tuple[float, ...]
    ) -> tuple[torch.Tensor, Metrics]:
        target = torch.tensor(prepared, dtype=torch.float32, device=logprobs.device)  # [A]
        totals = action_totals(logprobs, request, self._reduction)  # [A]

        action_loss = sft_action_loss(totals, target)
        loss = action_loss
        if self._over == "tokens":
            loss = sft_token_loss(action_totals(logprobs, request, "sum"), target)

        floor = entropy_of(target)
        return loss, {
            "loss": loss.detach() - floor,
            "cross_entropy": loss.detach(),
            "kl": action_loss.detach() - floor,
            "target_entropy": floor,
            "accuracy": target[totals.argmax()] >= target.max() - 1e-9,
        }


@dataclass(frozen=True)
class RFTTarget:
    """What reinforcement needs of one decision.

    Attributes:
        action: Index of the executed action.
        advantage: Normalised over the phase.
        old_logprob: Log-probability of the action over the valid ones, before the phase.
        weight: Truncated importance weight.
        reference: `[A]` log-probabilities of the policy that collected; None where it is unknown.
    """

    action: int
    advantage: float
    old_logprob: float
    weight: float
    reference: tuple[float, ...] | None

    def __post_init__(self) -> None:
        numbers = (self.advantage, self.old_logprob, self.weight)
        assert np.isfinite(numbers).all(), f"not finite: {self}"


class RFT:
    """Clipped policy gradient on the policy over the valid actions (PPO, arXiv:1707.06347).

    A = n-step return - predicted value, both from the world model, normalised over the phase.
    Actions were drawn from the search's distribution mu, not from the LLM's pi, so each decision is
    weighted with min(c, pi_old(a|s) / mu(a|s)) (truncated importance sampling as in IMPALA,
    arXiv:1802.01561). Old log-probabilities come from the trainer's own forward: engines in 16 bits
    are too noisy for ratios.

    Metrics: loss, policy_loss, ratio, clip_fraction, approx_kl (old || new, estimator k3),
    kl_reference, entropy; advantage_raw: mean before normalisation.

    Args:
        reduction: See `make_objectives`.
        clip_epsilon: PPO's clip range.
        kl_coef: Of KL(pi || the policy that collected), where a sample has its log-probabilities.
        entropy_coef: Of the entropy bonus.
        max_importance: c of the weight; 0 gives every decision the weight 1.
    """

    def __init__(
        self,
        reduction: str,
        *,
        clip_epsilon: float,
        kl_coef: float,
        entropy_coef: float,
        max_importance: float,
    ) -> None:
        self._reduction = reduction
        self._clip_epsilon, self._max_importance = clip_epsilon, max_importance
        self._kl_coef, self._entropy_coef = kl_coef, entropy_coef

    def prepare(
        self, samples: Sequence[LLMSample], score: Score
    ) -> tuple[list[RFTTarget], Metrics]:
        policies = [self._log_policy(answer) for answer in score([s.request for s in samples])]
        raw = np.asarray([s.advantage for s in samples])
        advantages = (raw - raw.mean()) / (raw.std() + 1e-6) if len(raw) > 1 else raw
        targets = [
            self._target(sample, log_pi, float(advantage))
            for sample, log_pi, advantage in zip(samples, policies, advantages, strict=True)
        ]
        return targets, {"advantage_raw": float(raw.mean())}

    def _target(self, sample: LLMSample, log_pi: np.ndarray, advantage: float) -> RFTTarget:
        action = sample.action_index
        weight = 1.0
        if self._max_importance > 0:
            ratio = np.exp(log_pi[action]) / sample.behaviour[action]
            weight = float(min(self._max_importance, ratio))

        reference = None
        if sample.collected_logprobs is not None:
            collected = self._log_policy(ActionScores(sample.collected_logprobs))
            reference = tuple(collected.tolist())
        return RFTTarget(action, advantage, float(log_pi[action]), weight, reference)

    def _log_policy(self, scores: ActionScores) -> np.ndarray:
        """`[A]` log-probabilities over the valid actions.

        Not floored as the root prior's are: the loss's own are not, and their ratio would be.
        """
        totals = np.asarray(scores.totals(self._reduction))
        return totals - np.logaddexp.reduce(totals)

    def loss(
        self, logprobs: torch.Tensor, request: TokenisedRequest, prepared: RFTTarget
    ) -> tuple[torch.Tensor, Metrics]:
        reference = None
        if prepared.reference is not None:
            reference = torch.tensor(prepared.reference, device=logprobs.device)
        terms = rft_loss(
            action_totals(logprobs, request, self._reduction),
            prepared.action,
            prepared.advantage,
            prepared.old_logprob,
            weight=prepared.weight,
            clip_epsilon=self._clip_epsilon,
            reference=reference,
            kl_coef=self._kl_coef,
            entropy_coef=self._entropy_coef,
        )
        return terms.loss, {
            "loss": terms.loss.detach(),
            "policy_loss": terms.policy_loss.detach(),
            "ratio": terms.ratio.detach(),
            "clip_fraction": terms.clipped,
            "approx_kl": terms.approx_kl.detach(),
            "kl_reference": terms.kl_reference.detach(),
            "entropy": terms.entropy.detach(),
        }
