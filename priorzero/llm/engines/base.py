"""The interface of every LLM engine: score the valid actions of states, generate text, take new
weights.

`LLMEngine` owns what must be the same everywhere (tokenising, chains of thought, duplicates within
a call, the check for NaN and missing values); a concrete engine supplies `_score_tokens`,
`_generate_tokens` and `push_weights`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence

import torch

from priorzero.llm.scoring.requests import (
    ReasoningSettings,
    ScoreRequest,
    TextTokeniser,
    TokenisedRequest,
)
from priorzero.llm.weights.export import Weights
from priorzero.types import ActionScores

TokenLogprobs = tuple[tuple[float, ...], ...]


class LLMEngineError(RuntimeError):
    """An engine could not answer, or answered with something unusable. The caller may retry."""


class LLMEngineDead(LLMEngineError):
    """The engine's process is gone or does not answer any more; only a restart helps."""


class LLMEngine(ABC):
    """Scores and generates. All methods are called from one event loop and never block it for long."""

    name = "engine"

    def __init__(self, text: TextTokeniser, reasoning: ReasoningSettings | None = None) -> None:
        self.text = text
        self.reasoning = reasoning or ReasoningSettings()
        self.weights_version = 0
        self.counters: Counter[str] = Counter()

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype the engine multiplies in."""

    @property
    def prompt_alignment(self) -> int:
        """Prompts whose length in tokens is a multiple of this are cheapest (1: no preference)."""
        return 1

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ActionScores]:
        """Token log-probabilities of every action of every state, in the order asked.

        A state without actions gets an empty result. Equal requests within the call are computed
        once.

        :raises LLMEngineError: no answer, or NaN, infinite or missing values.
        :raises PromptTooLongError: a prompt does not fit the model.
        """
        requests = list(requests)
        thoughts = await self._reason(requests)
        asked = [r.with_reasoning(t) if t else r for r, t in zip(requests, thoughts, strict=True)]
        tokens = [r if isinstance(r, TokenisedRequest) else self.text.tokenise(r) for r in asked]
        unique = {t: None for t in tokens if t.action_ids}
        answers, version = (
            await self._score_tokens(list(unique)) if unique else ([], self.weights_version)
        )
        by_tokens = dict(zip(unique, answers, strict=True))
        self.counters["states"] += len(requests)
        self.counters["states_computed"] += len(unique)
        return [
            ActionScores(
                check_scores(t, by_tokens[t]) if t.action_ids else (), version, reasoning=thought
            )
            for t, thought in zip(tokens, thoughts, strict=True)
        ]

    async def _reason(self, requests: Sequence[ScoreRequest]) -> list[str]:
        """Chain of thought for the requests that ask for one, "" for the others."""
        thoughts = [""] * len(requests)
        wanted = [i for i, r in enumerate(requests) if r.reasoning and (r.action_ids if isinstance(r, TokenisedRequest) else r.actions)]
        if not wanted:
            return thoughts
        settings = self.reasoning
        self.counters["reasoning_calls"] += 1
        texts = await self.generate(
            [requests[i].head + requests[i].body for i in wanted],
            settings.max_new_tokens,
            settings.temperature,
            (settings.marker,),
            seed=settings.seed + self.counters["reasoning_calls"],
        )
        for i, generated in zip(wanted, texts, strict=True):
            thoughts[i], had_marker = settings.finish(generated)
            self.counters["reasoning"] += 1
            self.counters["reasoning_without_marker"] += not had_marker
        return thoughts

    async def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        temperature: float = 1.0,
        stop: Sequence[str] = (),
        seed: int | None = None,
    ) -> list[str]:
        """Continue ``prompts``. A text ends at the end of turn, at ``max_new_tokens``, or with a
        ``stop`` string, which it then includes. Temperature 0 is greedy.
        """
        ids = [self.text.prompt_ids(p) for p in prompts]
        return (
            await self._generate_tokens(ids, max_new_tokens, temperature, tuple(stop), seed)
            if ids
            else []
        )

    @abstractmethod
    async def _score_tokens(
        self, requests: list[TokenisedRequest]
    ) -> tuple[list[TokenLogprobs], int]:
        """Log-probabilities of distinct requests that each have an action, and the weights version
        that answered.
        """

    @abstractmethod
    async def _generate_tokens(
        self,
        prompts: list[tuple[int, ...]],
        max_new_tokens: int,
        temperature: float,
        stop: tuple[str, ...],
        seed: int | None,
    ) -> list[str]:
        """See `generate`."""

    @abstractmethod
    async def push_weights(self, weights: Weights, version: int) -> dict[str, float]:
        """Answer with ``weights`` from now on. Returns ``seconds`` and ``bytes`` of the
        transfer.
        """

    async def sleep(self) -> None:  # noqa: B027 - an optional hook
        """Give device memory back while the trainer works, where the engine can."""

    async def wake(self) -> None:  # noqa: B027 - an optional hook
        """Undo `sleep`."""

    async def close(self) -> None:  # noqa: B027 - an optional hook
        """Release everything; the engine cannot be used afterwards."""

    def stats(self) -> dict[str, float]:
        """Counters since the start, for logging."""
        return {key: float(value) for key, value in self.counters.items()}

    def reset_stats(self) -> None:
        """Count from here on."""
        self.counters.clear()


def check_scores(request: TokenisedRequest, answer: TokenLogprobs) -> TokenLogprobs:
    """Pass ``answer`` on if it has one finite, non-positive number per token of every action.

    :raises LLMEngineError: otherwise; the search must never see such a prior.
    """
    lengths = [len(a) for a in request.action_ids]
    if [len(a) for a in answer] != lengths:
        raise LLMEngineError(
            f"the engine answered {[len(a) for a in answer]} log-probabilities, asked were {lengths}"
        )
    for index, values in enumerate(answer):
        for value in values:
            if value is None or not math.isfinite(value) or value > 1e-3:
                raise LLMEngineError(
                    f"action {index} of {len(lengths)} got the log-probability {value}; expected a finite value <= 0"
                )
    return answer
