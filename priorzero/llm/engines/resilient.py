"""Keeps a run alive when its LLM engine fails: retry, restart, then another engine takes over.

A call that fails is repeated with growing pauses. An engine that is dead, or still fails after
that, is closed and started anew with the latest weights, at most `max_restarts` times in a run.
Then the fallback takes over for good, or, where there is none, the error ends the run. Each step is
logged and counted.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_after_attempt,
    wait_exponential_jitter,
)

from priorzero.llm.engines.base import LLMEngine, LLMEngineDead, LLMEngineError
from priorzero.llm.weights.export import Weights
from priorzero.types import ActionScores, PriorZeroError, TokenisedRequest

logger = logging.getLogger(__name__)
T = TypeVar("T")


class ResilientEngine(LLMEngine):
    """Engine that restarts and replaces the engine inside it.

    Args:
        engine: the running engine.
        restart: makes a fresh one of the same kind.
        fallback: makes the engine that takes over at the end, or None to end with an error.
        max_restarts: in a run.
        attempts: tries of one call before its engine counts as dead.
        first_pause_s: before the second try; later pauses grow.
    """

    def __init__(
        self,
        engine: LLMEngine,
        restart: Callable[[], Awaitable[LLMEngine]],
        fallback: Callable[[], Awaitable[LLMEngine]] | None,
        *,
        max_restarts: int,
        attempts: int,
        first_pause_s: float = 0.5,
    ) -> None:
        super().__init__(engine.tokeniser, engine.reasoner)
        self._engine = engine
        self._restart = restart
        self._fallback = fallback
        self._max_restarts = max_restarts
        self._attempts = attempts
        self._first_pause_s = first_pause_s
        self._fallen_back = False
        self._latest: tuple[Weights, int] | None = None
        self._recovering = asyncio.Lock()
        self.weights_version = engine.weights_version
        # Asked for at every start, so that a log without failures says 0 and not nothing.
        self.counters.update({"engine_retries": 0, "engine_restarts": 0, "engine_fallbacks": 0})

    @property
    def name(self) -> str:
        return self._engine.name

    @property
    def dtype(self):
        return self._engine.dtype

    @property
    def max_tokens(self) -> int:
        return self._engine.max_tokens

    @property
    def answers_apart(self) -> bool:
        return self._engine.answers_apart

    async def _call(self, work: Callable[[LLMEngine], Awaitable[T]]) -> T:
        """Run `work` on the current engine, replacing the engine as often as the rules allow."""
        while True:
            engine = self._engine
            try:
                return await self._with_retries(engine, work)
            except LLMEngineError as error:
                await self._replace(engine, error)

    async def _with_retries(
        self, engine: LLMEngine, work: Callable[[LLMEngine], Awaitable[T]]
    ) -> T:
        def tell(state: RetryCallState) -> None:
            self.counters["engine_retries"] += 1
            error = state.outcome.exception() if state.outcome else None
            logger.warning(
                "LLM engine %s failed (%s), try %d follows",
                engine.name,
                error,
                state.attempt_number + 1,
            )

        retrying = AsyncRetrying(
            retry=retry_if_exception(
                lambda e: isinstance(e, LLMEngineError) and not isinstance(e, LLMEngineDead)
            ),
            stop=stop_after_attempt(self._attempts),
            wait=wait_exponential_jitter(
                initial=self._first_pause_s, max=10.0, jitter=self._first_pause_s / 2
            ),
            before_sleep=tell,
            reraise=True,
        )

        async def attempt() -> T:
            return await work(engine)

        return await retrying(attempt)

    async def _replace(self, failed: LLMEngine, error: LLMEngineError) -> None:
        async with self._recovering:
            if self._engine is not failed:
                return  # another task met the same failure and has already replaced the engine
            if self._fallen_back:
                raise error  # nothing is left to take over: the caller's rule applies

            # 1. A fresh engine of the same kind, as often as the settings allow.
            await self._close_quietly(failed)
            while self.counters["engine_restarts"] < self._max_restarts:
                self.counters["engine_restarts"] += 1
                logger.warning(
                    "LLM engine %s died (%s); restart %d of %d",
                    failed.name,
                    error,
                    self.counters["engine_restarts"],
                    self._max_restarts,
                )
                try:
                    await self._install(await self._restart())
                    return
                except LLMEngineError as again:
                    error = again

            # 2. Another kind, for good; or the end of the run.
            if self._fallback is None:
                raise PriorZeroError(
                    f"the LLM engine {failed.name} failed and {self._max_restarts} restarts did "
                    f"not help: {error}. Raise llm.max_restarts, allow the fallback "
                    "(llm.required=False), or choose the transformers engine"
                ) from error

            logger.error(
                "LLM engine %s is given up (%s); the transformers engine takes over",
                failed.name,
                error,
            )
            self.counters["engine_fallbacks"] += 1
            self._fallen_back = True
            await self._install(await self._fallback())

    async def _install(self, engine: LLMEngine) -> None:
        """Bring a fresh engine to the latest weights before anyone can ask it.

        One that does not take them is closed: it would hold its memory for good.
        """
        if self._latest is not None:
            try:
                await engine.push_weights(*self._latest)
            except BaseException:
                await self._close_quietly(engine)
                raise
        self._engine = engine

    async def _close_quietly(self, engine: LLMEngine) -> None:
        try:
            await engine.close()
        except Exception:  # of any kind: the engine is dead, and the run goes on without it
            self.counters["engine_close_errors"] += 1
            logger.exception("Closing the failed LLM engine %s failed too", engine.name)

    @property
    def thought_calls(self) -> int:
        return self._engine.thought_calls

    @thought_calls.setter
    def thought_calls(self, calls: int) -> None:
        self._engine.thought_calls = calls

    async def score(self, requests: Sequence[TokenisedRequest]) -> list[ActionScores]:
        return await self._call(lambda engine: engine.score(requests))

    async def generate(self, prompts, max_new_tokens, temperature=1.0, stop=(), seed=None):
        return await self._call(
            lambda engine: engine.generate(prompts, max_new_tokens, temperature, stop, seed)
        )

    async def push_weights(self, weights: Weights, version: int) -> dict[str, float]:
        self._latest = (weights, version)
        report = await self._call(lambda engine: engine.push_weights(weights, version))
        self.weights_version = self._engine.weights_version
        return report

    async def sleep(self) -> None:
        await self._call(lambda engine: engine.sleep())

    async def wake(self) -> None:
        await self._call(lambda engine: engine.wake())

    async def close(self) -> None:
        await self._engine.close()

    async def _score_tokens(self, requests):
        return await self._call(lambda engine: engine._score_tokens(requests))

    async def _generate_tokens(self, prompts, max_new_tokens, temperature, stop, seed):
        return await self._call(
            lambda e: e._generate_tokens(prompts, max_new_tokens, temperature, stop, seed)
        )

    def stats(self) -> dict[str, float]:
        return self._engine.stats() | super().stats()
