"""From game states to the LLM's prior: build the prompts, tokenise them, ask the engine once.

Collector and evaluator own one `LLMPrior` together. The prompt builder is handed in, so that one
engine can be asked with prompts of several kinds (`priorzero.llm.prompts`, or a caller's own).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from priorzero.data.segment import StepRecord
from priorzero.llm.engines.base import LLMEngine, LLMEngineError
from priorzero.llm.engines.gate import Gate
from priorzero.types import ActionScores, PriorZeroError, TextState, TokenisedRequest

logger = logging.getLogger(__name__)

# (state) -> (head, body, was anything cut to fit)
PromptBuilder = Callable[[TextState], tuple[str, str, bool]]

_REMEMBERED = 4096  # states whose requests are kept; about 10 KB each with 600 tokens


class LLMPrior:
    """Asks an engine for the log-probabilities of valid actions.

    Args:
        engine: scores the requests.
        build_prompt: see `PromptBuilder`.
        reasoning: generate a chain of thought before scoring.
        required: an engine that cannot answer stops the run; otherwise the step is planned without
            the LLM and counted.
        gate: requests enter it; shut by the training phase while the engine cannot answer, or
            would answer with weights that change.
    """

    def __init__(
        self,
        engine: LLMEngine,
        build_prompt: PromptBuilder,
        *,
        reasoning: bool = False,
        required: bool = False,
        gate: Gate | None = None,
    ) -> None:
        self.engine = engine
        self._build_prompt = build_prompt
        self._reasoning = reasoning
        self._required = required
        self._gate = gate or Gate()
        self._made: OrderedDict[tuple[TextState, tuple[str, ...]], TokenisedRequest] = OrderedDict()
        self.counters: Counter[str] = Counter()
        self._lock = threading.Lock()  # collector and evaluator tokenise in threads

    def requests(
        self, states: Sequence[TextState], actions: Sequence[Sequence[str]]
    ) -> list[TokenisedRequest]:
        """What the engine is asked for these actions of these states, in token ids.

        Equal states share one object, so a buffer full of them holds each prompt once.

        Raises:
            PromptTooLongError: a prompt does not fit the model.
        """
        with self._lock:
            return self._requests(states, actions)

    def _requests(
        self, states: Sequence[TextState], actions: Sequence[Sequence[str]]
    ) -> list[TokenisedRequest]:
        keys = [(state, tuple(own)) for state, own in zip(states, actions, strict=True)]
        found = {key: self._made[key] for key in keys if key in self._made}
        missing = [key for key in dict.fromkeys(keys) if key not in found]

        # Prompts are built one by one, and tokenised together.
        if missing:
            built = [self._build_prompt(state) for state, _ in missing]
            self.counters["prompts"] += len(missing)
            self.counters["prompts_cut"] += sum(cut for _, _, cut in built)
            prompts = [(head, body) for head, body, _ in built]
            made = self.engine.tokeniser.requests(
                prompts, [own for _, own in missing], reasoning=self._reasoning
            )
            found |= zip(missing, made, strict=True)

        for key in found:
            self._made[key] = found[key]
            self._made.move_to_end(key)
        while len(self._made) > _REMEMBERED:
            self._made.popitem(last=False)
        return [found[key] for key in keys]

    async def ask(self, requests: Sequence[TokenisedRequest]) -> list[ActionScores | None]:
        """Scores per request, in order; None for all where the engine failed and the LLM is not
        required.

        Raises:
            PriorZeroError: the engine failed and the LLM is required.
        """
        started = time.perf_counter()
        try:
            async with self._gate.request():
                scores = await self.engine.score(requests)
        except LLMEngineError as error:
            self.counters["failures"] += 1
            if self._required:
                raise PriorZeroError(
                    f"the LLM engine failed and llm.required is set: {error}"
                ) from error
            logger.warning(
                "the LLM engine failed (%s); these %d states are planned with the world model "
                "alone (failure %d of this run)",
                error,
                len(requests),
                self.counters["failures"],
            )
            return [None] * len(requests)
        finally:
            self.counters["states"] += len(requests)
            self.counters["milliseconds"] += int(1000 * (time.perf_counter() - started))
        return list(scores)

    def stats(self) -> dict[str, float]:
        """Counters of this object and its engine."""
        return {k: float(v) for k, v in self.counters.items()} | self.engine.stats()


def reduced(scores: ActionScores | None, reduction: str) -> np.ndarray | None:
    """`[A]` log-probabilities, one per action (`sum` or `mean` over tokens); None stays None."""
    return None if scores is None else np.asarray(scores.totals(reduction), dtype=np.float64)


def prior_table(step: StepRecord, reduction: str) -> str:
    """Markdown table of one decision: each action's prior and share of the visits, most visited
    first; where the LLM played alone, its probability when the action was drawn.
    """
    totals = reduced(step.scores, reduction)
    prior = np.exp(totals - totals.max())
    prior /= prior.sum()
    name, shares = "drawn from", step.behaviour
    if step.searched:
        name, shares = "visits", step.visit_counts / step.visit_counts.sum()
    lines = [f"| action | LLM prior | {name} |", "| --- | --- | --- |"]
    for i in np.argsort(-shares):
        chosen = " (chosen)" if i == step.action_index else ""
        lines.append(f"| {step.valid_actions[i]}{chosen} | {prior[i]:.3f} | {shares[i]:.3f} |")
    return "\n".join(lines)
