"""After a weight update: does the engine answer as the trainer's own forward does?"""
from __future__ import annotations

import asyncio
import logging
import time

from priorzero.llm.engine import LLMEngine, LLMEngineError
from priorzero.llm.requests import ScoreRequest
from priorzero.llm.trainer import LLMTrainer

logger = logging.getLogger(__name__)

# Summed log-probabilities of one action. bfloat16 rounds differently in every engine (up to 0.4 measured), so there
# the canary finds gross faults only; engines check stale tensors by themselves (see vllm_worker).
FLOAT32_TOLERANCE = 2e-3
BFLOAT16_TOLERANCE = 0.8


async def canary_difference(engine: LLMEngine, trainer: LLMTrainer, request: ScoreRequest, float32: bool) -> float:
    """Largest difference in a summed action log-probability between engine and trainer on one state."""
    # Not through a score cache: its answer would prove nothing about the engine.
    source = getattr(engine, "inner", engine)
    answer = (await source.score([request]))[0]
    if answer.weights_version != trainer.version:
        raise LLMEngineError(
            f"the engine answers with weights {answer.weights_version}, the trainer has {trainer.version}"
        )
    expected = (await asyncio.to_thread(trainer.score, [request], float32))[0]
    pairs = zip(answer.totals(), expected.totals(), strict=True)
    return max((abs(a - b) for a, b in pairs), default=0.0)


async def push_and_verify(
    engine: LLMEngine, trainer: LLMTrainer, canary: ScoreRequest | None, *, float32: bool = False,
    tolerance: float | None = None,
) -> dict[str, float]:
    """Push the trainer's weights and score ``canary`` on both sides.

    ``float32`` says that the engine computes in float32, which allows the strict tolerance.

    :returns: ``seconds``, ``bytes``, ``canary_diff``, ``version``.
    :raises LLMEngineError: the engine's answer is not the trainer's.
    """
    limit = tolerance if tolerance is not None else FLOAT32_TOLERANCE if float32 else BFLOAT16_TOLERANCE
    started = time.perf_counter()
    report = dict(await engine.push_weights(trainer.model, trainer.version))
    if canary is not None:
        difference = await canary_difference(engine, trainer, canary, float32)
        report["canary_diff"] = difference
        if difference > limit:
            raise LLMEngineError(
                f"after weights {trainer.version} were pushed, the {engine.name} engine differs from the trainer by "
                f"{difference:.4f} in a summed log-probability (limit {limit}); its weights are stale or damaged"
            )
    logger.info(
        "LLM weights %d on %s: %.1f MB in %.2f s, canary differs by %.2g", trainer.version, engine.name,
        report.get("bytes", 0.0) / 1e6, time.perf_counter() - started, report.get("canary_diff", float("nan")),
    )
    return report | {"version": float(trainer.version)}
