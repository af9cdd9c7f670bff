"""A cache of scored states around any engine: a state met again under the same weights is free."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

from priorzero.llm.engines.base import LLMEngine
from priorzero.llm.weights.export import Weights
from priorzero.types import ActionScores, TokenisedRequest


class CachedEngine(LLMEngine):
    """Least-recently-used cache keyed by (request, weights version); emptied with new weights.

    Requests with reasoning are kept only at reasoning temperature 0, where asking again would give
    the same thought.

    Args:
        inner: the engine that computes.
        capacity: scored states kept; one takes roughly 2 KB with 12 actions.
    """

    def __init__(self, inner: LLMEngine, capacity: int) -> None:
        super().__init__(inner.tokeniser, inner.reasoner)
        self.inner = inner
        self.capacity = capacity
        self._kept: OrderedDict[tuple[TokenisedRequest, int], ActionScores] = OrderedDict()

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def dtype(self):
        return self.inner.dtype

    @property
    def max_tokens(self) -> int:
        return self.inner.max_tokens

    @property
    def answers_apart(self) -> bool:
        return self.inner.answers_apart

    @property
    def thought_calls(self) -> int:
        return self.inner.thought_calls

    @thought_calls.setter
    def thought_calls(self, calls: int) -> None:
        self.inner.thought_calls = calls

    async def score(self, requests: Sequence[TokenisedRequest]) -> list[ActionScores]:
        """As the inner engine, with `cached=True` on what was not computed again."""
        requests = list(requests)
        answers: list[ActionScores | None] = [None] * len(requests)
        for i, request in enumerate(requests):
            key = (request, self.inner.weights_version)
            if key in self._kept:
                self._kept.move_to_end(key)
                answers[i] = replace(self._kept[key], cached=True)

        missing = [i for i, answer in enumerate(answers) if answer is None]
        self.counters["cache_hits"] += len(requests) - len(missing)
        self.counters["cache_misses"] += len(missing)
        if missing:
            fresh = await self.inner.score([requests[i] for i in missing])
            for i, scores in zip(missing, fresh, strict=True):
                answers[i] = scores
                self._keep(requests[i], scores)
        return answers

    def _keep(self, request: TokenisedRequest, scores: ActionScores) -> None:
        sampled = request.reasoning and self.reasoner.temperature > 0
        outdated = scores.weights_version != self.inner.weights_version  # changed meanwhile
        if sampled or outdated:
            return
        self._kept[(request, scores.weights_version)] = scores
        if len(self._kept) > self.capacity:
            self._kept.popitem(last=False)

    async def generate(self, prompts, max_new_tokens, temperature=1.0, stop=(), seed=None):
        return await self.inner.generate(prompts, max_new_tokens, temperature, stop, seed)

    async def push_weights(self, weights: Weights, version: int) -> dict[str, float]:
        self._kept.clear()
        report = await self.inner.push_weights(weights, version)
        self._kept.clear()
        self.weights_version = self.inner.weights_version
        return report

    async def sleep(self) -> None:
        await self.inner.sleep()

    async def wake(self) -> None:
        await self.inner.wake()

    async def close(self) -> None:
        await self.inner.close()

    async def _score_tokens(self, requests):
        return await self.inner._score_tokens(requests)

    async def _generate_tokens(self, prompts, max_new_tokens, temperature, stop, seed):
        return await self.inner._generate_tokens(prompts, max_new_tokens, temperature, stop, seed)

    def stats(self) -> dict[str, float]:
        """The inner engine's counters, and hits, misses, size and hit rate of the cache."""
        asked = self.counters["cache_hits"] + self.counters["cache_misses"]
        return (
            self.inner.stats()
            | super().stats()
            | {
                "cache_size": float(len(self._kept)),
                "cache_hit_rate": self.counters["cache_hits"] / asked if asked else 0.0,
            }
        )
