"""Reinforcement of the LLM by the world model's advantages (RFT): what all its objectives share.

A decision has units (`Units`), each with a ratio of new to old policy; which ones, says the
objective (`priorzero/llm/update/objectives`). Everything else about a decision is here: advantage,
corrections, clipping, KL, entropy. docs/ALGORITHM.md has the equations on one page.

Letters: `A` valid actions of the state, `U` units of a decision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch

from priorzero.llm.update.advantages import Advantages
from priorzero.llm.update.corrections import effective_share, mismatch_weight, search_weight
from priorzero.llm.update.losses import (
    Surrogate,
    approx_kl,
    clipped_surrogate,
    entropy,
    kl_divergence,
    kl_estimate,
    reinforce_surrogate,
)
from priorzero.llm.update.objective import Answer, Metrics, Objective, Score
from priorzero.llm.update.samples import LLMSample

if TYPE_CHECKING:
    from priorzero.settings.llm import LLMTrainSettings, RFTSettings


class Units(NamedTuple):
    """What of a decision is rated, `[U]` each.

    Attributes:
        value: log-probability whose difference to the old one is the log-ratio.
        drawn: the part of it that the LLM's engine drew: a thought's tokens. The action was drawn
            by the search.
        share: how much the unit counts in the loss.
        thought: True where it is the thought that the unit rates: the format reward is for these.
    """

    value: torch.Tensor
    drawn: torch.Tensor
    share: torch.Tensor
    thought: torch.Tensor


class Rating(Protocol):
    """An objective's own part."""

    def units(self, answer: Answer, action: int) -> Units:
        """The units of a decision in which `action` was played."""
        ...


@dataclass(frozen=True)
class RFTTarget:
    """What reinforcement needs of one decision.

    Attributes:
        action: index of the executed action.
        advantage: `[U]`, normalised over the phase.
        old: `[U]` values of the units before the phase.
        weight: `[U]` of the corrections.
        reference: of the KL: `[A]` log-probabilities over the valid actions for the exact one,
            `[U]` values of the units for an estimate; None where they are unknown.
    """

    action: int
    advantage: torch.Tensor
    old: torch.Tensor
    weight: torch.Tensor
    reference: torch.Tensor | None

    def __post_init__(self) -> None:
        for numbers in (self.advantage, self.old, self.weight):
            assert numbers.shape == self.old.shape and numbers.isfinite().all(), f"{self}"

    def like(self, tensor: torch.Tensor) -> RFTTarget:
        """The same numbers on that tensor's device and in its dtype."""
        numbers = (self.advantage, self.old, self.weight)
        reference = None if self.reference is None else self.reference.to(tensor)
        return RFTTarget(self.action, *(n.to(tensor) for n in numbers), reference)


class KLCoefficient:
    """The KL's weight: fixed, or doubled and halved towards a target (PPO, arXiv:1707.06347, 4).

    Args:
        start: its first value.
        target: of the KL in nats; 0: the weight stays.
    """

    _RANGE = 1024.0  # times the first value, up and down

    def __init__(self, start: float, target: float) -> None:
        self.value, self._start, self._target = start, start, target

    def adapt(self, kl: float) -> None:
        """After a phase with this mean KL."""
        if self._target and kl > 1.5 * self._target:
            self.value = min(self.value * 2, self._start * self._RANGE)
        elif self._target and kl < self._target / 1.5:
            self.value = max(self.value / 2, self._start / self._RANGE)


class RFT(Objective):
    """Policy gradient on the units of an objective: clipped (PPO, arXiv:1707.06347) or REINFORCE.

        loss = -sum_u share_u w_u surrogate_u + kl_coef KL - entropy_coef H

    A = n-step return - predicted value, both from the world model (`Advantages`). w: see
    `priorzero/llm/update/corrections.py`; the search's draw is weighted with pi / mu, which holds
    whatever computed pi, so the engine's mismatch counts for what the engine drew itself, and for
    the action only where the search's draw is not corrected. Old log-probabilities come from the
    trainer's own forward: engines in 16 bits are too noisy for ratios.

    `format_reward` rewards a thought that the LLM ended itself. Its baseline is the phase's share
    of such thoughts, so that it teaches nothing where all end, or none; it is added to the
    normalised advantage of the thought's units.

    KL: `exact` is KL(pi || reference) over the valid actions; the estimates k2 and k3 are over the
    units; k1 is taken off the advantages, as a loss it would do nothing. H is the entropy over the
    valid actions.

    Metrics: loss, policy_loss, ratio, clip_fraction, approx_kl (old || new), kl_reference, entropy;
    of the phase: advantage_raw (mean before normalisation), kl_coef, importance_* (of the search's
    draw) and mismatch_*; where there are thoughts, reasoning_ended (share of those the LLM ended).

    Args:
        settings: the `llm.rft` group.
        train: the `llm.train` group.
        reduction: how token log-probabilities become one number per action, "sum" or "mean"; the
            same as the root prior's.
        rating: the objective's own part.
    """

    def __init__(
        self, settings: RFTSettings, train: LLMTrainSettings, reduction: str, rating: Rating
    ) -> None:
        self._settings, self._train, self._reduction = settings, train, reduction
        self._rating = rating
        self._advantages = Advantages(settings.advantage)
        self._kl_coef = KLCoefficient(train.kl_coef, settings.kl_target)
        self.passes = settings.epochs
        self.thoughts = settings.cot_weight > 0
        self.initial = settings.kl_reference == "initial"

    # ---- before the first step -------------------------------------------------------------------

    def prepare(
        self, samples: Sequence[LLMSample], score: Score
    ) -> tuple[list[RFTTarget], Metrics]:
        olds = score(samples, thoughts=self.thoughts)
        collected = [Answer.collected(s) for s in samples]
        references = collected
        if self.initial:
            references = score(samples, thoughts=self.thoughts, initial=True)

        raw = np.asarray([s.advantage for s in samples])
        advantages = self._advantages(raw)
        importance = [self._importance(s, old) for s, old in zip(samples, olds, strict=True)]
        mismatch = [self._mismatch(*row) for row in zip(samples, olds, collected, strict=True)]
        ended = _ended_share(samples)
        rows = zip(samples, olds, references, advantages, importance, mismatch, strict=True)
        targets = [
            self._target(
                sample,
                old,
                reference,
                float(advantage),
                self._settings.format_reward * (sample.thought_ended - ended),
                weight * units,
            )
            for sample, old, reference, advantage, weight, units in rows
        ]
        metrics = {"advantage_raw": float(raw.mean()), "kl_coef": self._kl_coef.value}
        if any(s.thought_tokens for s in samples):
            metrics["reasoning_ended"] = ended
        metrics |= self._of_importance(importance)
        return targets, metrics | self._of_mismatch(samples, olds, collected, mismatch)

    def _importance(self, sample: LLMSample, old: Answer) -> float:
        action = sample.action_index
        chosen = float(old.policy(self._reduction)[action].exp())
        return search_weight(chosen, sample.behaviour[action], self._settings.max_importance)

    def _gap(self, sample: LLMSample, old: Answer, collected: Answer) -> Units:
        """log pi_trainer - log pi_engine of each unit, both before the phase."""
        ours = self._rating.units(old, sample.action_index)
        theirs = self._rating.units(collected, sample.action_index)
        return ours._replace(value=ours.value - theirs.value, drawn=ours.drawn - theirs.drawn)

    def _mismatch(self, sample: LLMSample, old: Answer, collected: Answer | None) -> torch.Tensor:
        """`[U]` weights; 1 where the engine's numbers are unknown."""
        s = self._settings
        if collected is None:
            return torch.ones_like(self._rating.units(old, sample.action_index).value)
        gap = self._gap(sample, old, collected)
        # Without the search's correction its choice passes for the LLM's own.
        drawn = gap.drawn if s.max_importance > 0 else gap.value
        return mismatch_weight(s.mismatch, drawn, gap.value, s.mismatch_low, s.mismatch_high)

    def _target(
        self,
        sample: LLMSample,
        old: Answer,
        reference: Answer | None,
        advantage: float,
        bonus: float,
        weight: torch.Tensor,
    ) -> RFTTarget:
        units = self._rating.units(old, sample.action_index)
        advantages = torch.full_like(units.value, advantage)
        advantages[units.thought] += bonus
        if reference is None:
            return RFTTarget(sample.action_index, advantages, units.value, weight, None)

        if self._settings.kl_estimator == "exact":
            known = reference.policy(self._reduction)
        else:
            known = self._rating.units(reference, sample.action_index).value
        if self._settings.kl_estimator == "k1":
            advantages -= self._kl_coef.value * kl_estimate(units.value, known, "k1")
        return RFTTarget(sample.action_index, advantages, units.value, weight, known)

    def _of_importance(self, weights: Sequence[float]) -> Metrics:
        limit, values = self._settings.max_importance, torch.tensor(weights, dtype=torch.float64)
        return {
            "importance_mean": float(values.mean()),
            "importance_ess": effective_share(values),
            "importance_truncated": float((values >= limit).double().mean()) if limit else 0.0,
        }

    def _of_mismatch(
        self,
        samples: Sequence[LLMSample],
        olds: Sequence[Answer],
        collected: Sequence[Answer | None],
        weights: Sequence[torch.Tensor],
    ) -> Metrics:
        rows = zip(samples, olds, collected, strict=True)
        gaps = [self._gap(s, old, given).value for s, old, given in rows if given is not None]
        values = torch.cat(list(weights))
        return {
            "mismatch_gap": float(torch.cat(gaps).abs().mean()) if gaps else 0.0,
            "mismatch_mean": float(values.mean()),
            "mismatch_ess": effective_share(values),
            "mismatch_masked": float((values == 0).double().mean()),
        }

    # ---- one decision ----------------------------------------------------------------------------

    def loss(self, answer: Answer, prepared: RFTTarget) -> tuple[torch.Tensor, Metrics]:
        target = prepared.like(answer.actions)
        units = self._rating.units(answer, target.action)
        log_ratio = units.value - target.old
        surrogate = self._surrogate(units.value, log_ratio, target.advantage)
        policy_loss = -(units.share * target.weight * surrogate.value).sum()

        log_policy = answer.policy(self._reduction)
        spread = entropy(log_policy)
        kl = self._kl(units, log_policy, target)
        # k1 is in the advantages already.
        pull = kl.detach() * 0 if self._settings.kl_estimator == "k1" else kl
        loss = policy_loss + self._kl_coef.value * pull - self._train.entropy_coef * spread

        def mean(values: torch.Tensor) -> torch.Tensor:
            return (units.share * values.detach()).sum() / units.share.sum()

        return loss, {
            "loss": loss.detach(),
            "policy_loss": policy_loss.detach(),
            "ratio": mean(surrogate.ratio),
            "clip_fraction": mean(surrogate.clipped.float()),
            "approx_kl": mean(approx_kl(log_ratio)),
            "kl_reference": kl.detach(),
            "entropy": spread.detach(),
        }

    def _surrogate(
        self, value: torch.Tensor, log_ratio: torch.Tensor, advantage: torch.Tensor
    ) -> Surrogate:
        if self._settings.surrogate == "reinforce":
            return reinforce_surrogate(value, log_ratio, advantage)
        low, high = self._train.clip_epsilon, self._settings.clip_epsilon_high
        return clipped_surrogate(
            log_ratio,
            advantage,
            low=low,
            high=low if high is None else high,
            dual=self._settings.dual_clip,
        )

    def _kl(self, units: Units, log_policy: torch.Tensor, target: RFTTarget) -> torch.Tensor:
        """KL of the policy from its reference, a scalar; 0 where there is none."""
        if target.reference is None:
            return torch.zeros_like(log_policy.sum())
        if self._settings.kl_estimator == "exact":
            return kl_divergence(log_policy, target.reference)
        estimates = kl_estimate(units.value, target.reference, self._settings.kl_estimator)
        return (units.share * target.weight * estimates).sum()

    # ---- around the steps ------------------------------------------------------------------------

    def stops(self, step: Mapping[str, float]) -> bool:
        """See `Objective.stops`: the policy has moved further than `max_kl` from the old one."""
        limit = self._settings.max_kl
        return 0 < limit < step["approx_kl"]

    def finish(self, means: Mapping[str, float]) -> None:
        self._kl_coef.adapt(means["kl_reference"])

    def state_dict(self) -> dict[str, float]:
        return {"kl_coef": self._kl_coef.value} | self._advantages.state_dict()

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        # Where it is fixed the setting decides, which a resumed run may have another of.
        if self._settings.kl_target:
            self._kl_coef.value = state["kl_coef"]
        self._advantages.load_state_dict(state)


def _ended_share(samples: Sequence[LLMSample]) -> float:
    """Share of the thoughts that the LLM ended itself; 0 where there are none."""
    ended = [s.thought_ended for s in samples if s.thought_tokens]
    return sum(ended) / len(ended) if ended else 0.0
