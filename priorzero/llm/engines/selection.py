"""`engine="auto"`: start both engines, time them on the same states, keep the faster one.

Which is faster depends on the hardware, the model and the versions installed, so it is measured
instead of assumed. The states are made up but shaped like a run's: prompts with a common head and
different bodies, a dozen short actions.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from priorzero.llm.engines.base import LLMEngine, LLMEngineError
from priorzero.llm.scoring.requests import ScoreRequest, TextTokeniser

logger = logging.getLogger(__name__)

_STATES, _ACTIONS, _SECONDS = 8, 12, 20.0
_VERBS = "take drop open close examine push pull read eat light climb unlock".split()
_NOUNS = (
    "lamp door egg sword rug box leaf window bottle rope knife table bell book candle grate".split()
)


@dataclass(frozen=True)
class Choice:
    """The engine to use, why, and whether vLLM was wanted and could not be had."""

    engine: LLMEngine
    reason: str
    vllm_failed: bool


def sample_requests(
    count: int, prompt_tokens: int, text: TextTokeniser, seed: int = 0
) -> list[ScoreRequest]:
    """States of about `prompt_tokens` tokens, all different; fewer where the model takes no more."""
    rng = random.Random(seed)
    per_word = text.count_tokens(" ".join(_NOUNS)) / len(_NOUNS)
    words = int(min(prompt_tokens, text.max_tokens // 2) / per_word)
    head_words = max(1, words // 4)
    head = " ".join(rng.choices(_NOUNS, k=head_words)) + "\n"
    actions = [f"{verb} {noun}" for verb in _VERBS for noun in _NOUNS]
    return [
        ScoreRequest(
            head,
            f"{number} " + " ".join(rng.choices(_NOUNS, k=max(1, words - head_words))) + "\n",
            tuple(sorted(rng.sample(actions, _ACTIONS))),
            " ",
        )
        for number in range(count)
    ]


async def states_per_second(engine: LLMEngine, prompt_tokens: int) -> float:
    """Speed on states the engine has not seen, after two others to warm up; one by one if even
    those were slow.
    """
    warm_up, states = (
        sample_requests(n, prompt_tokens, engine.text, seed) for n, seed in ((2, 0), (_STATES, 1))
    )
    started = time.perf_counter()
    await engine.score(warm_up)
    if time.perf_counter() - started > _SECONDS / 2:
        states = states[:1]
    started = time.perf_counter()
    await engine.score(states)
    seconds = time.perf_counter() - started
    engine.reset_stats()  # they count what the run asks
    return len(states) / seconds


async def faster_engine(
    start_transformers: Callable[[], Awaitable[LLMEngine]],
    start_vllm: Callable[[], Awaitable[LLMEngine]],
    prompt_tokens: int,
) -> Choice:
    """Start both, time both, close the slower one.

    Raises:
        LLMEngineError: the transformers engine fails too.
    """
    transformers = await start_transformers()
    try:
        vllm = await start_vllm()
    except LLMEngineError as error:
        return Choice(transformers, f"vLLM cannot be used: {error}", True)
    speeds: dict[str, float] = {}
    try:
        for engine in (transformers, vllm):
            speeds[engine.name] = await states_per_second(engine, prompt_tokens)
    except LLMEngineError as error:
        await vllm.close()
        if "transformers" not in speeds:
            raise
        return Choice(transformers, f"vLLM started but did not answer: {error}", True)
    except BaseException:
        await vllm.close()
        raise
    winner, loser = (
        (vllm, transformers) if speeds["vllm"] > speeds["transformers"] else (transformers, vllm)
    )
    await loser.close()
    figures = " and ".join(f"{name} {speed:.3g}" for name, speed in speeds.items())
    return Choice(
        winner,
        f"it was faster just now: {figures} states/s with prompts of about {prompt_tokens} tokens and "
        f"{_ACTIONS} actions (--engine {winner.name} saves this measurement)",
        False,
    )
