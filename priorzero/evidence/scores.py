"""What an LLM says to every step of a walk, under several prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from priorzero.evidence.variants import VARIANTS
from priorzero.evidence.walk import Walk
from priorzero.llm.engines.base import LLMEngine
from priorzero.llm.prior import LLMPrior
from priorzero.llm.prompts import prompt_builder
from priorzero.settings.llm import PromptSettings
from priorzero.types import ActionScores, TextState

# Per question to the engine; both bound its memory.
_TOGETHER = 8  # states
_COMMANDS = 32  # commands behind no state


@dataclass(frozen=True)
class Scored:
    """An LLM's answer to one judged step.

    Attributes:
        outcomes: `[A]` of the step.
        tokens: per valid command the log-probabilities of its tokens.
        unconditional: `[A]` log-probability of each command where no state is shown.
    """

    outcomes: tuple[int, ...]
    tokens: tuple[tuple[float, ...], ...]
    unconditional: np.ndarray

    @property
    def mass_outside(self) -> float:
        """Probability that the LLM, left to itself, would type none of the valid commands."""
        return max(0.0, 1.0 - float(np.exp([sum(own) for own in self.tokens]).sum()))


class Asker:
    """Asks one LLM with one prompt variant.

    Args:
        engine: the LLM's.
        variant: a name of `VARIANTS`.
        prompt: settings that the variant is laid over.
    """

    def __init__(self, engine: LLMEngine, variant: str, prompt: PromptSettings) -> None:
        settings = replace(prompt, **VARIANTS[variant])
        tokenizer = engine.tokeniser.tokenizer
        self.history_length = settings.history_length
        self.prior = LLMPrior(
            engine,
            prompt_builder(settings, tokenizer),
            reasoning=settings.use_cot,
            required=True,
        )
        # Without a state there is nothing to think about.
        self._stateless = LLMPrior(
            engine, prompt_builder(replace(settings, use_cot=False), tokenizer), required=True
        )
        self._alone: dict[str, dict[str, float]] = {}  # by goal

    async def ask(self, states: Sequence[TextState]) -> list[ActionScores]:
        """Log-probabilities of every valid command of these states.

        Raises:
            PriorZeroError: the engine failed, or a prompt does not fit the model.
        """
        return await self.prior.ask(
            self.prior.requests(states, [state.valid_actions for state in states])
        )

    async def unconditional(self, goal: str, commands: Sequence[str]) -> dict[str, float]:
        """Log-probability of each command behind the same prompt with an empty observation."""
        nothing = TextState("", (), (), goal)
        known = self._alone.setdefault(goal, {})
        missing = [command for command in dict.fromkeys(commands) if command not in known]
        for start in range(0, len(missing), _COMMANDS):
            part = missing[start : start + _COMMANDS]
            (answer,) = await self._stateless.ask(self._stateless.requests([nothing], [part]))
            known |= zip(part, answer.totals("sum"), strict=True)
        return {command: known[command] for command in commands}

    async def walk(self, walk: Walk) -> list[Scored]:
        """Answers to the judged steps of a walk."""
        steps = walk.judged
        commands = sorted({a for step in steps for a in step.state.valid_actions})
        alone = await self.unconditional(walk.game.goal, commands)

        scored: list[Scored] = []
        for start in range(0, len(steps), _TOGETHER):
            part = steps[start : start + _TOGETHER]
            answers = await self.ask([step.state for step in part])
            for step, answer in zip(part, answers, strict=True):
                unconditional = np.asarray([alone[a] for a in step.state.valid_actions])
                scored.append(Scored(step.outcomes, answer.token_logprobs, unconditional))
        return scored
