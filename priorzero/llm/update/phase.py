"""The LLM's training phase: decisions from the buffer -> SFT and RFT updates -> every engine
answers with the new weights.

SFT pulls the LLM's distribution over the valid actions towards the search's visits. RFT is
PPO-style (arXiv:1707.06347) with A = n-step return - predicted value, both from the world model,
normalised over the phase. Actions were drawn from the search's distribution mu, not from the LLM's
pi, so each sample is weighted with min(c, pi_old(a|s) / mu(a|s)) (truncated importance sampling as
in IMPALA, arXiv:1802.01561).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from priorzero.data.batch import LLMSample
from priorzero.llm.engines.base import LLMEngine, LLMEngineError
from priorzero.llm.prior import LLMPrior
from priorzero.llm.scoring.requests import ScoreRequest
from priorzero.llm.update.trainers.builtin import LLMTrainer, RFTSample, SFTSample
from priorzero.llm.weights.canary import push_and_verify
from priorzero.search.root_prior import log_softmax
from priorzero.types import PriorZeroError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LLMPhase:
    """Metrics of one training phase, ready for the `llm/` namespace."""

    metrics: dict[str, float]


def sft_samples(samples: Sequence[LLMSample], prior: LLMPrior) -> list[SFTSample]:
    """State and visit distribution; scored exactly as the engine scored it, chain of thought
    included.
    """
    return [
        SFTSample(_request(s, prior), tuple(float(p) for p in s.target_policy)) for s in samples
    ]


def rft_samples(
    samples: Sequence[LLMSample], prior: LLMPrior, trainer: LLMTrainer, max_importance: float
) -> list[RFTSample]:
    """State, executed action, normalised advantage, truncated importance weight; old log-probs by
    the trainer itself.

    Args:
        max_importance: c of the weight; 0 gives every sample the weight 1.
    """
    if not samples:
        return []
    requests = [_request(s, prior) for s in samples]
    reduction = trainer.settings.reduction
    policies = [log_softmax(np.asarray(s.totals(reduction))) for s in trainer.score(requests)]
    raw = np.asarray([s.advantage for s in samples])
    advantages = (raw - raw.mean()) / (raw.std() + 1e-6) if len(raw) > 1 else raw
    result = []
    for sample, request, log_pi, advantage in zip(
        samples, requests, policies, advantages, strict=True
    ):
        weight = 1.0
        if max_importance > 0:
            weight = float(
                min(
                    max_importance,
                    np.exp(log_pi[sample.action_index]) / sample.behaviour[sample.action_index],
                )
            )
        reference = ()
        if sample.prior_logprobs is not None:
            totals = [
                sum(t) if reduction == "sum" else sum(t) / len(t) for t in sample.prior_logprobs
            ]
            reference = tuple(log_softmax(np.asarray(totals)).tolist())
        result.append(
            RFTSample(
                request,
                sample.action_index,
                float(advantage),
                float(log_pi[sample.action_index]),
                weight,
                reference,
            )
        )
    return result


def _request(sample: LLMSample, prior: LLMPrior) -> ScoreRequest:
    request = prior.request(sample.state, sample.valid_actions)
    return request.with_reasoning(sample.reasoning) if sample.reasoning else request


class LLMLearner:
    """Owns the trainer; called once per LLM training phase.

    Args:
        settings: the `llm` group of the settings.
        trainer, engine, prior: the parts.
    """

    def __init__(self, settings, trainer: LLMTrainer, engine: LLMEngine, prior: LLMPrior) -> None:
        self._settings, self.trainer, self._engine, self._prior = settings, trainer, engine, prior
        self._canary: ScoreRequest | None = None

    async def train(self, sample) -> LLMPhase | None:
        """One phase; None where the buffer has no decision to learn from.

        Args:
            sample: ``(count, recent) -> list[LLMSample]``, the buffer's `sample_llm`.
        Raises:
            PriorZeroError: the loss or a gradient is not finite, or the engine does not take over
                the weights.
        """
        metrics: dict[str, float] = {}
        await self._engine.sleep()
        try:
            if self._settings.sft.enable:
                drawn = sft_samples(
                    sample(self._settings.sft.samples, self._settings.sft.recent_transitions),
                    self._prior,
                )
                if drawn:
                    self._canary = drawn[0].request
                    metrics |= _prefixed(
                        "sft", await asyncio.to_thread(self.trainer.sft_update, drawn)
                    )
            if self._settings.rft.enable:
                chosen = sample(self._settings.rft.samples, self._settings.rft.recent_transitions)
                drawn = await asyncio.to_thread(
                    rft_samples,
                    chosen,
                    self._prior,
                    self.trainer,
                    self._settings.rft.max_importance,
                )
                if drawn:
                    self._canary = drawn[0].request
                    metrics |= _prefixed(
                        "rft", await asyncio.to_thread(self.trainer.rft_update, drawn)
                    )
                    metrics["rft_advantage_raw"] = float(np.mean([s.advantage for s in chosen]))
        finally:
            await self._engine.wake()
        if not metrics:
            return None
        metrics |= _prefixed("push", await self.publish())
        return LLMPhase(metrics)

    def stats(self) -> dict[str, float]:
        """Counters of the trainer's caches since the start."""
        return self.trainer.trunk.stats() if self.trainer.trunk is not None else {}

    async def publish(self) -> dict[str, float]:
        """Hand the trainer's weights to the engine and check one state against the trainer's own
        forward.

        Raises:
            PriorZeroError: the engine answers with other weights, or not at all.
        """
        try:
            return await push_and_verify(self._engine, self.trainer, self._canary)
        except LLMEngineError as error:
            raise PriorZeroError(
                f"the LLM engine did not take over the trained weights: {error}. The last checkpoint "
                "stands; continue it with --resume, or use --engine transformers"
            ) from error


def _prefixed(prefix: str, values: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}_{name}": float(value) for name, value in values.items()}
