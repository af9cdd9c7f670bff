"""The LLM's training phase: draw decisions, train, hand the weights to the engine.

It may run beside play and evaluation. An engine with weights of its own answers meanwhile, and is
closed to requests while it takes over the new ones. One that scores with the trainer's own weights,
or sleeps, is closed for the whole phase. An evaluation keeps both out (`weights_kept`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from priorzero.llm.engines.base import LLMEngine, LLMEngineError
from priorzero.llm.engines.gate import Gate
from priorzero.llm.update.protocol import LLMTrainer
from priorzero.llm.update.samples import LLMSample
from priorzero.llm.weights.canary import StaleWeightsError
from priorzero.llm.weights.publish import publish
from priorzero.types import PriorZeroError, TokenisedRequest

if TYPE_CHECKING:
    from priorzero.settings.llm import LLMSettings

# (how many, among the newest so many transitions) -> decisions
Draw = Callable[[int, int], list[LLMSample]]


class LLMPhase:
    """Called once per LLM training phase of the schedule.

    Args:
        settings: the `llm` group; what is drawn for each objective that is enabled.
        trainer: trains.
        engine: answers in play, with the trained weights after each phase.
        gate: what requests of play enter.
    """

    def __init__(
        self,
        settings: LLMSettings,
        trainer: LLMTrainer,
        engine: LLMEngine,
        gate: Gate | None = None,
    ) -> None:
        self._settings, self._trainer, self._engine = settings, trainer, engine
        self._asked = gate or Gate()
        self._kept = Gate()
        self._canary: TokenisedRequest | None = None
        self._followers: list[Callable[[], None]] = []

    def follow(self, take: Callable[[], None]) -> None:
        """Call `take` after each publication from here on, in a thread and while nothing trains:
        for engines elsewhere that shall answer with the same weights.
        """
        self._followers.append(take)

    async def run(self, draw: Draw) -> dict[str, float]:
        """One phase: draw, train, publish.

        Args:
            draw: the buffer's `sample_llm`, or a `GroupDraw`.

        Returns:
            metrics for the `llm/` namespace; without losses where there was no decision to learn
            from.

        Raises:
            PriorZeroError: losses or gradients stay not finite, or the engine does not take over
                the weights.
        """
        apart = self._engine.answers_apart
        async with self._closed(not apart):
            samples, counts = self._draw(draw)
            if not samples:
                return counts
            self._canary = list(samples.values())[-1][0].request

            # The engine gives its memory to the trainer meanwhile, where it can.
            await self._engine.sleep()
            try:
                metrics = await asyncio.to_thread(self._trainer.update, samples)
            finally:
                await self._engine.wake()

            async with self._closed(apart):
                return metrics | counts | await self.publish()

    @asynccontextmanager
    async def weights_kept(self) -> AsyncIterator[None]:
        """Inside, the engine goes on answering with the weights it has now."""
        async with self._kept.request():
            yield

    @asynccontextmanager
    async def _closed(self, closed: bool) -> AsyncIterator[None]:
        """Inside nobody asks the engine, and nobody counts on its weights; does nothing where
        `closed` is False.
        """
        if not closed:
            yield
            return
        # In this order: who counts on the weights still asks.
        async with self._kept.change(), self._asked.change():
            yield

    def _draw(self, draw: Draw) -> tuple[dict[str, list[LLMSample]], dict[str, float]]:
        """Decisions by objective, without those that got none; SFT first. And metrics of RFT's."""
        groups = {"sft": self._settings.sft, "rft": self._settings.rft}
        drawn = {
            name: draw(group.samples, group.recent_transitions)
            for name, group in groups.items()
            if group.enable
        }
        counts: dict[str, float] = {}
        if drawn.get("rft"):
            drawn["rft"], counts = self._fresh(drawn["rft"])
        return {name: found for name, found in drawn.items() if found}, counts

    def _fresh(self, samples: list[LLMSample]) -> tuple[list[LLMSample], dict[str, float]]:
        """Those within `max_staleness`, and by how many versions all were old (mean)."""
        # The LLM had no part in a decision it did not answer for.
        ages = [
            self._trainer.version - s.policy_version if s.collected_logprobs is not None else 0
            for s in samples
        ]
        limit = self._settings.rft.max_staleness
        fresh = [s for s, age in zip(samples, ages, strict=True) if limit is None or age <= limit]
        return fresh, {
            "rft_staleness": sum(ages) / len(ages),
            "rft_stale": float(len(samples) - len(fresh)),
        }

    async def publish(self) -> dict[str, float]:
        """Let the engine answer with the trainer's weights, and check that it does.

        Returns:
            metrics of the hand-over, prefixed with "push_".

        Raises:
            PriorZeroError: the engine answers with other weights, or not at all.
        """
        try:
            report = await publish(self._engine, self._trainer, self._canary)
        except (LLMEngineError, StaleWeightsError) as error:
            raise PriorZeroError(
                f"the LLM engine did not take over the trained weights: {error}. The last "
                "checkpoint stands; continue it with --resume, or use --engine transformers"
            ) from error
        for take in self._followers:
            await asyncio.to_thread(take)
        return {f"push_{name}": float(value) for name, value in report.items()}

    def stats(self) -> dict[str, float]:
        """Counters of the trainer since the start."""
        return self._trainer.stats()
