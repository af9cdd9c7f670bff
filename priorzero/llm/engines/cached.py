"""A cache of scored states around any engine: a state seen again under the same weights costs
nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

from priorzero.llm.engines.base import LLMEngine
from priorzero.llm.scoring.requests import ScoreRequest
from priorzero.types import ActionScores


class CachedEngine(LLMEngine):
    """Least-recently-used cache keyed by (prompt, actions, weights version); emptied when the
    weights change.

    Requests with reasoning are kept only at reasoning temperature 0, where asking again would give
    the same text.

    :param capacity: scored states kept; one takes roughly 2 KB with 12 actions.
    """

    def __init__(self, inner: LLMEngine, capacity: int = 20_000) -> None:
        super().__init__(inner.text, inner.reasoning)
        self.inner = inner
        self.capacity = capacity
        self._kept: OrderedDict[tuple[ScoreRequest, int], ActionScores] = OrderedDict()

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def dtype(self):
        return self.inner.dtype

    @property
    def prompt_alignment(self) -> int:
        return self.inner.prompt_alignment

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ActionScores]:
        """As the inner engine, with ``cached=True`` on what was not computed again."""
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
            for i, scores in zip(
                missing, await self.inner.score([requests[i] for i in missing]), strict=True
            ):
                answers[i] = scores
                self._keep(requests[i], scores)
        return answers

    def _keep(self, request: ScoreRequest, scores: ActionScores) -> None:
        sampled = request.reasoning and self.reasoning.temperature > 0
        if (
            sampled or scores.weights_version != self.inner.weights_version
        ):  # the weights changed while it was computed
            return
        self._kept[(request, scores.weights_version)] = scores
        if len(self._kept) > self.capacity:
            self._kept.popitem(last=False)

    async def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        temperature: float = 1.0,
        stop: Sequence[str] = (),
        seed: int | None = None,
    ) -> list[str]:
        return await self.inner.generate(prompts, max_new_tokens, temperature, stop, seed)

    async def push_weights(self, model, version: int) -> dict[str, float]:
        self._kept.clear()
        report = await self.inner.push_weights(model, version)
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
        """The inner engine's counters plus cache_hits, cache_misses, cache_size and cache_hit_rate."""
        asked = self.counters["cache_hits"] + self.counters["cache_misses"]
        return (
            self.inner.stats()
            | super().stats()
            | {
                "cache_size": float(len(self._kept)),
                "cache_hit_rate": self.counters["cache_hits"] / asked if asked else 0.0,
            }
        )
