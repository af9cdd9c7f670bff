"""From game states to the LLM's prior: build the prompts, ask the engine once for all environments,
reduce over tokens.

Collector and evaluator own one `LLMPrior` together. The prompt builder is handed in, because
prompts are part of the story (`priorzero_prompts.py`) and this package imports no root file.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from priorzero.data.segment import StepRecord
from priorzero.llm.engines.base import LLMEngine, LLMEngineError
from priorzero.llm.scoring.requests import ScoreRequest
from priorzero.types import ActionScores, PriorZeroError, TextState

logger = logging.getLogger(__name__)

# (state) -> (head, body, was anything cut to fit)
PromptBuilder = Callable[[TextState], tuple[str, str, bool]]


class LLMPrior:
    """Asks an engine for the log-probabilities of valid actions.

    Args:
        engine: scores the requests.
        build_prompt: see `PromptBuilder`.
        action_prefix: text between prompt and action (a space).
        reasoning: generate a chain of thought before scoring.
        required: an engine that cannot answer stops the run; otherwise the step is planned without
            the LLM and counted.
    """

    def __init__(
        self,
        engine: LLMEngine,
        build_prompt: PromptBuilder,
        *,
        action_prefix: str = " ",
        reasoning: bool = False,
        required: bool = False,
    ) -> None:
        self.engine = engine
        self._build_prompt = build_prompt
        self._action_prefix = action_prefix
        self._reasoning = reasoning
        self._required = required
        self.counters: Counter[str] = Counter()

    def request(self, state: TextState, actions: Sequence[str]) -> ScoreRequest:
        """The engine's request for these actions of a state; the LLM's trainer uses the same."""
        head, body, cut = self._build_prompt(state)
        self.counters["prompts"] += 1
        self.counters["prompts_cut"] += cut
        return ScoreRequest(head, body, tuple(actions), self._action_prefix, self._reasoning)

    async def ask(
        self, states: Sequence[TextState], actions: Sequence[Sequence[str]]
    ) -> list[ActionScores | None]:
        """Scores per state, in order; None for all where the engine failed and the LLM is not
        required.

        Raises:
            PriorZeroError: the engine failed and the LLM is required.
        """
        started = time.perf_counter()
        try:
            scores = await self.engine.score(
                [self.request(s, a) for s, a in zip(states, actions, strict=True)]
            )
        except LLMEngineError as error:
            self.counters["failures"] += 1
            if self._required:
                raise PriorZeroError(
                    f"the LLM engine failed and llm.required is set: {error}"
                ) from error
            logger.warning(
                "the LLM engine failed (%s); these %d states are planned with the world model alone "
                "(failure %d of this run)",
                error,
                len(states),
                self.counters["failures"],
            )
            return [None] * len(states)
        finally:
            self.counters["states"] += len(states)
            self.counters["milliseconds"] += int(1000 * (time.perf_counter() - started))
        return list(scores)

    def stats(self) -> dict[str, float]:
        """Counters of this object and its engine."""
        return {k: float(v) for k, v in self.counters.items()} | self.engine.stats()


def reduced(scores: ActionScores | None, reduction: str) -> np.ndarray | None:
    """`[A]` log-probabilities, one per action (`sum` or `mean` over tokens); None stays None."""
    return None if scores is None else np.asarray(scores.totals(reduction), dtype=np.float64)


def prior_table(step: StepRecord, reduction: str) -> str:
    """Markdown table of one decision: each valid action's prior and share of the visits, most
    visited first.
    """
    totals = reduced(step.scores, reduction)
    prior = np.exp(totals - totals.max())
    prior /= prior.sum()
    visits = step.visit_counts / step.visit_counts.sum()
    rows = [
        f"| {step.valid_actions[i]}{' (chosen)' if i == step.action_index else ''} | {prior[i]:.3f} | {visits[i]:.3f} |"
        for i in np.argsort(-visits)
    ]
    return "\n".join(["| action | LLM prior | visits |", "| --- | --- | --- |", *rows])
