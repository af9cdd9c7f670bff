"""The interface of every LLM engine: score valid actions, generate, take new weights.

`LLMEngine` owns what must be the same everywhere (chains of thought, duplicates within a call, the
check for NaN and missing values); a concrete engine supplies `_score_tokens`, `_generate_tokens`
and `push_weights`. All of it works on token ids; texts are tokenised once, by
`priorzero.llm.prior`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence

import torch

from priorzero.llm.engines.thoughts import Generated, Reasoner, Thought
from priorzero.llm.scoring.requests import Tokeniser, check_length
from priorzero.llm.weights.export import Weights
from priorzero.types import ActionScores, TokenisedRequest

TokenLogprobs = tuple[tuple[float, ...], ...]
Ids = tuple[int, ...]


class LLMEngineError(RuntimeError):
    """An engine could not answer, or answered with something unusable. The caller may retry."""


class LLMEngineDead(LLMEngineError):
    """The engine's process is gone or does not answer any more; only a restart helps."""


class LLMEngine(ABC):
    """Scores and generates. All methods are called from one event loop and never block it long.

    Args:
        tokeniser: of the model.
        reasoner: how chains of thought are generated; None where no request asks for one.
    """

    name = "engine"

    def __init__(self, tokeniser: Tokeniser, reasoner: Reasoner | None = None) -> None:
        self.tokeniser = tokeniser
        self.reasoner = reasoner
        self.weights_version = 0
        self.counters: Counter[str] = Counter()
        self._thought_calls = 0

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype the engine multiplies in."""

    @property
    def max_tokens(self) -> int:
        """Longest prompt plus longest action."""
        return self.tokeniser.max_tokens

    @property
    def answers_apart(self) -> bool:
        """Whether it answers while the trainer works, with the weights it was given last: not where
        it computes with the trainer's own, nor where it sleeps meanwhile.
        """
        return True

    async def score(self, requests: Sequence[TokenisedRequest]) -> list[ActionScores]:
        """Token log-probabilities of every action of every state, in the order asked.

        A request with `reasoning` gets a chain of thought first; it is part of the answer. A state
        without actions gets an empty result. Equal states within the call are computed once.

        Raises:
            LLMEngineError: no answer, or NaN, infinite or missing values.
            PromptTooLongError: a prompt does not fit the model.
        """
        requests = list(requests)
        thoughts = await self._reason(requests)
        asked = [r.with_thought(t.ids) for r, t in zip(requests, thoughts, strict=True)]

        unique = {request: None for request in asked if request.action_ids}
        for request in unique:
            check_length(request, self.max_tokens)
        answers, version = [], self.weights_version
        if unique:
            answers, version = await self._score_tokens(list(unique))
        answer_of = dict(zip(unique, answers, strict=True)) | {
            request: () for request in asked if not request.action_ids
        }
        self.counters["states"] += len(requests)
        self.counters["states_computed"] += len(unique)
        return [
            ActionScores(
                check_scores(request, answer_of[request]),
                version,
                thought.ids,
                thought.logprobs,
                thought_ended=thought.had_marker,
            )
            for request, thought in zip(asked, thoughts, strict=True)
        ]

    async def _reason(self, requests: Sequence[TokenisedRequest]) -> list[Thought]:
        """The chain of thought for the requests that ask for one, an empty one for the others."""
        thoughts = [Thought()] * len(requests)
        wanted = [i for i, r in enumerate(requests) if r.reasoning and r.action_ids]
        if not wanted:
            return thoughts
        assert self.reasoner is not None, "a request asks for reasoning, the engine has no reasoner"

        self._thought_calls += 1
        generated = await self.generate(
            [requests[i].prompt_ids for i in wanted],
            self.reasoner.max_new_tokens,
            self.reasoner.temperature,
            (self.reasoner.marker,),
            seed=self.reasoner.seed + self._thought_calls,
        )
        for i, written in zip(wanted, generated, strict=True):
            longest = max(len(a) for a in requests[i].action_ids)
            room = self.max_tokens - requests[i].num_prompt_tokens - longest
            thoughts[i] = self.reasoner.finish(written, self.tokeniser, room)
            self.counters["reasoning"] += 1
            self.counters["reasoning_without_marker"] += not thoughts[i].had_marker
        return thoughts

    async def generate(
        self,
        prompts: Sequence[Ids],
        max_new_tokens: int,
        temperature: float = 1.0,
        stop: Sequence[str] = (),
        seed: int | None = None,
    ) -> list[Generated]:
        """Continue `prompts`, given and answered as token ids, each with its log-probability.

        An answer ends before the end of turn, at `max_new_tokens`, or with the token that
        completes a `stop` text. Temperature 0 is greedy.

        Raises:
            LLMEngineError: no answer, or a log-probability that is none.
        """
        if not prompts:
            return []
        written = await self._generate_tokens(
            list(prompts), max_new_tokens, temperature, tuple(stop), seed
        )
        for value in (value for answer in written for value in answer.logprobs):
            if not math.isfinite(value) or value > 1e-3:
                raise LLMEngineError(
                    f"a generated token got the log-probability {value}; expected a finite value "
                    "<= 0"
                )
        return written

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
        prompts: list[Ids],
        max_new_tokens: int,
        temperature: float,
        stop: tuple[str, ...],
        seed: int | None,
    ) -> list[Generated]:
        """See `generate`."""

    @abstractmethod
    async def push_weights(self, weights: Weights, version: int) -> dict[str, float]:
        """Answer with `weights` from now on.

        Returns:
            `seconds` and `bytes` of the transfer.
        """

    async def sleep(self) -> None:  # noqa: B027 - an optional hook
        """Give device memory back while the trainer works, where the engine can."""

    async def wake(self) -> None:  # noqa: B027 - an optional hook
        """Undo `sleep`."""

    async def close(self) -> None:  # noqa: B027 - an optional hook
        """Release everything; the engine cannot be used afterwards."""

    @property
    def thought_calls(self) -> int:
        """How many calls have generated thoughts; with the reasoner's seed, what the next ones are
        drawn from. A resumed run sets it.
        """
        return self._thought_calls

    @thought_calls.setter
    def thought_calls(self, calls: int) -> None:
        self._thought_calls = calls

    def stats(self) -> dict[str, float]:
        """Counters since the start, for logging."""
        return {key: float(value) for key, value in self.counters.items()}

    def reset_stats(self) -> None:
        """Count from here on."""
        self.counters.clear()


def check_scores(request: TokenisedRequest, answer: TokenLogprobs) -> TokenLogprobs:
    """Pass `answer` on if it has one finite, non-positive number per token of every action.

    Raises:
        LLMEngineError: otherwise; the search must never see such a prior.
    """
    lengths = [len(a) for a in request.action_ids]
    if [len(a) for a in answer] != lengths:
        raise LLMEngineError(
            f"the engine answered {[len(a) for a in answer]} log-probabilities, "
            f"asked were {lengths}"
        )
    for index, values in enumerate(answer):
        for value in values:
            if value is None or not math.isfinite(value) or value > 1e-3:
                raise LLMEngineError(
                    f"action {index} of {len(lengths)} got the log-probability {value}; "
                    "expected a finite value <= 0"
                )
    return answer
