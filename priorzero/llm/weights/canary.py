"""After a weight update: does the engine answer as the trainer's own forward does?"""

from __future__ import annotations

import asyncio
import logging

import torch

from priorzero.llm.engines.base import LLMEngine, LLMEngineError
from priorzero.llm.scoring.requests import ScoreRequest
from priorzero.llm.update.trainers.builtin import LLMTrainer

logger = logging.getLogger(__name__)

# Allowed difference of an action's summed log-probability: a constant and a share of its size.
# bfloat16 rounds differently in every engine (up to 0.4 measured on sums near -20), so there the
# canary finds gross faults only; the vLLM engine looks for stale tensors by itself (vllm_worker).
# float32 agrees to 1e-4 on a CPU; on an H100 vLLM's differed by 0.01. A stale output head was off
# by 2.6.
_TOLERANCE = {(torch.float32, "cpu"): (2e-3, 1e-4), (torch.float32, "cuda"): (0.02, 1e-3)}
_COARSE_TOLERANCE = (0.8, 0.03)


async def canary_difference(
    engine: LLMEngine, trainer: LLMTrainer, request: ScoreRequest, tolerance: float | None = None
) -> tuple[float, bool]:
    """Largest difference in a summed action log-probability between engine and trainer on one
    state, and whether all differences are within the tolerance of the engine's dtype (or the
    absolute ``tolerance``).

    The trainer computes in the engine's dtype: rounding a weight to bfloat16 can undo a small
    update, on both sides.
    """
    # Not through a score cache: its answer would prove nothing about the engine.
    source = getattr(engine, "inner", engine)
    answer = (await source.score([request]))[0]
    if answer.weights_version != trainer.version:
        raise LLMEngineError(
            f"the engine answers with weights {answer.weights_version}, the trainer has {trainer.version}"
        )
    # All layers anew: an engine that shares the trainer's trunk cache may answer from it.
    expected = (await asyncio.to_thread(trainer.score, [request], engine.dtype, all_layers=True))[0]
    usual = _TOLERANCE.get((engine.dtype, trainer.device.type), _COARSE_TOLERANCE)
    constant, share = (tolerance, 0.0) if tolerance is not None else usual
    pairs = list(zip(answer.totals(), expected.totals(), strict=True))
    within = all(abs(a - b) <= constant + share * abs(b) for a, b in pairs)
    return max((abs(a - b) for a, b in pairs), default=0.0), within


async def push_and_verify(
    engine: LLMEngine,
    trainer: LLMTrainer,
    canary: ScoreRequest | None,
    *,
    tolerance: float | None = None,
) -> dict[str, float]:
    """Push the trainer's weights and score ``canary`` (a state without reasoning) on both sides.

    :returns: ``seconds``, ``bytes``, ``canary_diff``, ``version``.
    :raises LLMEngineError: the engine's answer is not the trainer's.
    """
    report = dict(await engine.push_weights(trainer.model, trainer.version))
    if canary is not None:
        report["canary_diff"], good = await canary_difference(engine, trainer, canary, tolerance)
        if not good:
            raise LLMEngineError(
                f"after weights {trainer.version} were pushed, the {engine.name} engine ({engine.dtype}) differs from "
                f"the trainer by {report['canary_diff']:.4f} in a summed log-probability; its weights are stale or "
                "damaged"
            )
    logger.info(
        "LLM weights %d on %s: %.1f MB in %.2f s, canary differs by %.2g",
        trainer.version,
        engine.name,
        report.get("bytes", 0.0) / 1e6,
        report.get("seconds", 0.0),
        report.get("canary_diff", float("nan")),
    )
    return report | {"version": float(trainer.version)}
